"""Tests of experiments.scale_invariance: references, verdicts, and a whole run at smoke size."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import smoke

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from experiments.scale_invariance import PRESETS, identities
from experiments.scale_invariance.dynamics import Run, losses, trajectory
from experiments.scale_invariance.measurements import measure_losses, measure_tangent, prepare
from experiments.scale_invariance.verdicts import (
    IDENTITIES,
    exactly,
    judge_effective_rate,
    judge_equilibrium,
    judge_exponential,
    judge_tangent,
)

CONFIG = PRESETS["smoke"]


@pytest.fixture(scope="module")
def examples():
    return prepare(CONFIG)


# --- whole runs ---


def test_verdicts_at_smoke_size(smoke_run):
    results = json.loads((smoke_run("scale_invariance") / "results.json").read_text())
    verdicts = {claim["id"]: claim["verdict"] for claim in results["claims"]}
    assert verdicts == {
        "scale-invariant-backprop": REPRODUCED,
        "gradient-is-tangent": REPRODUCED,
        "effective-learning-rate": REPRODUCED,
        "exponential-rate-equals-weight-decay": INCONCLUSIVE,  # the rate does not grow 10 times
        "equilibrium-angle": INCONCLUSIVE,  # the norms still drift
    }


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("weight_decay=1.0", "(1 − √momentum)²"),
        ("equilibrium_steps=41", "equilibrium_steps=41"),
        ("batch_size=5000", "batch_size=5000"),
        ("network=f10", "no hidden layer"),
        ("network=c2 P P P P f10", "pools images"),
        ("network=f4 f7", "ends in 7 units"),
        ("network=c3 P f4 f10", "network is the same"),
        ("factors=(1e60,)", "diverged"),
    ],
)
def test_bad_config(tmp_path, flag, message):
    ended = smoke.launch("scale_invariance", tmp_path / "run", f"--config.{flag}")
    assert ended.status == 2 and message in ended.said("scale_invariance")[-1]


# --- references ---


def test_trajectories_are_float64_and_the_flag_is_left_alone(examples):
    run = Run("f4 f10", "hidden", rates=np.full(3, 0.1), other_rate=0.01)
    loss, norms = trajectory(run, examples, 0, batch_size=16)
    assert loss.dtype == norms.squared.dtype == np.float64 and norms.squared.shape == (3, 1)
    assert jnp.ones(2).dtype == jnp.float32


def test_a_factor_loses_no_digits(examples):
    """1/3 of float32 weights in float64: rounded to float32 it would cost 1e-8 of the loss."""
    run = Run("f4 f10", "hidden", other_rate=0.01)
    base, scaled = (
        trajectory(
            run.replace(rates=np.full(8, 0.1 * c**2), decay=0.01 / c**2, factor=c),
            *(examples, 0),
            batch_size=16,
        )[0]
        for c in (1.0, 1 / 3)
    )
    np.testing.assert_allclose(scaled, base, rtol=1e-13)


def test_loss_against_scale(examples):
    scales = (1e-3, 1.0, 1e3)
    few = type(examples)(examples.image[:64], examples.label[:64])
    exact = losses(Run("c2 f4 f10", "hidden"), few, scales, 0)
    np.testing.assert_allclose(exact, exact[1], rtol=1e-12)
    for run in (
        Run("c2 f4 f10", "hidden", epsilon=1e-2),
        Run("c2 f4 f10", "last", use_bias=True),
        Run("c2 f4 f10", "none"),
    ):
        assert np.ptp(losses(run, few, scales, 0)) > 1e-2, run
    assert set(measure_losses(CONFIG, few, 0)) == {"BN", "no BN", "BN, bias inside", "BN, ε > 0"}


@pytest.mark.parametrize("layer", identities.LAYERS)
def test_identities_and_what_breaks_them(examples, layer):
    config = dataclasses.replace(CONFIG, scales=(0.01, 30.0), epsilon=1e-3)
    record = identities.measure(config, examples, layer, 0)
    for interface in identities.INTERFACES:
        for kind in identities.KINDS:
            assert max(record[interface][kind]) < 1e-12
        assert record[interface]["ε ignored"][0] > 0.1
    assert min(record["no BN"] + record["bias inside"]) > 0.1
    assert max(record["bias before BN"]) < 1e-11


def test_tangent_and_what_breaks_it(examples):
    found = {name: measure_tangent(CONFIG, examples, name, 0) for name in ("BN", "no BN")}
    assert found["BN"]["share"] < 1e-13 and found["BN"]["pythagoras"] < 1e-13
    assert found["no BN"]["share"] > 1e-2 and found["no BN"]["pythagoras"] > 1e-4
    np.testing.assert_allclose(found["BN"]["squared"], found["BN"]["predicted"], rtol=1e-12)


# --- verdicts ---


@pytest.mark.parametrize(
    ("worst", "verdict"),
    [
        (1e-13, REPRODUCED),
        (1e-11, INCONCLUSIVE),
        (1e-8, NOT_REPRODUCED),
        (math.nan, NOT_REPRODUCED),
    ],
)
def test_exactly(worst, verdict):
    assert exactly(worst, IDENTITIES) == verdict


@pytest.mark.parametrize(
    ("share", "control", "verdict"),
    [
        (1e-15, 0.1, REPRODUCED),
        (1e-15, 1e-6, INCONCLUSIVE),
        (1e-10, 0.1, INCONCLUSIVE),
        (1e-5, 0.1, NOT_REPRODUCED),
    ],
)
def test_verdict_of_tangent(share, control, verdict):
    records = [
        {"network": "BN", "share": share, "pythagoras": 1e-15},
        {"network": "no BN", "share": 0.5, "pythagoras": control},
    ]
    assert judge_tangent(records).verdict == verdict


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [(1e-12, REPRODUCED), (1e-8, INCONCLUSIVE), (1e-3, NOT_REPRODUCED)],
)
def test_verdict_of_trajectories(difference, verdict):
    record = {"difference": {"3": difference}, "control": {"no BN": 1.0}, "momentum": 0.9}
    assert judge_effective_rate([record]).verdict == verdict
    record = {"difference": difference, "growth": 20.0, "control": {"no BN": 1.0}}
    assert judge_exponential([record]).verdict == verdict
    assert judge_exponential([record | {"growth": 9.0}]).verdict != REPRODUCED


@pytest.mark.parametrize(
    ("ratio", "drift", "verdict"),
    [
        (1.02, 1.0, REPRODUCED),
        (0.98, 1.0, REPRODUCED),
        (1.1, 1.0, INCONCLUSIVE),
        (1.2, 1.0, NOT_REPRODUCED),
        (0.8, 1.0, NOT_REPRODUCED),
        (1.0, 0.05, INCONCLUSIVE),
        (1.2, 0.05, INCONCLUSIVE),
    ],
)
def test_verdict_of_equilibrium(ratio, drift, verdict):
    config = dataclasses.replace(PRESETS["quick"], seeds=3)
    records = [
        {
            "network": network,
            "seed": seed,
            "rate": 0.1,
            "decay": 0.02,
            "momentum": 0.9,
            "predicted": 0.1,
            "rms": [0.1, 0.1 * (ratio + 0.001 * seed)],
            "mean": [0.09, 0.09],
            "norm_drift": [drift, 1.0],
            "norms": [[9.0, 9.0], [9.0, 9.0], [3.0, 1.0], [3.0, 3.0]],
            "layers": ["first", "second"],
            "diverged": 0,
            "loss": 0.4,
        }
        for network in (config.network, config.wide_network)
        for seed in range(3)
    ]
    finding = judge_equilibrium(config, records)
    assert finding.verdict == verdict
    where = "second at η = 0.1, λ = 0.02, momentum 0.9, where ‖w‖ has a standard deviation of 50%"
    assert where in finding.note or ratio == 1.0
    bounded = "largest, where ηλ ≤ (1 − √α)²"
    assert finding.measured[bounded] == finding.measured["largest, over seeds"]
    swinging = [record | {"decay": 0.03, "rms": [0.1, 0.2]} for record in records]
    finding = judge_equilibrium(config, [*records, *swinging])
    assert finding.measured[bounded] < 0.3 < finding.measured["largest, over seeds"]
