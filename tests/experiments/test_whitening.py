"""Tests of experiments.whitening: steps to a loss, the choice of rates, verdicts, and images.

Every transform of images is held against NumPy in float64.
"""

import dataclasses
import json
import math

import numpy as np
import pytest

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from experiments.whitening import PRESETS
from experiments.whitening.measurements import prepare
from experiments.whitening.verdicts import Records, choose, judge, kinds, smoothed, steps_to_target

CONFIG = dataclasses.replace(PRESETS["smoke"], seeds=3, target_loss=0.5, window=2, num_steps=100)
KINDS = kinds(CONFIG)
SPECTRA = {name: {"condition_number": 10.0} for name in KINDS}


def record(steps, *, inputs="raw", placement="none", seed=0, rate=0.1):
    """A run whose loss falls from 2 to 0.1 before this step, so that its mean of two is 0.1 at it.

    The mean of 2 and 0.1 is above the target, that of 0.1 twice below.
    """
    loss = np.where(np.arange(1, 101) < steps - 0.5, 2.0, 0.1)
    loss[steps - 2 : steps] = 0.1
    arm = {"inputs": inputs, "placement": placement, "seed": seed, "learning_rate": rate}
    return {"loss": loss.tolist(), "diverged": 0, "accuracy": 0.9, **arm}


def records(**steps):
    """Three seeds of every kind of inputs; steps of those without BN as given, else 40."""
    seeds = [(name, seed) for name in KINDS for seed in range(3)]
    plain = [record(steps.get(n, 40) + seed % 2, inputs=n, seed=seed) for n, seed in seeds]
    return plain + [record(40, inputs=n, placement="hidden", seed=seed) for n, seed in seeds]


def without_bn(trained, name):
    return [r for r in trained if (r["inputs"], r["placement"]) == (name, "none")]


def setting(**changed):
    theory = {"predicted_steps": 100, "measured_steps": 100}
    eigen = {"top_eigenvalue": 101.2, "mean_eigenvalue": 101.0}
    drawn = {"name": "raw", "kappa": 1.0, "mean_norm": 10.0, "correlated": True}
    return {**theory, **eigen, **drawn, **changed}


def verdict(trained, *settings):
    regressions = [{"settings": list(settings) or [setting()]}]
    (found,) = judge(CONFIG, Records(regressions, SPECTRA, trained))
    return found


def test_the_averaged_loss():
    steps, loss = smoothed({"loss": [4.0, 2.0, 0.0, None, 1.0]}, 2)
    np.testing.assert_array_equal(steps, [2, 3, 4, 5])
    np.testing.assert_array_equal(loss, [3, 1, math.nan, math.nan])
    assert np.isnan(smoothed({"loss": [1.0]}, 2)[1]).all()


def test_steps_to_the_target():
    assert steps_to_target(CONFIG, record(30)) == (30, 30)
    assert steps_to_target(CONFIG, record(100)) == (100, 100)
    never = {"loss": [2.0] * 100}
    assert steps_to_target(CONFIG, never) == (100, math.inf)
    lost = {"loss": [2.0, None, None]}  # it ended early, and its bound is that of a whole run
    assert steps_to_target(CONFIG, lost) == (100, math.inf)


def test_the_best_rate_is_the_fastest_then_the_lowest():
    fast, slow = record(30, rate=0.1), record(60, rate=1.0)
    never = {**fast, "loss": [1.0] * 100, "learning_rate": 10.0}
    nearer = {**never, "loss": [0.7] * 100, "learning_rate": 20.0}
    lost = {**never, "loss": [0.7, None], "learning_rate": 30.0, "diverged": 2}
    assert choose(CONFIG, [slow, never, fast]) == 0.1
    assert choose(CONFIG, [never, nearer, lost]) == 20.0
    assert choose(CONFIG, [lost, never]) == 10.0


def test_the_order_as_claimed():
    found = verdict(records(raw=80, centred=60, scaled=40, zca=20, pca=20))
    assert found.verdict == REPRODUCED
    assert found.measured["steps raw/zca"] == pytest.approx((16 * 81 / 21) ** (1 / 3))
    assert found.interval[0] <= 3.95 <= found.interval[1]
    assert found.measured["steps raw/raw with BN"] == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize(
    "steps",
    [
        {"raw": 20, "scaled": 40, "zca": 40, "pca": 40},
        {"raw": 80, "scaled": 20, "zca": 40, "pca": 40},
        {"raw": 30, "scaled": 20, "zca": 40, "pca": 40},
    ],
)
def test_an_order_reversed_is_not_reproduced(steps):
    assert verdict(records(**steps)).verdict == NOT_REPRODUCED


def test_an_interval_over_one_is_inconclusive():
    trained = records(raw=80, scaled=40, zca=40)
    for run, steps in zip(without_bn(trained, "zca"), (30, 40, 55), strict=True):
        run["loss"] = record(steps)["loss"]
    assert verdict(trained).verdict == INCONCLUSIVE


def test_a_target_that_raw_inputs_never_reach_is_a_bound():
    trained = records(raw=80, scaled=40, zca=20, pca=20)
    for run in without_bn(trained, "raw"):
        run["loss"] = [2.0] * 100
    found = verdict(trained)
    assert found.interval[0] > 4 and found.interval[1] == math.inf
    assert found.verdict == REPRODUCED
    assert "3 did not reach the target" in found.note and "raw > 100, > 100, > 100" in found.note


def test_theory_decides_too():
    trained = records(raw=80, scaled=40, zca=20, pca=20)
    for wrong in ({"measured_steps": 103}, {"measured_steps": None}, {"top_eigenvalue": 110.0}):
        assert verdict(trained, setting(**wrong)).verdict == NOT_REPRODUCED
    few = {"predicted_steps": 3, "measured_steps": 4}  # rounding may cost a step
    assert verdict(trained, setting(), setting(**few)).verdict == REPRODUCED
    assert verdict(trained, setting(mean_norm=1.0)).verdict == INCONCLUSIVE  # no mean dominates


def test_results_are_those_of_the_ledger(smoke_run):
    path = smoke_run("whitening")
    (claim,) = json.loads((path / "results.json").read_text())["claims"]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["name"].startswith("zca/train")]
    assert len(found) == 4  # two seeds, two placements
    trained = [line["accuracy"] for line in found if line["placement"] == "none"]
    assert claim["measured"]["test accuracy, zca"] == pytest.approx(np.mean(trained))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"regression_examples": 4}, "more than features=4"),
        ({"other_epsilons": (0.1,)}, r"other_epsilons=\(0.1,\) is not allowed"),
        ({"other_targets": (2.0,)}, r"other_targets=\(2.0,\) is not allowed"),
        ({"num_steps": 30}, "multiple of steps_per_dispatch=20"),
        ({"window": 50}, "window=50 is not allowed"),
        ({"network": "f8 f7"}, "end it in f10"),
        ({"batch_size": 1000}, "batch_size=1000 is not allowed: at most 256"),
    ],
)
def test_bad_settings_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        prepare(dataclasses.replace(PRESETS["smoke"], **changes))
