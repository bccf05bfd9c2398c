"""Tests of experiments.training_steps: ladder, batches, verdicts, and the smoke run's ledger."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke

from bn_research.claims.bounded import Bounded
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.runner import Runner
from bn_research.lab.settings import Training, train
from bn_research.lab.workdir import Ledger
from bn_research.layers.linen import BatchNorm
from bn_research.models.inception import Inception
from bn_research.training.compiler import compiler_options
from experiments.training_steps import PRESETS, networks, training, verdicts
from experiments.training_steps.figures import draw
from experiments.training_steps.networks import LADDER, PUBLISHED, TUNED, TUNED_BN, plan
from experiments.training_steps.verdicts import Records, against, best, judge

PLAIN, BASELINE, X5, X30, SIGMOID = LADDER
CONFIG = PRESETS["smoke"]
STANDARD = PRESETS["standard"]


@pytest.fixture(scope="module")
def finished(smoke_run):
    return smoke_run("training_steps")


@pytest.fixture(scope="module")
def images():
    return training.prepare(CONFIG)


def differing(a, b):
    return {name for name, value in vars(a).items() if value != getattr(b, name)}


def test_the_ladder_is_the_papers():
    plain, baseline, x5, x30, sigmoid = networks.ladder(STANDARD).values()
    assert differing(plain, baseline) == {"batch_norm"}
    assert x5 == baseline.replace(
        rate=5 * plain.rate,
        dropout=0.0,
        l2=plain.l2 / 5,
        decay=6 * plain.decay,
        local_response_norm=False,
        shuffled=True,
        distortion=STANDARD.weaker_distortion,
    )
    assert differing(x5, x30) == {"rate"} and x30.rate == 30 * plain.rate
    assert differing(x5, sigmoid) == {"activation"}


def test_each_switch_changes_one_thing_and_all_of_them_make_x5():
    ladder, switched = networks.ladder(STANDARD), networks.switched(STANDARD)
    changed = [differing(ladder[BASELINE], setting) for setting in switched.values()]
    assert all(len(fields) == 1 for fields in changed)
    assert set.union(*changed) == differing(ladder[BASELINE], ladder[X5])
    for fields, setting in zip(changed, switched.values(), strict=True):
        (field,) = fields
        assert getattr(setting, field) == getattr(ladder[X5], field)
    assert len(plan(STANDARD)) == 5 + 7 and len(plan(CONFIG)) == 5


def test_few_programs_serve_all():
    """What is traced compiles once: Inception compiles for seconds."""
    assert len(set(map(jax.tree.structure, plan(STANDARD).values()))) == 6
    assert len(set(map(jax.tree.structure, plan(CONFIG).values()))) == 4


def test_published_ratios():
    """Of the paper's abstract and section 4.2: 2.3, 14.8 and 11.5; 14 times fewer."""
    found = [PUBLISHED[PLAIN] / PUBLISHED[name] for name in (BASELINE, X5, X30, SIGMOID)]
    np.testing.assert_allclose(found, [2.33, 14.8, 11.5, 0], rtol=5e-3)


def test_rate_falls_exponentially():
    """After all steps to final_rate of its first, and with rate_decay to its sixth power."""
    config = dataclasses.replace(STANDARD, num_steps=2000, base_rate=0.02, final_rate=0.1)
    steps = np.array([0, 500, 2000])
    for setting, power in ((networks.inception(config), 1), (networks.ladder(config)[X5], 6)):
        found = [float(networks.learning_rate(setting.traced, step)) for step in steps]
        expected = setting.rate * 0.1 ** (power * steps / 2000)
        np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_optimizer_by_hand():
    """Step t: v ← 0.9·v + g + λθ on weights, without λθ on scale and bias; θ ← θ − η_t·v."""
    setting = networks.inception(CONFIG).replace(rate=0.5, decay=0.3, l2=0.2)
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(3) for name in ("kernel", "scale", "bias")}
    grads = [{name: rng.standard_normal(3) for name in params} for _ in range(3)]
    optimizer = networks.optimizer(setting.traced)
    found = jax.tree.map(jnp.float32, params)
    state = optimizer.init(found)
    velocity = {name: np.zeros(3) for name in params}
    for t, grad in enumerate(grads):
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grad), state, found)
        found = jax.tree.map(jnp.add, found, updates)
        for name in params:
            decay = 0.2 * params[name] if name == "kernel" else 0
            velocity[name] = 0.9 * velocity[name] + grad[name] + decay
            params[name] = params[name] - 0.5 * math.exp(-0.3 * t) * velocity[name]
    for name in params:
        np.testing.assert_allclose(found[name], params[name], rtol=1e-5, atol=1e-6)


def test_a_setting_is_the_network_it_says(images):
    """Distortion and dropout in training alone, each of them off when it is; against Inception."""
    task, data = training.task_of(CONFIG, images), training.place(images, CONFIG.eval_examples)
    ladder = networks.ladder(CONFIG)
    x5 = ladder[X5].replace(distortion=0.0)
    image, keys = images.train.image[:6], jax.random.split(jax.random.key(1), (2, 6))
    standardized = (image - np.mean(images.train.image)) / np.std(images.train.image)

    norm = functools.partial(BatchNorm, momentum=0.9, epsilon=1e-3)
    reference = Inception(
        10, norm, width=CONFIG.width, stem="small", modules=("3c",), implementation="xla"
    )
    state = training.programs(x5, task).create(jax.random.key(0), x5.traced)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    # Else a bias of zero at every BN lets a wrong one pass.
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)

    compiled = functools.partial(jax.jit, compiler_options=compiler_options(0))

    @compiled
    def expected():
        trained = reference.apply(variables, standardized, train=True, mutable=["batch_stats"])
        return trained[0], reference.apply(variables, standardized, train=False)

    @functools.partial(compiled, static_argnums=0)
    def logits(train, network, keys):
        apply = training.apply_fn(network, task, data)
        return apply(variables, image, train=train, keys=keys)[0]

    def of(network):
        return [logits(True, network.traced, key) for key in keys]

    first, second = of(x5)
    in_training, in_evaluation = expected()
    np.testing.assert_allclose(first, in_training, atol=2e-4)
    np.testing.assert_array_equal(first, second)  # no use of the keys
    for changed in (x5.replace(distortion=0.5), x5.replace(dropout=0.4)):
        first, second = of(changed)
        assert np.abs(first - second).max() > 0.01
    # The test set is seen as it is.
    seen = logits(False, x5.replace(distortion=0.5).traced, None)
    np.testing.assert_allclose(seen, in_evaluation, atol=2e-4)


def test_each_switch_is_one_of_the_model():
    task = networks.Task(STANDARD, 10, (8, 8, 1))
    models = {name: networks.make_model(n, task) for name, n in plan(STANDARD).items()}
    assert [name for name, model in models.items() if model.norm is None] == [PLAIN]
    without_lrn = {name for name, model in models.items() if not model.local_response_norm}
    assert without_lrn == {X5, X30, SIGMOID, "local_response_norm"}
    without_dropout = {name for name, model in models.items() if not model.dropout}
    assert without_dropout == {X5, X30, SIGMOID, "dropout"}
    assert models[SIGMOID].activation is jax.nn.sigmoid and models[X5].activation is jax.nn.relu


def test_accuracy_of_a_dispatch_is_that_of_its_last_state(finished, images, tmp_path):
    """The programs are those of the smoke run; the reference sees the test set at once."""
    task, network = training.task_of(CONFIG, images), networks.ladder(CONFIG)[X5]
    states = []

    def record(t, state, history):
        states.append(state)
        return training.record(CONFIG, t, state, history)

    with Runner(tmp_path, Ledger(tmp_path / "m"), total_steps=20, strategy="devices") as runner:
        records = train(
            runner,
            [Training(network, seed, CONFIG.num_steps) for seed in (0, 1)],
            lambda network: training.programs(network, task),
            training.place(images, CONFIG.eval_examples),
            record=record,
        )
    kept = {record["name"]: record for record in smoke.ledger(finished)}
    assert records[1]["accuracy"] == kept[f"{network.name} seed=1"]["accuracy"]
    assert records[0]["steps"] == [5, 10, 15, 20] and len(records[0]["loss"]) == 4
    image, label = images.test.image[:50], np.asarray(images.test.label[:50])
    image = (image - np.mean(images.train.image)) / np.std(images.train.image)
    for state, record in zip(states, records, strict=True):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = networks.make_model(network, task).apply(variables, image, train=False)
        accuracy = float(np.mean(np.argmax(logits, axis=-1) == label))
        assert record["accuracy"][-1] == pytest.approx(accuracy, abs=1e-6)


def test_evaluation_batches_hold_every_example_once(images):
    for count in (1, 50, 250, 127, 254):
        data = training.place(images, count)
        batches, size = data.test.label.shape
        assert batches * size == count and size <= 125
        assert np.array_equal(data.test.label.ravel(), images.test.label[:count])


# --- verdicts, on made-up records ---


def record(reaches, high=0.9, last=None, rate=0.01, diverged=0):
    """Accuracy rises to `high` at the step `reaches` (None: never), of 100, seen every 10."""
    steps = list(range(10, 101, 10))
    accuracy = [high if reaches is not None and step >= reaches else 0.5 for step in steps]
    accuracy[-1] = accuracy[-1] if last is None else last
    return dict(steps=steps, accuracy=accuracy, loss=[1.0] * 10, rate=rate, diverged=diverged)


def with_ends(records, ends):
    records[X30] = [record(10, last=last) for last in ends]
    return records


def made_up(**reaches):
    """Records of three seeds; by default BN needs 2.3, 10 and 10 times fewer steps."""
    given = {PLAIN: (100, 100, 90), TUNED: (60, 60, 50), TUNED_BN: (30, 30, 20)}
    given |= {BASELINE: (40,) * 3, X5: (10,) * 3, X30: (10,) * 3, SIGMOID: (None,) * 3}
    given |= {{"tuned": TUNED, "same": BASELINE, "x5": X5}[k]: v for k, v in reaches.items()}
    found = {name: [record(step) for step in steps] for name, steps in given.items()}
    return with_ends(found, (0.95, 0.951, 0.952))


SECONDS = {PLAIN: 0.01, BASELINE: 0.02, X5: 0.015}
MADE_UP = dataclasses.replace(CONFIG, seeds=3, learning_rates=(0.001, 0.01, 0.1))


def judged(records, config=MADE_UP, classes=10):
    return judge(config, Records(records, SECONDS, classes))


def verdict_of(records, index, classes=10):
    return judged(records, classes=classes)[index].verdict


def test_steps_to_a_target():
    assert verdicts.steps_to(record(40), 0.9) == Bounded(40, 40)
    assert verdicts.steps_to(record(None), 0.9) == Bounded(100, math.inf)
    lost = {"steps": [10, 20], "accuracy": [0.5, None], "diverged": 2}
    assert verdicts.steps_to(lost, 0.6) == Bounded(20, math.inf) and best(lost) == 0.5


def test_ratios_by_hand():
    records = made_up()
    found = against(records[PLAIN], records[BASELINE])
    assert found.mean.low == pytest.approx((2.5 * 2.5 * 2.25) ** (1 / 3)) and found.censored == 0
    # The target is each seed's own: plain's best of 0.9, 0.8 and 0.6.
    plain = [record(50, high) for high in (0.9, 0.8, 0.6)]
    others = [record(10, 0.8), record(10, 0.8), record(10, 0.8)]
    found = against(plain, others)
    assert found.censored == 1 and found.low == 0
    # Two seeds 5 times faster, one slower than half: plain's 50 over more than 100.
    assert found.mean.high == pytest.approx((5 * 5 * 0.5) ** (1 / 3))
    near = against(plain, others, 0.8)  # 0.72, 0.64, and 0.48, which plain has from the start
    assert near.mean.low == near.mean.high == pytest.approx((5 * 5 * 1) ** (1 / 3))


@pytest.mark.parametrize(
    ("claim", "reaches", "verdict"),
    [
        (0, {}, REPRODUCED),
        (0, dict(same=(80, 80, 70)), INCONCLUSIVE),  # 1.25 times: neither
        (0, dict(same=(40, 90, 90)), NOT_REPRODUCED),  # the interval includes 1
        (0, dict(same=(100, 100, 90)), NOT_REPRODUCED),
        (0, dict(same=(None, None, None)), NOT_REPRODUCED),
        (0, dict(same=(10, 10, None)), NOT_REPRODUCED),  # nothing bounds it from below
        (1, {}, REPRODUCED),
        (1, dict(x5=(40, 40, 40)), INCONCLUSIVE),  # 2.4 times
        (1, dict(tuned=(10, 20, 10)), INCONCLUSIVE),  # tuned plain may be as fast
        (1, dict(tuned=(10, 10, 10)), NOT_REPRODUCED),
        (1, dict(x5=(100, 100, 90)), NOT_REPRODUCED),
        (1, dict(x5=(10, 10, None)), INCONCLUSIVE),
        (1, dict(x5=(None, None, None)), NOT_REPRODUCED),
    ],
)
def test_verdict_by_steps(claim, reaches, verdict):
    assert verdict_of(made_up(**reaches), claim) == verdict


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((0.95, 0.951, 0.949), REPRODUCED),
        ((0.95, 0.9, 0.88), INCONCLUSIVE),
        ((0.85, 0.851, 0.849), NOT_REPRODUCED),  # as fast, but ends lower
    ],
)
def test_verdict_of_thirty_times_the_rate(ends, verdict):
    assert verdict_of(with_ends(made_up(), ends), 2) == verdict


def test_thirty_times_the_rate_must_be_faster_too():
    records = made_up()
    records[X30] = [record(100, last=0.95 + 0.001 * seed) for seed in range(3)]
    records[TUNED] = [record(100) for _ in range(3)]
    assert verdict_of(records, 2) == NOT_REPRODUCED  # as many steps as tuned plain
    assert verdicts.gain(records[X30], records[X5]).low > 0


def test_one_seed_decides_nothing():
    records = {name: rows[:1] for name, rows in made_up().items()}
    found = judged(records, dataclasses.replace(MADE_UP, seeds=1))
    assert {finding.verdict for finding in found} == {INCONCLUSIVE}


def test_a_plain_network_that_has_not_learned_decides_nothing():
    """0.9 is less than 3 times chance of 2 classes."""
    assert {verdict_of(made_up(), index, classes=2) for index in range(3)} == {INCONCLUSIVE}


def test_notes_tell_of_bounds_lost_runs_and_the_end_of_the_grid():
    records = made_up(x5=(10, None, 10))
    records[X30][0]["diverged"] = 2
    records[TUNED][0]["rate"] = 0.1
    same, tuned, _ = judged(records)
    assert "never reached" not in same.note and "Of 3 seeds 1 never reached" in tuned.note
    assert "1 of BN-x30" in same.note and "an end of the grid" in same.note
    assert "diverged" not in judged(made_up())[0].note


def test_what_is_measured():
    same, tuned, x30 = (f.measured for f in judged(made_up()))
    both = same["steps, both at their own best rate"]
    assert both == pytest.approx((2 * 2 * 2.5) ** (1 / 3))
    steps = "plain at base rate over BN-x5"
    assert tuned[f"steps, {steps}"] == pytest.approx(900 ** (1 / 3))
    assert tuned[f"wall-clock time, {steps}"] == pytest.approx(900 ** (1 / 3) / 1.5)
    assert tuned[f"steps, {steps}, low"] < 900 ** (1 / 3) < tuned[f"steps, {steps}, high"]
    assert same["ms per step, BN-Baseline"] == 20
    assert x30["final accuracy, BN-x30 − BN-x5"] == pytest.approx(0.051)
    assert tuned["best accuracy, BN-x5-Sigmoid"] == 0.5


def test_contributions_are_against_bn_baseline_to_plains_best():
    records = made_up()
    records["dropout"] = [record(20), record(20), record(20)]
    records["l2"] = [record(None)] * 3
    found = verdicts.contributions(MADE_UP, records)
    assert list(found) == ["dropout", "l2"]
    assert found["dropout"][0].mean.low == pytest.approx(2)
    assert found["l2"][0].mean.high == pytest.approx(0.4)
    assert found["l2"][1].mean == pytest.approx(-0.4)
    measured = judged(records)[1].measured
    assert measured["steps, BN-Baseline over l2 alone"] == pytest.approx(0.4)


def test_figure_of_the_switches(tmp_path):
    records = made_up() | {name: [record(30)] * 3 for name in networks.switched(MADE_UP)}
    records["l2"] = [record(None)] * 3
    records[X5] = [{**r, "steps": r["steps"][:2], "accuracy": [0.5, None]} for r in records[X5]]
    config = dataclasses.replace(MADE_UP, num_steps=100, steps_per_dispatch=10)
    figures = draw(config, Records(records, SECONDS, 10), tmp_path)
    assert [figure.path.stem for figure in figures] == ["ratios", "accuracy", "switches"]


def test_the_rate_of_the_lowest_sound_loss():
    def trial(rate, end, diverged=0):
        return {"rate": rate, "loss": [5.0] * 9 + [end], "diverged": diverged}

    trials = [trial(0.1, 0.5), trial(0.2, 0.4), trial(0.4, 0.1, diverged=1), trial(0.8, None)]
    assert training.choose_rate(trials) == 0.2
    assert training.choose_rate(trials[2:]) == 0.4


def test_what_is_trained(finished):
    seconds, *runs = smoke.ledger(finished)
    assert set(seconds) == {"name", PLAIN, BASELINE, X5}
    assert all(0 < seconds[name] < 10 for name in (PLAIN, BASELINE, X5))
    tuned = [run for run in runs if run["seed"] == networks.TUNING_SEED]
    assert [run["rate"] for run in tuned] == pytest.approx(2 * CONFIG.learning_rates)
    assert [run["batch_norm"] for run in tuned] == [False, False, True, True]
    assert len(runs) - len(tuned) == 2 * 7


def test_results_are_those_of_the_ledger(finished):
    claims = json.loads((finished / "results.json").read_text())["claims"]
    by_name = {run["name"]: run for run in smoke.ledger(finished)}
    for arm, claim in zip((BASELINE, X5, X30), claims, strict=True):
        settings = networks.ladder(CONFIG)
        plain, other = (
            [by_name[f"{settings[name].name} seed={seed}"] for seed in (0, 1)]
            for name in (PLAIN, arm)
        )
        logs = []
        for p, o in zip(plain, other, strict=True):
            target = max(p["accuracy"])
            first = p["steps"][p["accuracy"].index(target)]
            reached = [s for s, a in zip(o["steps"], o["accuracy"], strict=True) if a >= target]
            logs.append(math.log(first / (reached[0] if reached else 20)))
        found = claim["measured"][f"steps, plain at base rate over {arm}"]
        assert found == pytest.approx(math.exp(np.mean(logs)))
        accuracy = np.mean([max(o["accuracy"]) for o in other])
        assert claim["measured"][f"best accuracy, {arm}"] == pytest.approx(accuracy)


def test_standard_holds_what_the_claims_need():
    assert STANDARD.seeds >= 5 and STANDARD.dataset == "fashion_mnist" and STANDARD.switches
    for name in ("quick", "standard"):
        config = PRESETS[name]
        ratios = np.diff(np.log10(sorted(config.learning_rates)))
        assert ratios.max() < 0.53  # steps of √10 or less
        # Several epochs, or shuffling could make no difference.
        assert config.num_steps * config.batch_size >= 5 * config.train_examples


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("image_size=2", "2×2"),
        ("train_examples=5000", "at most 898"),
        ("eval_examples=5000", "at most 899"),
        ("modules=('3a', '9z')", "9z"),
        ("batch_size=97", "train_examples=96"),
        ("steps_per_dispatch=3", "a multiple of steps_per_dispatch=3"),
        ("weaker_distortion=0.6", "distortion=0.5"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, flag, said):
    ended = smoke.launch("training_steps", tmp_path / "run", f"--config.{flag}")
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1) and said in ended.err
    assert not (tmp_path / "run").exists()
