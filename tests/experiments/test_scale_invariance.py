"""Tests of experiments.scale_invariance: references, verdicts, and a whole run at smoke size."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.launch import main
from experiments.scale_invariance import EXPERIMENT, PRESETS, identities
from experiments.scale_invariance.dynamics import Run, exponential_rates, losses, trajectory
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


def launch(workdir, *flags):
    return main(EXPERIMENT, ["scale_invariance", "--preset=smoke", f"--workdir={workdir}", *flags])


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
        ("--config.weight_decay=1.0", "(1 − √momentum)²"),
        ("--config.equilibrium_steps=41", "equilibrium_steps=41"),
        ("--config.batch_size=5000", "batch_size=5000"),
        ("--config.network=f10", "no hidden layer"),
        ("--config.network=c2 P P P P f10", "pools images"),
        ("--config.network=f4 f7", "ends in 7 units"),
        ("--config.network=c3 P f4 f10", "network is the same"),
        ("--config.factors=(1e60,)", "diverged"),
    ],
)
def test_bad_config(tmp_path, capsys, flag, message):
    assert launch(tmp_path / "run", flag) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("scale_invariance: ")


# --- references ---


def test_exponential_rates_of_plain_sgd():
    """α = 1 − ηλ at every step, so that η̃_t = η/(1 − ηλ)^(2t + 1)."""
    found = exponential_rates([0.1] * 5, 0.5, 0.0)
    np.testing.assert_allclose(found, 0.1 / 0.95 ** (2 * np.arange(5) + 1), rtol=1e-14)


def test_exponential_rates_follow_decay_on_a_sphere():
    """θ̃ = P·θ on an explicit invariant loss, ⟨c, θ/‖θ‖⟩, momentum and rates that change."""
    rng = np.random.default_rng(0)
    c, theta = rng.standard_normal((2, 5))
    rates, decay, momentum = 0.05 * (1 + 0.2 * rng.random(60)), 0.01, 0.8

    def gradient(w):
        unit = w / np.linalg.norm(w)
        return (c - unit * (c @ unit)) / np.linalg.norm(w)

    def directions(rates, decay):
        w, v, found = theta, 0, []
        for rate in rates:
            v = momentum * v + gradient(w) + decay * w
            w = w - rate * v
            found.append(w / np.linalg.norm(w))
        return np.array(found)

    grown = exponential_rates(rates, decay, momentum)
    np.testing.assert_allclose(directions(grown, 0.0), directions(rates, decay), atol=1e-12)
    assert np.abs(directions(rates, 0.0) - directions(rates, decay)).max() > 1e-4


def test_a_decay_too_large_to_stand_for():
    with pytest.raises(ValueError, match=r"at most \(1 − √momentum\)² = 0.00263"):
        exponential_rates([0.1], 0.1, 0.9)


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
    record = identities.measure(examples.image, layer, (0.01, 30.0), 1e-3, 0)
    for interface in identities.INTERFACES:
        for kind in ("value", "input gradient", "weight gradient", "exact form"):
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
