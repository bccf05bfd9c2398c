"""Tests of experiments.covariate_shift: what is observed, verdicts, and the smoke run's ledger."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import smoke
from scipy import stats

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.training.loop import History, batch_at, run_steps
from bn_research.training.step import Batch, apply_fn_of, make_train_step
from experiments.covariate_shift import PRESETS, shifts, verdicts
from experiments.covariate_shift.training import Network, choose_arms, grids, make_model, programs
from experiments.covariate_shift.verdicts import OWN, PLAIN, SAME, judge_drift, judge_gradient

NETWORK = "f5 f4 f3"
CONFIG = dataclasses.replace(PRESETS["quick"], network="f5 f4 f10", momenta=(0.9,))


@pytest.fixture(scope="module")
def finished(smoke_run):
    return smoke_run("covariate_shift")


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((count, 2, 3, 1)).astype(np.float32)
    return Batch(jnp.asarray(image), jnp.asarray(rng.integers(0, 3, count), jnp.int32))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "BN"])
def measured(request):
    """A network after three steps of momentum SGD, what is measured of it, and its next step."""
    network = Network("sigmoid", request.param, 0.7, 0.9, 0.8, 1e-3)
    config = dataclasses.replace(CONFIG, network=NETWORK)
    create = programs(network, config, (1, 2, 3, 1)).create
    state = create(jax.random.key(3), network.traced)
    model = make_model(network, NETWORK)
    step = make_train_step(apply_fn_of(model), optax.sgd(0.7, momentum=0.9))
    data = shifts.Data(examples(40), examples(31, 1).image, examples(16, 2))

    @jax.jit
    def advance(state):
        state, metrics = run_steps(step, state, data.train, batch_size=8, num_steps=3)
        seen = shifts.observe(model, step, state, data, 8)
        after, following = run_steps(step, state, data.train, batch_size=8, num_steps=1)
        batches = [batch_at(state, data.train, 8, ahead=n) for n in (0, 1)]
        return state, seen, batches, after, following.loss[0]

    return request.param, data, advance(state)


def weights(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(params))


def forward(params, image, stats=None):
    """Logits in float64, with what the backward pass needs; BN by stats or by the batch's own."""
    x, kept = np.asarray(image, np.float64).reshape(len(image), -1), []
    for layer in (1, 2, 3):
        dense = params[f"dense{layer}"]
        h = x @ dense["kernel"] + dense["bias"]
        normalized = root = None
        if f"batch_norm{layer}" in params:
            bn = params[f"batch_norm{layer}"]
            mean, var = stats[layer] if stats else (h.mean(axis=0), h.var(axis=0))
            root = np.sqrt(var + 1e-3)
            normalized = (h - mean) / root
            h = normalized * bn["scale"] + bn["bias"]
        kept.append((x, normalized, root, h))
        x = 1 / (1 + np.exp(-h)) if layer < 3 else h
    return x, kept


def gradients(params, batch):
    """Backpropagation by hand, float64: one vector a layer."""
    logits, kept = forward(params, batch.image)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    delta = (p - np.eye(3)[np.asarray(batch.label)]) / len(logits)
    found = {}
    for layer in (3, 2, 1):
        x, normalized, root, h = kept[layer - 1]
        if layer < 3:
            s = 1 / (1 + np.exp(-h))
            delta = delta * s * (1 - s)
        parts = []
        if normalized is not None:
            scale = params[f"batch_norm{layer}"]["scale"]
            parts = [(delta * normalized).sum(axis=0), delta.sum(axis=0)]
            d = delta * scale
            delta = (d - d.mean(axis=0) - normalized * (d * normalized).mean(axis=0)) / root
        parts += [(x.T @ delta).ravel(), delta.sum(axis=0)]
        found[layer] = np.concatenate(parts)
        delta = delta @ params[f"dense{layer}"]["kernel"].T
    return found


def test_gradient_shift_is_that_of_the_step_taken_next(measured):
    _, _, (state, seen, (batch, other), after, _) = measured
    old, new = weights(state.params), weights(after.params)
    g, noisy = gradients(old, batch), gradients(old, other)
    for layer in (1, 2, 3):
        mixed = {name: (new if int(name[-1]) < layer else old)[name] for name in old}
        shifted = gradients(mixed, batch)[layer]
        norm = np.linalg.norm(g[layer])
        apart = np.linalg.norm(g[layer] - shifted) / norm
        assert seen.relative[layer - 1] == pytest.approx(apart, rel=1e-3, abs=1e-6)
        cosine = g[layer] @ shifted / norm / np.linalg.norm(shifted)
        assert seen.cosine[layer - 1] == pytest.approx(cosine, abs=1e-5)
        noise = np.linalg.norm(g[layer] - noisy[layer]) / norm
        assert seen.noise[layer - 1] == pytest.approx(noise, rel=1e-3)
    assert seen.relative[0] == 0 and seen.relative[1] > 1e-3


def test_the_next_batch_is_the_one_that_training_takes(measured):
    _, data, (state, _, (batch, other), _, loss) = measured
    logits, _ = forward(weights(state.params), batch.image)
    losses = -np.log(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    expected = losses[np.arange(8), np.asarray(batch.label)].mean()
    assert loss == pytest.approx(expected, rel=1e-5)
    rows = {bytes(np.asarray(image)) for b in (batch, other) for image in b.image}
    assert len(rows) == 16 and rows <= {bytes(np.asarray(image)) for image in data.train.image}


def test_percentiles_are_of_the_input_of_the_last_sigmoid(measured):
    batch_norm, data, (state, seen, *_) = measured
    _, kept = forward(weights(state.params), data.measuring)
    inputs = kept[1][3]
    for index, part in enumerate((inputs, inputs[:15], inputs[15:30])):
        expected = np.percentile(part, (15, 50, 85), axis=0)
        np.testing.assert_allclose(seen.percentiles[index], expected, rtol=1e-4, atol=1e-5)
    if batch_norm:
        assert not np.allclose(inputs.mean(axis=0), 0, atol=1e-3)  # after β, which has moved


def test_accuracy_is_by_the_running_statistics(measured):
    batch_norm, data, (state, seen, *_) = measured
    running = None
    if batch_norm:
        running = {
            layer: [np.asarray(state.batch_stats[f"batch_norm{layer}"][k]) for k in ("mean", "var")]
            for layer in (1, 2)
        }
    logits, _ = forward(weights(state.params), data.evaluation.image, running)
    expected = np.mean(logits.argmax(axis=1) == np.asarray(data.evaluation.label))
    assert seen.accuracy == pytest.approx(expected)


def history(percentiles, losses_per_dispatch=2):
    """Of a run whose whole set and halves have these percentiles, [times, levels, units]."""
    times = len(percentiles)
    zeros = np.zeros((times, 3), np.float32)
    parts = np.stack([percentiles, percentiles, percentiles + 0.25], axis=1)
    seen = shifts.Observed(parts, zeros[:, 0], zeros, zeros, zeros)
    return History(np.arange(times * losses_per_dispatch, dtype=np.float32), 0, seen)


def test_summary_by_hand():
    """Three units: one moves by half a width a time, one rests, one has no width at last."""
    base = np.array([-1.0, 0.0, 1.0])
    moving = base + np.array([0.0, 1.0, 2.0])[:, None]
    resting = np.broadcast_to(base, (3, 3))
    dying = base * np.array([1.0, 1.0, 0.0])[:, None]
    found = shifts.summary(history(np.stack([moving, resting, dying], axis=-1)), 2)
    assert found["constant"] == 1
    expected = dict(path=[1.0, 0.0], movement=[0.25] * 2, raw_movement=[0.5] * 2, net=0.5)
    expected |= dict(floor=[0.125] * 3, step=[0, 2, 4], loss=[0.5, 2.5, 4.5])
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value)
    np.testing.assert_allclose(found["fan"][2], np.percentile([2.0, 0.0, 0.0], (10, 50, 90)))


def test_the_typical_unit_has_the_median_drift():
    speeds = np.array([3.0, 0.5, 1.0, 2.0, 0.0])
    base = np.array([-1.0, 0.0, 1.0])
    p = base[:, None] + np.arange(4.0)[:, None, None] * speeds
    found = shifts.summary(history(p), 2)
    np.testing.assert_allclose(found["typical"], p[:, :, 2])


def test_a_run_without_numbers_has_no_drift():
    for p in (np.full((3, 3, 2), np.nan), np.zeros((3, 3, 2)), np.zeros((1, 3, 2))):
        assert shifts.summary(history(p), 2)["path"] is None


def test_arms_have_the_settings_of_the_lowest_sound_loss():
    """Plain its own, BN once the same and once its own; a run that diverged is not chosen."""
    grid = grids(CONFIG)["sigmoid"]
    half = len(grid) // 2
    assert [network.batch_norm for network in grid] == [False] * half + [True] * half
    losses = {0: (0.1, 1), 3: (0.3, 0), 5: (None, 2), half + 1: (0.2, 0), half + 3: (0.4, 0)}
    records = []
    for i, network in enumerate(grid):
        loss, diverged = losses.get(i, (0.9, 0))
        records.append({**network.as_record(), "seed": 3, "loss": loss, "diverged": diverged})
    assert choose_arms(records) == {PLAIN: grid[3], SAME: grid[half + 3], OWN: grid[half + 1]}


# --- verdicts on made-up records ---


def runs(*, drift=0.3, gain=0.02, shift=1.5, scatter=0.01, seeds=3, lost=(), plateau=2):
    """Records of all arms; BN has these ratios to the plain network."""

    def record(arm, seed):
        is_plain, factor = arm == PLAIN, 1 + scatter * (seed - 1)
        movement = np.full(4, 2.0 * (1.0 if is_plain else drift * factor))
        relative = np.tile([0.0, 0.1, 0.3], (5, 1)) * (1.0 if is_plain else shift * factor)
        accuracy = 0.9 + (0.0 if is_plain else gain + scatter / 2 * (seed - 1))
        found = Network("sigmoid", not is_plain, 0.3, 0.9, 0.1, 1e-5).as_record()
        found |= dict(seed=seed, accuracy=accuracy, relative=relative, cosine=1 - relative)
        found["noise"] = np.tile([1.0, 1.2, 1.4], (5, 1))
        found["loss"] = [2.3 if i < plateau else 0.5 for i in range(5)]
        if (arm, seed) in lost:
            return found | {"path": None, "diverged": 2, "step": [0, 100]}
        found |= dict(diverged=0, step=[0, 100, 200, 300, 400], path=[1.0, 2.0], net=1.0)
        return found | dict(movement=movement, raw_movement=movement, floor=[0.1] * 5, constant=0)

    return {"sigmoid": {arm: [record(arm, s) for s in range(seeds)] for arm in (PLAIN, SAME, OWN)}}


def config(made_up):
    return dataclasses.replace(CONFIG, seeds=made_up.get("seeds", 3))


@pytest.mark.parametrize(
    ("made_up", "verdict"),
    [
        (dict(), REPRODUCED),
        (dict(drift=0.48), REPRODUCED),
        (dict(drift=0.49), INCONCLUSIVE),
        (dict(drift=0.7), INCONCLUSIVE),
        (dict(drift=0.99), NOT_REPRODUCED),
        (dict(drift=1.5), NOT_REPRODUCED),
        (dict(gain=0.02, scatter=0.02), INCONCLUSIVE),
        (dict(gain=-0.2), NOT_REPRODUCED),
        (dict(gain=0.0), INCONCLUSIVE),
        (dict(seeds=1), INCONCLUSIVE),
        (dict(drift=1.5, seeds=1), INCONCLUSIVE),
        (dict(lost={(SAME, 1)}), INCONCLUSIVE),
        (dict(drift=1.5, lost={(PLAIN, 0)}), INCONCLUSIVE),
        (dict(lost={(OWN, 0)}), REPRODUCED),
    ],
)
def test_verdict_of_the_drift(made_up, verdict):
    finding = judge_drift(config(made_up), runs(**made_up))
    assert finding.verdict == verdict
    told = "1 had steps that were not finite" in finding.note
    assert told if made_up.get("lost") else "not finite" not in finding.note


@pytest.mark.parametrize(
    ("made_up", "verdict"),
    [
        (dict(), REPRODUCED),
        (dict(shift=1.03), REPRODUCED),
        (dict(shift=1.0), INCONCLUSIVE),
        (dict(shift=0.9), INCONCLUSIVE),
        (dict(shift=0.79), INCONCLUSIVE),
        (dict(shift=0.77), NOT_REPRODUCED),
        (dict(seeds=1), INCONCLUSIVE),
        (dict(shift=0.1, lost={(PLAIN, 2)}), INCONCLUSIVE),
    ],
)
def test_verdict_of_the_gradient_shift(made_up, verdict):
    assert judge_gradient(config(made_up), runs(**made_up)).verdict == verdict


def test_the_ratio_has_student_s_interval_of_logarithms():
    made_up = runs(scatter=0.1)
    finding = judge_drift(CONFIG, made_up)
    logs = np.log(0.3 * np.array([0.9, 1.0, 1.1]))
    half = stats.t.ppf(0.975, 2) * np.std(logs, ddof=1) / math.sqrt(3)
    expected = np.exp([logs.mean() - half, logs.mean() + half])
    np.testing.assert_allclose(finding.interval, expected, rtol=1e-12)
    assert finding.measured["drift, BN/plain"] == pytest.approx(math.exp(logs.mean()))
    assert finding.measured["drift, BN/plain, low"] == pytest.approx(expected[0])
    assert finding.measured[f"drift, {PLAIN}"] == pytest.approx(8.0)
    gradient = judge_gradient(CONFIG, made_up).measured
    assert gradient[f"gradient shift, {PLAIN}"] == pytest.approx(0.2)  # of layers 2 and 3
    assert gradient[f"cosine, layer 3, {PLAIN}"] == pytest.approx(0.7)


def test_after_the_plateau_counts_from_the_plain_network_s_end_of_it():
    made_up = runs()
    for record in made_up["sigmoid"][PLAIN]:
        record["movement"] = [100.0, 100.0, 100.0, 2.0]  # of which the last is after step 300
    measured = judge_drift(CONFIG, made_up).measured
    assert measured["drift after the plateau, BN/plain"] == pytest.approx(0.3, rel=1e-3)
    assert measured["drift, BN/plain"] < 0.01
    assert measured["plain network off its plateau, step"] == 300
    stuck = judge_drift(CONFIG, runs(plateau=5)).measured
    assert math.isnan(stuck["drift after the plateau, BN/plain"])


def test_end_of_the_plateau():
    def end(*losses):
        return verdicts.plateau_end({"loss": losses, "step": range(len(losses))}, 10)

    half = math.log(10) / 2
    assert end(2.3, 2.0, half - 0.01, 0.5, 0.4) == 3
    assert end(0.5, 0.4) == 1
    assert end(2.3, 0.5) is None and end(2.3, half + 0.01, None) is None


def test_pairs_without_a_number_are_left_out_and_counted():
    assert verdicts.pair_ratio([1.0, math.nan, 4.0], [2.0, 1.0, 8.0]).pairs == 2
    assert verdicts.pair_ratio([math.inf, 0.0], [1.0, 1.0]) is None


def test_settings_at_an_end_of_the_grid_are_named():
    for rates, at_an_end in (((0.3, 1.0), True), ((0.1, 0.3, 1.0), False)):
        note = judge_drift(dataclasses.replace(CONFIG, learning_rates=rates), runs()).note
        assert ("At an end of its grid" in note) == at_an_end


def test_settings_are_tuned_on_a_seed_apart_and_without_the_test_set(finished):
    tuned = [record for record in smoke.ledger(finished) if record["name"].startswith("tune/")]
    assert len(tuned) == 16 and {record["seed"] for record in tuned} == {2}
    assert all("accuracy" not in record for record in tuned)


def test_results_are_those_of_the_ledger(finished):
    results = json.loads((finished / "results.json").read_text())
    drift, gradient = (claim["measured"] for claim in results["claims"])
    trained = [r for r in smoke.ledger(finished) if r["name"].startswith("train/")]
    trained = [r for r in trained if r["init_std"] == CONFIG.init_stds[1]]  # the claims'
    plain = [r for r in trained if not r["batch_norm"]]
    keys = ("learning_rate", "momentum", "init_std")
    same = [r for r in trained if r["batch_norm"] and all(r[k] == plain[0][k] for k in keys)]
    assert [r["seed"] for r in plain] == [r["seed"] for r in same] == [0, 1]
    assert plain[0]["step"] == [0, 20, 40] and 0 < plain[0]["accuracy"] < 1
    paths = [[np.mean(r["path"]) for r in rs] for rs in (same, plain)]
    shifts = [[np.mean(np.array(r["relative"])[:, 1:]) for r in rs] for rs in (same, plain)]
    for measured, what, of in ((drift, "drift", paths), (gradient, "gradient shift", shifts)):
        expected = math.exp(np.mean(np.log(of[0]) - np.log(of[1])))
        assert measured[f"{what}, BN/plain"] == pytest.approx(expected, rel=1e-6)


def test_presets_are_the_paper_s():
    for preset in ("quick", "standard"):
        config = PRESETS[preset]
        assert (config.network, config.activations[0]) == ("f100 f100 f100 f10", "sigmoid")
        assert config.batch_size == 60
    standard = PRESETS["standard"]
    assert standard.seeds >= 5 and standard.num_steps == 50_000


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("network=c4 f10", "dense layers only"),
        ("network=f10", "needs a hidden layer"),
        ("network=f8 f9", "end it in f10"),
        ("batch_size=450", "898"),
        ("num_steps=20", "2 of them or more"),
        ("other_steps=50", "other_steps=50"),
        ("tuning_steps=30", "a multiple of steps_per_dispatch=20"),
        ("measuring_images=900", "at most 899"),
        ("evaluation_images=900", "at most 899"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, flag, said):
    ended = smoke.launch("covariate_shift", tmp_path / "run", f"--config.{flag}")
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1) and said in ended.err
    assert not (tmp_path / "run").exists()
