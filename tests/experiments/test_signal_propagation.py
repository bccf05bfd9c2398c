"""Tests of experiments.signal_propagation: theory, measurements, verdicts, runs at smoke size."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.probes.mean_field import (
    LIMIT,
    growth,
    residual_gradient,
    residual_variances,
)
from experiments.signal_propagation import PRESETS, measurements, networks
from experiments.signal_propagation.measurements import (
    layer_jacobian,
    measure_ranks,
    measure_residual,
    middle,
    prepare,
    rate,
    soft_rank,
    squared_gradients,
    thresholded_rank,
)
from experiments.signal_propagation.verdicts import (
    judge_gradients,
    judge_ranks,
    judge_residual,
    judge_training,
)

CONFIG = PRESETS["smoke"]
QUICK = PRESETS["quick"]


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# --- what is measured, against float64 by hand ---


def numpy_norms(h, weights, top, slope, norm):
    """Squared gradient norms by layer: forward and backward written out."""
    inputs, factors = [], []
    for weight in weights:
        sigma = h.std(axis=0) if norm else 1.0
        y = (h - h.mean(axis=0)) / sigma if norm else h
        inputs.append((y, sigma))
        factors.append(np.where(y > 0, 1, slope))
        h = np.where(y > 0, y, slope * y) @ weight
    g, norms = top, []
    for (y, sigma), factor, weight in reversed(list(zip(inputs, factors, weights, strict=True))):
        g = factor * (g @ weight.T)
        if norm:
            g = (g - g.mean(axis=0) - y * np.mean(g * y, axis=0)) / sigma
        norms.append(np.sum(g**2))
    return norms[::-1]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_squared_gradients_of_a_small_network(slope, norm):
    h, weights, key = normal((5, 7)), normal((4, 7, 7), 1), jax.random.key(3)
    with jax.enable_x64(True):
        found = squared_gradients(key, jnp.array(h), jnp.array(weights), slope, 0.7, norm=norm)
        top = np.asarray(jax.random.normal(key, h.shape, jnp.float64))
    expected = numpy_norms(h, 0.7 * weights, top, slope, norm)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_a_wide_network_grows_as_theory_says(slope):
    """Two thirds of the scatter of a single rate at this width are below 2 %."""
    keys = jax.random.split(jax.random.key(0), 2)
    weights = jax.random.normal(keys[0], (24, 400, 400)) / 20
    h = jax.random.normal(keys[1], (16, 400))
    found = rate(np.asarray(squared_gradients(keys[0], h, weights, slope, norm=True)))
    expected = growth("linear" if slope else "relu", 16)
    assert found == pytest.approx(expected, rel=0.05)


def test_rate_is_that_of_the_middle():
    assert middle(8) == (2, 5) and middle(40) == (10, 29)
    squared = 3.0 ** np.arange(8, 0, -1)
    squared[[0, 1, 6, 7]] = 1.0, 5.0, 7.0, 1e6
    assert rate(squared) == pytest.approx(3.0)


@pytest.mark.parametrize("norm", [True, False])
def test_layer_jacobian_is_that_of_differences(norm):
    h, weights = normal((4, 3)), normal((2, 3, 3), 1)

    def layer(h, weight):
        y = (h - h.mean(axis=0)) / h.std(axis=0) if norm else h
        return np.maximum(y, 0) @ weight * (1 if norm else math.sqrt(2))

    below = layer(h, weights[0])
    columns = []
    for direction in np.eye(below.size):
        step = 1e-6 * direction.reshape(below.shape)
        difference = layer(below + step, weights[1]) - layer(below - step, weights[1])
        columns.append(difference.ravel() / 2e-6)
    with jax.enable_x64(True):
        found = layer_jacobian(jnp.array(h), jnp.array(weights), norm=norm)
    np.testing.assert_allclose(found, np.stack(columns, axis=1), atol=1e-7)


def test_residual_stream_follows_theory():
    config = dataclasses.replace(
        CONFIG, residual_width=64, residual_depth=5, residual_networks=200, residual_batch=32
    )
    record = measure_residual(config, 0)
    for name, theory in residual_variances(5).items():
        np.testing.assert_allclose(record[name], theory, rtol=0.1)
    within = 1 + np.arange(6) / LIMIT
    np.testing.assert_allclose(record["within"], within * 31 / 32, rtol=0.1)
    np.testing.assert_allclose(record["gradient"], residual_gradient(5), rtol=0.2)


def test_ranks_of_known_spectra():
    assert soft_rank(jnp.eye(5)) == 5
    assert soft_rank(jnp.ones((4, 4))) == pytest.approx(1)
    assert soft_rank(jnp.diag(jnp.array([3.0, 1.0]))) == pytest.approx(16 / 10)
    assert thresholded_rank(np.array([4.0, 1.0, 0.7, 0.0])) == 2  # half the mean is 0.7125
    assert thresholded_rank(np.array([1.0, 1.0]), 1.0) == 2


def test_ranks_of_a_linear_network():
    record = measure_ranks(dataclasses.replace(CONFIG, rank_depth=400), 8, 0)
    assert record["none"]["last"] == pytest.approx(1, abs=1e-3)
    assert record["none"]["thresholded"] == 1
    (ranks, _), _ = measurements._ranks(jax.random.key(0), width=8, depth=400)
    assert record["BN"]["mean"] == pytest.approx(np.mean(np.asarray(ranks)[200:]), rel=1e-5)
    assert 1.5 < record["BN"]["mean"] < 4
    assert record["layers"][-1] == 400
    assert record["BN"]["ranks"][-1] == record["BN"]["last"]
    assert 1.5 < record["none"]["ranks"][0] < 8


# --- the networks that are trained ---


def test_a_network_learns_and_tuning_sees_no_test_set(tmp_path):
    images = prepare(CONFIG)
    config = dataclasses.replace(
        CONFIG, train_width=32, batch_size=32, num_steps=100, steps_per_dispatch=50
    )
    settings = [networks.Deep(residual, 0.03, 2) for residual in (True, False)]
    blank = images._replace(test=images.test._replace(image=jnp.zeros_like(images.test.image)))

    def records(purpose, settings, images):
        (path := tmp_path / f"{purpose} {len(settings)}").mkdir()
        ledger = Ledger(path / "metrics.jsonl")
        with Runner(path, ledger, total_steps=100, strategy="devices") as runner:
            return networks.train_all(purpose, settings, [0], config, images, runner)

    trained = records("train", settings, images)
    assert [record["residual"] for record in trained] == [True, False]
    assert all(r["accuracy"] > 0.85 and r["diverged"] == 0 for r in trained)
    assert trained[0]["loss"] != trained[1]["loss"]
    for record in records("tune", settings, images):
        assert "accuracy" not in record and record["loss"] < 0.6
    assert records("train", settings[:1], blank)[0]["accuracy"] < 0.2


# --- verdicts on made-up records ---


def gradient_records(offs, *, seeds=3, scatter=1e-4, relu_rate=None):
    """Rates off theory by these factors, of ReLU and linear."""
    records = []
    for seed in range(seeds):
        settings = [
            {
                "activation": activation,
                "batch_size": batch,
                "rate": relu_rate
                if relu_rate and activation == "relu"
                else growth(activation, batch) * (1 + off + scatter * seed),
                "theory": growth(activation, batch),
            }
            for activation, off in zip(("relu", "linear"), offs, strict=True)
            for batch in (8, 128)
        ]
        records.append({"seed": seed, "settings": settings, "control": {"rate": 1.0}})
    values = {"largest": 4.0, "rms": 1.2, "near_one": 0.3, "zero": 0.5}
    return records, [{"BN": values, "none": values}] * seeds


@pytest.mark.parametrize(
    ("made_up", "verdict"),
    [
        (dict(offs=(0.0, 0.0)), REPRODUCED),
        (dict(offs=(0.02, -0.02)), REPRODUCED),
        (dict(offs=(0.04, 0.0)), INCONCLUSIVE),
        (dict(offs=(0.0, -0.04)), INCONCLUSIVE),
        (dict(offs=(0.0, 0.0), scatter=0.02), INCONCLUSIVE),
        (dict(offs=(0.0, 0.0), seeds=1), INCONCLUSIVE),
        (dict(offs=(0.0, 0.0), relu_rate=1.0), NOT_REPRODUCED),
        (dict(offs=(0.0, 0.0), relu_rate=1.22), NOT_REPRODUCED),
        (dict(offs=(0.0, 0.0), relu_rate=1.3), INCONCLUSIVE),
    ],
)
def test_verdict_of_gradients(made_up, verdict):
    records, jacobians = gradient_records(**made_up)
    assert judge_gradients(QUICK, records, jacobians).verdict == verdict


def test_narrow_networks_do_not_decide_about_wide_ones():
    config = dataclasses.replace(QUICK, gradient_width=999)
    finding = judge_gradients(config, *gradient_records((0.0, 0.0)))
    assert finding.verdict == INCONCLUSIVE and "999" in finding.note
    refuted = judge_gradients(config, *gradient_records((0.0, 0.0), relu_rate=1.0))
    assert refuted.verdict == NOT_REPRODUCED


def test_the_worst_setting_is_named():
    finding = judge_gradients(QUICK, *gradient_records((0.0, 0.025)))
    assert "linear, batch" in finding.note and "+2.5%" in finding.note
    assert finding.measured["largest |measured/theory − 1|"] == pytest.approx(0.0251)


def residual_records(bn=1.0, none=1.0, scatter=1e-3, power=1.0):
    theory = residual_variances(QUICK.residual_depth)
    return [
        {
            "seed": seed,
            "BN": theory["BN"] * (bn + scatter * seed),
            "none": theory["none"] ** power * none,
            "within": theory["BN"],
            "gradient": np.ones(QUICK.residual_depth + 1),
        }
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("made_up", "verdict"),
    [
        (dict(), REPRODUCED),
        (dict(bn=1.04), REPRODUCED),
        (dict(bn=0.93), INCONCLUSIVE),
        (dict(none=1.06), INCONCLUSIVE),
        (dict(scatter=0.04), INCONCLUSIVE),
        (dict(power=0.6), NOT_REPRODUCED),
    ],
)
def test_verdict_of_the_residual_stream(made_up, verdict):
    assert judge_residual(QUICK, residual_records(**made_up)).verdict == verdict


def rank_records(last=1.0, exponent=0.55, scatter=0.01):
    return [
        {
            "width": d,
            "seed": seed,
            "BN": {
                "mean": d ** (exponent + scatter * seed),
                "last": d**exponent,
                "thresholded": int(d**0.6),
            },
            "none": {
                "last": last + scatter * seed if d == 64 else 1.0,
                "mean": 1.0,
                "thresholded": 1,
            },
        }
        for d in QUICK.rank_widths
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("made_up", "verdict"),
    [
        (dict(), REPRODUCED),
        (dict(exponent=0.505), INCONCLUSIVE),
        (dict(exponent=0.4), NOT_REPRODUCED),
        (dict(exponent=0.0), NOT_REPRODUCED),
        (dict(last=1.49), INCONCLUSIVE),
        (dict(last=3.0), NOT_REPRODUCED),
        (dict(scatter=0.1), INCONCLUSIVE),
    ],
)
def test_verdict_of_ranks(made_up, verdict):
    assert judge_ranks(QUICK, rank_records(**made_up)).verdict == verdict


def training_records(deep=0.6, shallow=0.0, scatter=0.01):
    gaps = {5: shallow, 10: 0.1, 20: 0.1, 40: deep}
    return [
        {
            "residual": residual,
            "depth": depth,
            "seed": seed,
            "rate": 0.01,
            "accuracy": 0.9 - (0 if residual else gaps[depth] + scatter * (seed - 1)),
            "loss": None if residual else 0.1,
            "diverged": int(residual),
        }
        for residual in (True, False)
        for depth in QUICK.train_depths
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("made_up", "verdict"),
    [
        (dict(), REPRODUCED),
        (dict(deep=0.21), INCONCLUSIVE),
        (dict(deep=0.1), NOT_REPRODUCED),
        (dict(deep=-0.5), NOT_REPRODUCED),
        (dict(shallow=0.04), INCONCLUSIVE),
        (dict(shallow=-0.04), INCONCLUSIVE),
        (dict(shallow=0.2), NOT_REPRODUCED),
        (dict(scatter=0.2), INCONCLUSIVE),
    ],
)
def test_verdict_of_training(made_up, verdict):
    finding = judge_training(QUICK, training_records(**made_up))
    assert finding.verdict == verdict
    assert "12 had steps that were not finite" in finding.note
    assert "end of the grid" not in finding.note


# --- whole runs ---


def test_what_is_tuned_has_a_seed_apart_and_no_test_set(smoke_run):
    records = smoke.ledger(smoke_run("signal_propagation"))
    assert len(records) == 2 * (3 + 2 + 4) + 4 * 2
    tuned = [record for record in records if record["name"].startswith("tune")]
    assert {record["seed"] for record in tuned} == {networks.TUNING_SEED}
    assert all("accuracy" not in record for record in tuned)


def test_presets_hold_what_the_criteria_need():
    assert PRESETS["standard"].seeds >= 5 and PRESETS["standard"].dataset == "fashion_mnist"
    for name in ("quick", "standard"):
        config = PRESETS[name]
        assert config.gradient_width >= 1000
        assert set(config.batch_sizes) == {8, 16, 32, 64, 128}
        assert config.rank_depth >= 20 * max(config.rank_widths)
        assert min(config.train_depths) == 5 and max(config.train_depths) >= 40


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("batch_sizes=(3, 8)", "batch_sizes[0]=3"),
        ("gradient_depth=500", "gradient_depth=500 is not allowed: at most 61"),
        ("rank_widths=(8,)", "2 or more entries"),
        ("train_depths=(3,)", "2 or more entries"),
        ("batch_size=5000", "898"),
        ("steps_per_dispatch=3", "a multiple of steps_per_dispatch=3"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, flag, said):
    ended = smoke.launch("signal_propagation", tmp_path / "run", f"--config.{flag}")
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1) and said in ended.err
    assert not (tmp_path / "run").exists()
