"""Tests of experiments.population_stats: statistics, distances, trainings and verdicts."""

import dataclasses
import functools
import itertools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import smoke
from scipy import stats
from scipy.special import log_softmax

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.models.cnn import CNN
from bn_research.training.loop import batch_at
from bn_research.training.state import TrainState
from bn_research.training.step import Batch
from experiments.population_stats import PRESETS, figures, statistics, training, verdicts
from experiments.population_stats.statistics import ALGORITHM2, EPSILON, MERGED, TRUTH, average
from experiments.population_stats.training import Rates, Run

QUICK = PRESETS["quick"]


def test_errors_are_in_units_of_the_true_sigma():
    truth = {"batch_norm1": {"mean": np.array([1.0, 0.0]), "var": np.array([4.0, 0.0])}}
    found = {"batch_norm1": {"mean": np.array([2.0, 0.002]), "var": np.array([16.0, 3e-5])}}
    (error,) = statistics.errors(found, truth)
    np.testing.assert_allclose(error[0], [0.5, math.sqrt(0.4)], rtol=1e-5)
    # A feature that never varies is divided by √ε, so ε and not 0 is the unit.
    np.testing.assert_allclose(error[1], [math.log(2), math.log(2)], rtol=1e-5)
    (both,) = statistics.parts([error])
    np.testing.assert_allclose(both, [0.325, math.log(2) ** 2], rtol=1e-5)
    layers = [[0.125, 0.5], [0.0, 0.375]]
    assert verdicts.distance(layers) == pytest.approx(math.sqrt(0.5))


def test_layers_come_in_their_order():
    values = {f"batch_norm{i}": {"mean": np.full(1, i), "var": np.ones(1)} for i in (2, 10, 1)}
    zeros = {name: {"mean": np.zeros(1), "var": np.ones(1)} for name in values}
    assert [round(error[0, 0]) for error in statistics.errors(values, zeros)] == [1, 2, 10]


def test_the_start_is_removed():
    batches = np.random.default_rng(0).uniform(1, 2, (2, 7))
    mean, var = 0.0, 1.0
    for m, v in batches.T:
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v
    weights = 0.9 ** np.arange(6, -1, -1)
    removed = statistics.without_start({"x": {"mean": mean, "var": var}}, 0.9, 7)["x"]
    expected = batches @ weights / weights.sum()
    np.testing.assert_allclose([removed["mean"], removed["var"]], expected, rtol=1e-12)


def test_batches_are_drawn_apart_and_more_of_them_begin_alike():
    rows = statistics.draw_batches(3, 50, 20, 8)
    assert rows.shape == (8, 20) and all(len(set(row)) == 20 for row in rows)
    assert len(set(rows[:2].ravel())) < 40  # two batches may share examples
    np.testing.assert_array_equal(statistics.draw_batches(3, 50, 20, 3), rows[:3])
    assert not np.array_equal(statistics.draw_batches(4, 50, 20, 8), rows)
    assert statistics.counts(8) == [1, 2, 4, 8] and statistics.counts(12) == [1, 2, 4, 8]


# --- measurement, against float64 in numpy ---

NETWORK, BATCH, CHUNK, MOST = "f7 f5 f3", 6, 4, 8
SMALL = dataclasses.replace(QUICK, network=NETWORK, momenta=(0.5, 0.9))


def dense_layers(x, params, normalized):
    """Logits of NETWORK; normalized(layer, pre-activation) is asked for mean and variance."""
    x = x.reshape(len(x), -1)
    for number in (1, 2):
        h = x @ np.asarray(params[f"dense{number}"]["kernel"], np.float64)
        mean, var = normalized(number, h)
        bn = params[f"batch_norm{number}"]
        y = (h - mean) / np.sqrt(var + EPSILON) * np.asarray(bn["scale"]) + np.asarray(bn["bias"])
        x = np.maximum(y, 0)
    return x @ np.asarray(params["dense3"]["kernel"], np.float64)


def gathered(x, params):
    """Pre-activations of both layers, each normalized by this batch."""
    seen = []

    def of_batch(_, h):
        seen.append(h)
        return h.mean(axis=0), h.var(axis=0)

    dense_layers(x, params, of_batch)
    return seen


def combined(batches, *, merged):
    """Mean and variance of both layers from the pre-activations of each batch."""
    found = {}
    for layer in (0, 1):
        hs = np.stack([batch[layer] for batch in batches])  # [K, m, features]
        together, each = hs.reshape(-1, hs.shape[-1]).var(axis=0, ddof=1), hs.var(axis=1, ddof=1)
        found[layer + 1] = hs.mean(axis=(0, 1)), together if merged else each.mean(axis=0)
    return found


def squares(found, truth, other=None):
    """Parts of d², or of what two estimates have in common, from the definition."""
    result = []
    for layer, (mu, var) in truth.items():
        error = []
        for mean, variance in (found[layer], (other or found)[layer]):
            sigma, estimated = np.sqrt(var + EPSILON), np.sqrt(variance + EPSILON)
            error.append(((mean - mu) / sigma, np.log(estimated) - np.log(sigma)))
        result.append([np.mean(a * b) for a, b in zip(*error, strict=True)])
    return result


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(0)
    train, test = (rng.standard_normal((n, 2, 3, 1)).astype(np.float32) for n in (40, 37))
    examples = Batch(jnp.asarray(train), jnp.zeros(40, jnp.int32))
    tested = Batch(jnp.asarray(test), jnp.asarray(rng.integers(0, 3, 37)))
    images = Images(examples, tested, train, 3)
    config = dataclasses.replace(SMALL, population_batches=CHUNK, most_population_batches=MOST)
    variables = statistics.make_model(NETWORK).init(
        jax.random.key(0), images.test.image, train=False
    )
    params = variables["params"]
    for layer, leaf in itertools.product(("batch_norm1", "batch_norm2"), ("scale", "bias")):
        params[layer][leaf] = jnp.asarray(rng.uniform(0.5, 1.5, params[layer][leaf].shape))
    averages = tuple(
        jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 2, x.shape), jnp.float32), s)
        for s in (variables["batch_stats"],) * 2
    )
    state = TrainState(jnp.int32(5), params, averages, (), jax.random.key(1))
    measure = statistics.Measurement(config, images)
    record, early = (measure(state, batch_size=BATCH, seed=2, late=late) for late in (True, False))
    return record, early, images, params, averages


def reference(measured):
    """Truth, and the pre-activations of each batch drawn."""
    _, _, images, params, _ = measured
    x = np.asarray(images.train.image, np.float64)
    batches = [gathered(x[row], params) for row in statistics.draw_batches(2, 40, BATCH, MOST)]
    return combined([gathered(x, params)], merged=True), batches


@pytest.mark.parametrize(("kind", "merged"), [(ALGORITHM2, False), (MERGED, True)])
def test_population_statistics_are_those_of_numpy(measured, kind, merged):
    record, early, *_ = measured
    truth, batches = reference(measured)
    for number, found in zip(statistics.counts(MOST), record["counts"][kind], strict=True):
        expected = squares(combined(batches[:number], merged=merged), truth)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-7)
    for one in (record, early):
        expected = squares(combined(batches[:CHUNK], merged=merged), truth)
        np.testing.assert_allclose(one["parts"][kind], expected, rtol=2e-3, atol=1e-7)
    first, second = (combined(half, merged=merged) for half in (batches[:4], batches[4:]))
    expected = squares(first, truth, second)
    np.testing.assert_allclose(record["floor"][kind], expected, rtol=5e-3, atol=1e-6)
    assert "floor" not in early and "counts" not in early


def test_averages_and_their_controls_are_measured_as_they_are(measured):
    record, _, _, _, averages = measured
    truth, _ = reference(measured)
    for momentum, found in zip((0.5, 0.9), averages, strict=True):
        plain = pairs(found)
        left = momentum**5
        removed = {
            n: (mean / (1 - left), (var - left) / (1 - left)) for n, (mean, var) in plain.items()
        }
        scaled = {n: (mean, var * BATCH / (BATCH - 1)) for n, (mean, var) in removed.items()}
        kinds = zip(statistics.averages(momentum), (plain, removed, scaled), strict=True)
        for kind, expected in ((kind, squares(own, truth)) for kind, own in kinds):
            np.testing.assert_allclose(record["parts"][kind], expected, rtol=1e-3, atol=1e-7)


def pairs(batch_stats):
    """Mean and variance of each layer."""
    layers = {number: batch_stats[f"batch_norm{number}"] for number in (1, 2)}
    return {n: [np.asarray(s[leaf], float) for leaf in ("mean", "var")] for n, s in layers.items()}


def test_the_test_set_is_classified_by_each_kind(measured):
    record, _, images, params, averages = measured
    truth, batches = reference(measured)
    kinds = {
        TRUTH: truth,
        ALGORITHM2: combined(batches[:CHUNK], merged=False),
        MERGED: combined(batches[:CHUNK], merged=True),
        average(0.9): pairs(averages[1]),
    }
    image, label = np.asarray(images.test.image, np.float64), np.asarray(images.test.label)
    for kind, used in kinds.items():
        logits = dense_layers(image, params, lambda number, _, used=used: used[number])
        loss = -np.mean(log_softmax(logits, axis=1)[np.arange(37), label])
        assert record["test_loss"][kind] == pytest.approx(loss, rel=1e-3)
        assert record["accuracy"][kind] == np.mean(logits.argmax(axis=1) == label)
    assert set(record["accuracy"]) == {*kinds, average(0.5)}


# --- training ---


def test_the_averages_are_flaxs_and_a_short_run_is_a_snapshot(tmp_path):
    rng = np.random.default_rng(1)
    examples = Batch(
        jnp.asarray(rng.standard_normal((24, 2, 3, 1)), jnp.float32),
        jnp.asarray(rng.integers(0, 3, 24)),
    )
    images = Images(examples, examples, np.zeros(1), 3)
    config = dataclasses.replace(SMALL, snapshots=(2, 6), steps_per_dispatch=2)
    run = Run(8, 0.1, 6, 0, "high")
    wanted = [run, run.replace(step=2), run.replace(decay=True)]
    states = []

    def capture(state, **options):
        states.append((state, options))
        return {}

    ledger = Ledger(tmp_path / "metrics.jsonl")
    with Runner(tmp_path, ledger, total_steps=1, strategy="devices") as runner:
        records = training.trained("train", wanted, config, images, runner, capture)
    assert [option["late"] for _, option in states] == [True, False, True]
    assert [record["step"] for record in records] == [6, 2, 6]
    norms = [functools.partial(nn.BatchNorm, momentum=m, epsilon=EPSILON) for m in config.momenta]
    models = [CNN(NETWORK, norm, "hidden", use_bias=False) for norm in norms]
    key = jax.random.split(jax.random.key(0))
    model = statistics.make_model(NETWORK)
    variables = model.init(key[0], jnp.zeros((1, 2, 3, 1)), train=False)
    params, first = variables["params"], variables["batch_stats"]

    @jax.jit
    def gradient(p, running, batch):
        def loss(p):
            new = []
            for model, s in zip(models, running, strict=True):
                given, mutable = {"params": p, "batch_stats": s}, ["batch_stats"]
                logits, updated = model.apply(given, batch.image, train=True, mutable=mutable)
                new.append(updated["batch_stats"])
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)
            return entropy.mean(), new

        return jax.grad(loss, has_aux=True)(p)

    steps = [jnp.int32(step) for step in range(6)]
    batches = [batch_at(TrainState(step, (), (), (), key[1]), examples, 8) for step in steps]
    cosine = optax.cosine_decay_schedule(0.1, 6)
    for decayed in (False, True):
        p, velocity = params, jax.tree.map(jnp.zeros_like, params)
        running = [first] * len(models)
        for step, batch in enumerate(batches):
            slope, running = gradient(p, running, batch)
            velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, slope)
            rate = float(cosine(step)) if decayed else 0.1
            p = jax.tree.map(lambda a, v, rate=rate: a - rate * v, p, velocity)
            if step + 1 == 2 and not decayed:
                assert_close(states[1][0], p, running)
        assert_close(states[2 if decayed else 0][0], p, running)


def assert_close(state, params, running):
    found, expected = (state.params, list(state.batch_stats)), (params, list(running))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_the_rate_stays_or_follows_the_cosine():
    cosine = optax.cosine_decay_schedule(0.3, 40)
    for step in (0, 7, 39, 40, 50):
        constant, decayed = (
            float(training.learning_rate(Run(8, 0.3, 40, decay=decay), jnp.int32(step)))
            for decay in (False, True)
        )
        assert decayed == pytest.approx(float(cosine(step)), abs=1e-7)
        assert constant == pytest.approx(0.3)


def tuned(rate, loss, diverged=0):
    return {"rate": rate, "loss": loss, "diverged": diverged}


@pytest.mark.parametrize(
    ("records", "best", "high"),
    [
        ([tuned(1, 0.3), tuned(4, 0.2), tuned(16, 1.0)], 4, 16),
        ([tuned(16, 1.0), tuned(4, 0.2), tuned(1, 0.3)], 4, 16),
        ([tuned(1, 0.3), tuned(4, 0.2), tuned(16, 1.2)], 4, 4),  # ln(10)/2 = 1.15
        ([tuned(1, 0.3), tuned(4, 0.2), tuned(16, 0.1, 2)], 4, 4),
        ([tuned(1, 0.3), tuned(4, None), tuned(16, 0.4)], 1, 1),
        ([tuned(1, 0.3), tuned(4, 0.2)], 4, 4),
        ([tuned(1, None, 2), tuned(4, 0.2, 1)], 1, 1),
    ],
)
def test_low_best_and_high_rate(records, best, high):
    assert training.choose_rates(records, 10) == Rates(best, best / 10, high)


def test_every_training_is_of_the_grid_or_the_control():
    found = training.trainings(QUICK, 16, Rates(0.1, 0.01, 0.4))
    assert len(found) == len(set(found)) == 3 * (2 * 4 + 1)
    assert {s.rate for s in found if s.level == "low"} == {0.01}
    decayed = [s for s in found if s.decay]
    assert {(s.step, s.rate) for s in decayed} == {(640, 0.4)} and len(decayed) == 3
    assert figures.main_batch_size(PRESETS["standard"]) == 32


# --- verdicts on made-up records ---

CONFIG = dataclasses.replace(QUICK, momenta=(0.9, 0.99))
RATES = {16: Rates(0.25, 0.025, 1.0), 64: Rates(1.0, 0.1, 1.0)}


def judge(runs):
    return verdicts.judge(CONFIG, training.Records(runs, RATES, 10))


def made_up(ratio=2.0, gain=0.01, *, scatter=0.01, seeds=3, late=None, lost=None, other=4.0):
    """Records whose average 0.9 has this ratio of distances and this loss of accuracy."""

    def of(d):
        return [[d**2, d**2], [0.0, 0.0]]

    records = []
    grid = [*itertools.product(("low", "high"), CONFIG.snapshots, [False]), ("high", 640, True)]
    for size, (level, step, decay), seed in itertools.product((16, 64), grid, range(seeds)):
        off = 1 + scatter * (seed - 1)
        here = late if late is not None and step == 640 else ratio
        kinds = {ALGORITHM2: 0.1, MERGED: 0.1 / 1.5}
        for momentum, factor in ((0.9, here), (0.99, other * here)):
            kinds |= dict.fromkeys(statistics.averages(momentum), 0.1 * factor * off)
        accuracy = dict.fromkeys((TRUTH, ALGORITHM2, MERGED), 0.9)
        accuracy |= {average(0.9): 0.9 - gain * off, average(0.99): 0.5}
        records.append(
            {
                **dict(batch_size=size, level=level, step=step, decay=decay, seed=seed),
                "loss": 0.5 if (size, level, seed) != (16, "high", 2) else 1.2,
                "diverged": 2 if (size, level, step, seed) == lost else 0,
                "parts": {kind: of(d) for kind, d in kinds.items()},
                "accuracy": accuracy,
                "floor": {ALGORITHM2: of(0.05 if seed else 0.0)},
            }
        )
    return records


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), [REPRODUCED, REPRODUCED]),
        (dict(ratio=1.02), [INCONCLUSIVE, REPRODUCED]),
        (dict(ratio=0.9), [NOT_REPRODUCED, REPRODUCED]),
        (dict(gain=-0.01), [REPRODUCED, NOT_REPRODUCED]),
        (dict(gain=0.0), [REPRODUCED, INCONCLUSIVE]),
        (dict(ratio=1.5, scatter=0.5), [INCONCLUSIVE, INCONCLUSIVE]),
        (dict(seeds=1), [INCONCLUSIVE, INCONCLUSIVE]),
        (dict(ratio=2.0, late=0.5), [REPRODUCED, REPRODUCED]),  # three steps against one
        (dict(ratio=2.0, late=0.05), [NOT_REPRODUCED, REPRODUCED]),
        (dict(ratio=8.0, other=0.1), [NOT_REPRODUCED, REPRODUCED]),  # 0.99 is the better one
        (dict(lost=(64, "high", 640, 1)), [REPRODUCED, REPRODUCED]),
    ],
)
def test_verdicts(options, expected):
    assert [f.verdict for f in judge(made_up(**options))] == expected


def test_ratio_and_interval_are_those_of_the_logarithms():
    finding, _ = judge(made_up(2.0, late=0.5))
    logs = [math.log(2.0 * (1 + 0.01 * o)) * 3 / 4 for o in (-1, 0, 1)]
    logs = [x + math.log(0.5 * (1 + 0.01 * o)) / 4 for x, o in zip(logs, (-1, 0, 1), strict=True)]
    name = "average 0.9/Algorithm 2"
    assert finding.measured[name] == pytest.approx(math.exp(np.mean(logs)))
    half = stats.t.ppf(0.975, 2) * np.std(logs, ddof=1) / math.sqrt(3)
    expected = np.exp([np.mean(logs) - half, np.mean(logs) + half])
    np.testing.assert_allclose(finding.interval, expected)
    assert finding.measured[f"{name}, step 640"] == pytest.approx(0.5, rel=1e-3)
    assert finding.measured[f"{name}, low rate, step 10"] == pytest.approx(2.0, rel=1e-3)
    assert finding.measured["Algorithm 2/merged"] == pytest.approx(1.5)
    best = finding.measured["average/Algorithm 2, best momentum in each cell of step 640"]
    assert best == pytest.approx(0.5, rel=1e-3)
    # Four cells of step 640; the other momentum is at 4 · 0.5 there.
    assert "average 0.9 in 4 of 16 cells (batch 16 high rate, step 640" in finding.note
    assert "average 0.99 in 0 of 16 cells" in finding.note
    assert "Of 12 runs to step 640, 1 do not train" in finding.note
    assert "Best rate at an end of the grid: batch 64" in finding.note
    assert "no higher rate trains: batch 64" in finding.note
    assert finding.measured["floor, Algorithm 2, batch 16, low rate, step 640"] == pytest.approx(
        math.sqrt(2 / 3) * 0.05
    )


def test_a_run_that_diverged_takes_its_cell_from_every_seed():
    records = made_up(lost=(64, "high", 640, 1))
    cells, lost = verdicts.grid(records)
    assert lost == [(64, "high", 640)] and len(cells) == 15
    assert all([run["seed"] for run in runs] == [0, 1, 2] for runs in cells.values())
    for finding in judge(records):
        said = "non-finite steps: batch 64 high rate step 640; batch 64 rate decayed"
        assert said in finding.note
    everywhere = [{**record, "diverged": 1} for record in records]
    for finding in judge(everywhere):
        assert finding.verdict == INCONCLUSIVE and "in every cell" in finding.note
    records[0]["parts"][average(0.9)] = [[None, 0.1], [0.1, 0.1]]  # as the ledger keeps infinity
    assert len(verdicts.grid(records)[0]) == 14


def test_the_rival_has_its_best_momentum_in_hindsight():
    for records, best in ((made_up(), 0.9), (made_up(other=0.5), 0.99)):
        cells, _ = verdicts.grid(records)
        assert verdicts.best_momentum(cells, (0.99, 0.9)) == best


def test_the_floor_is_pooled_over_seeds_before_the_root():
    def runs(*squares):
        return [{"floor": {ALGORITHM2: [[x, 0.0], [0.0, 0.0]]}} for x in squares]

    found = verdicts.floor(runs(0.02, 0.06, 0.04))
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    expected = np.sqrt([0.02, max(0.0, 0.02 - half), 0.02 + half])
    np.testing.assert_allclose(found[:3], expected)
    assert verdicts.floor(runs(-0.02, -0.04)).mean == 0
    assert verdicts.floor(runs(0.02, -0.02, 0.06)).low == 0
    assert verdicts.floor(runs(0.5))[:3] == (0.5, 0.0, math.inf)


# --- what a smoke run leaves ---


def test_results_are_those_of_the_ledger(smoke_run):
    workdir = smoke_run("population_stats")
    records = smoke.ledger(workdir)
    tuning = [record for record in records if record["name"].startswith("tune")]
    assert {record["seed"] for record in tuning} == {2} and len(tuning) == 2
    assert all("accuracy" not in record for record in tuning)
    trained = [r for r in records if r["name"].startswith("train")]
    assert len(trained) == 2 * (2 * 2 + 1)
    trained = [record for record in trained if not record["decay"]]
    logs: dict[float, list] = {0.9: [[], []], 0.99: [[], []]}
    for record, (m, by_seed) in itertools.product(trained, logs.items()):
        a, b = (np.sum(record["parts"][k]) for k in (average(m), ALGORITHM2))
        by_seed[record["seed"]].append(np.log(a / b) / 2)
    means = {m: np.mean(by_seed, axis=1) for m, by_seed in logs.items()}
    best = min(means, key=lambda m: means[m].mean())
    claims = json.loads((workdir / "results.json").read_text())["claims"]
    ratio = claims[0]["measured"][f"{average(best)}/{ALGORITHM2}"]
    assert ratio == pytest.approx(np.exp(means[best].mean()))
    gain = [r["accuracy"][ALGORITHM2] - r["accuracy"][average(best)] for r in trained]
    assert claims[1]["measured"][f"{ALGORITHM2} − {average(best)}"] == pytest.approx(np.mean(gain))


def test_what_does_not_fit_is_refused(tmp_path):
    for flag, said in (
        ("--config.network=c4 P f9", "9 units"),
        ("--config.batch_sizes=(300,)", "at most 256, the training set"),
        ("--config.snapshots=(5, 7)", "snapshots=(5, 7)"),
        ("--config.tuning_steps=12", "tuning_steps=12"),
        ("--config.population_batches=3", "a multiple of population_batches=3"),
    ):
        ended = smoke.launch("population_stats", tmp_path / "run", flag)
        assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
        assert said in ended.err and not (tmp_path / "run").exists()
