"""Tests of experiments.loss_surface: measurements and verdicts."""

import dataclasses
import json
import math

import numpy as np
import pytest
import smoke

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.probes.step_direction import FACTORS
from experiments.loss_surface import PRESETS
from experiments.loss_surface.training import prepare
from experiments.loss_surface.verdicts import (
    LOW,
    LOW_BN,
    OWN,
    PLAIN,
    SAME,
    Records,
    is_stable,
    judge_edge,
    judge_sharpness,
    judge_surface,
    stable_factors,
    surface_curves,
)

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def ledger(smoke_run):
    return smoke.ledger(smoke_run("loss_surface"))


# --- records of the smoke run ---


def of(ledger, purpose):
    return [record for record in ledger if record["name"].startswith(f"{purpose} ")]


def test_the_surface_is_that_of_the_batch_that_trains(ledger):
    """Its start is the loss of the step that follows, seen by the training itself."""
    for record in of(ledger, "SGD"):
        losses = np.array(record["loss"])[np.array(record["surface_steps"])]
        np.testing.assert_allclose(record["surface"]["start_loss"], losses, rtol=1e-5)
        rate, norm = record["rate"], np.array(record["surface"]["start_gradient_norm"])
        np.testing.assert_allclose(
            np.array(record["surface"]["distance"])[:, 1], rate * norm, rtol=1e-4
        )


def test_what_is_measured_when(ledger):
    sgd, descents = of(ledger, "SGD"), of(ledger, "descent")
    assert {tuple(r["curvature_steps"]) for r in sgd} == {SMOKE.curvature_steps}
    for record in sgd:
        assert ("frozen" in record) == (record["arm"] == "BN")
        assert np.isfinite(np.array(record["through"]["largest"], float)).all()
        assert len(record["surface"]["loss"]) == SMOKE.num_steps // SMOKE.steps_per_dispatch
    tuned = of(ledger, "tune")
    assert {record["seed"] for record in tuned} == {SMOKE.seeds}
    assert all("surface" not in record and "accuracy" not in record for record in tuned)
    assert len(tuned) == 2 * len(SMOKE.rates)
    assert {len(r["through"]["largest"]) for r in descents if r["is_watched"]} == {3}


def test_descent_starts_where_the_hessian_was_measured(ledger):
    """λmax of the two kinds of runs agree, and rates are the multiples of 2/λmax asked for."""
    for arm in ("plain", "BN"):
        sgd = {r["seed"]: r["through"]["largest"][0] for r in of(ledger, "SGD") if r["arm"] == arm}
        descents = [r for r in of(ledger, "descent") if r["arm"] == arm]
        for record in descents:
            if record["is_watched"]:
                factor = record["rate"] * sgd[record["seed"]] / 2
                assert factor == pytest.approx(SMOKE.edge_factor)
                assert record["through"]["largest"][0] == pytest.approx(
                    sgd[record["seed"]], rel=1e-4
                )
        found = {round(r["rate"] * sgd[r["seed"]] / 2, 4) for r in descents if not r["is_watched"]}
        assert found == set(SMOKE.descent_factors)


def test_the_curvature_reported_is_that_at_the_start(smoke_run, ledger):
    results = json.loads((smoke_run("loss_surface") / "results.json").read_text())
    measured = results["claims"][1]["measured"]
    for arm in ("plain", "BN"):
        runs = [record for record in of(ledger, "SGD") if record["arm"] == arm]
        first = {record["seed"]: record["through"]["largest"][0] for record in runs}
        mean = np.mean(list(first.values()))
        assert measured[f"λmax at the start, {arm}"] == pytest.approx(mean)


def test_gradient_descent_by_the_whole_batch_lowers_its_loss(ledger):
    for record in of(ledger, "descent"):
        if record["is_watched"]:
            assert record["loss"][-1] < record["loss"][0]


# --- verdicts, on made-up records ---

CONFIG = dataclasses.replace(
    PRESETS["quick"],
    num_steps=40,
    steps_per_dispatch=10,
    edge_steps=80,
    curvature_steps=(0,),
    descent_factors=(1.0, 2.0, 4.0),
)


def surface_record(scale=1.0, seed=0, rate=0.1, gradient=None, scatter=0.02, dispatches=4):
    f = np.array(FACTORS)
    scale = scale * (1 + scatter * seed)
    gradient = scale if gradient is None else gradient * (1 + scatter * seed)
    one = np.ones(dispatches)
    return {
        "surface": {
            "loss": (np.outer(one, 2 - scale * f)).tolist(),
            "gradient_distance": np.outer(one, gradient * f).tolist(),
            "relative_gradient_distance": np.outer(one, f).tolist(),
            "cosine": np.outer(one, 0 * f + 0.5).tolist(),
            "smoothness": (gradient * one).tolist(),
            "start_gradient_norm": one.tolist(),
            "param_norm": one.tolist(),
        },
        "loss": [1.0] * CONFIG.num_steps,
        "rate": rate,
        "diverged": int(dispatches < 4),
        "through": {"largest": [10.0], "largest_residual": [0.01]},
        "frozen": {"largest": [20.0], "largest_residual": [0.01]},
    }


def surfaces(bn, plain=(), **fields):
    seeds = range(CONFIG.seeds)
    made = {
        PLAIN: [surface_record(seed=-s, rate=0.1, **dict(plain)) for s in seeds],
        SAME: [surface_record(bn, seed=s, rate=0.1, **fields) for s in seeds],
        OWN: [surface_record(2 * bn, seed=s, rate=3.0) for s in seeds],
        LOW: [surface_record(seed=s, rate=0.03) for s in seeds],
        LOW_BN: [surface_record(bn, seed=s, rate=0.03) for s in seeds],
    }
    return Records(made, {}, {})


@pytest.mark.parametrize(
    ("made_up", "verdict"),
    [
        (dict(bn=0.5), REPRODUCED),
        (dict(bn=2.0), NOT_REPRODUCED),
        (dict(bn=0.5, gradient=2.0), NOT_REPRODUCED),
        (dict(bn=0.5, gradient=0.95), INCONCLUSIVE),
        (dict(bn=0.5, scatter=1.0), INCONCLUSIVE),
        (dict(bn=0.5, dispatches=3), INCONCLUSIVE),  # lost, so above anything
        (dict(bn=0.5, plain={"dispatches": 3}), REPRODUCED),
        (dict(bn=2.0, plain={"dispatches": 3}), INCONCLUSIVE),
    ],
)
def test_verdict_of_the_surface(made_up, verdict):
    assert judge_surface(CONFIG, surfaces(**made_up)).verdict == verdict


def test_numbers_of_the_surface():
    found = judge_surface(CONFIG, surfaces(0.5, scatter=0.0, plain={"scatter": 0.0}))
    for name in ("loss range", "gradient distance", "effective smoothness", "smoothness·‖θ‖²"):
        assert found.measured[f"{name}, BN/plain, same rate"] == pytest.approx(0.5)
    assert found.measured["relative gradient distance, BN/plain, same rate"] == pytest.approx(1)
    assert "The best rate of BN, own rate, 3, lies at an end" in found.note
    lost = judge_surface(CONFIG, surfaces(0.5, dispatches=3))
    assert "3 of BN, plain's rate diverged" in lost.note and "did not learn" not in lost.note
    dead = surfaces(0.5)
    dead.surfaces[PLAIN][1]["loss"] = [2.3] * CONFIG.num_steps
    assert "1 of 3 of plain did not learn" in judge_surface(CONFIG, dead).note
    assert found.measured["loss range, BN/plain, same lower rate"] == pytest.approx(0.5)
    curves = surface_curves(surface_record(0.5), 5)
    np.testing.assert_allclose(curves["loss range"], [1.75] * 4 + [np.nan])
    np.testing.assert_allclose(curves["gradient distance"][:4], 2.0)


def descents(plain, bn):
    """Records by arm and factor: stable up to these factors, of each seed."""
    return {
        (arm, factor): [
            {"loss": [3.0, 0.5 if factor <= best else 2.4], "diverged": 0} for best in row
        ]
        for arm, row in (("plain", plain), ("BN", bn))
        for factor in CONFIG.descent_factors
    }


def with_sharpness(plain, bn):
    made = surfaces(0.5)
    for role, value in ((PLAIN, plain), (SAME, bn)):
        for seed, record in enumerate(made.surfaces[role]):
            value_of_seed = None if value is None else value * (1 + 0.01 * seed)
            record["through"] = {"largest": [value_of_seed], "largest_residual": [0.01]}
    return made


@pytest.mark.parametrize(
    ("sharpness", "plain", "bn", "verdict"),
    [
        ((100, 10), (1, 1, 1), (1, 1, 1), REPRODUCED),
        ((100, 10), (2, 2, 2), (1, 1, 1), REPRODUCED),  # a grid's cell apart: 1/4 to 1
        ((10, 100), (1, 1, 1), (1, 1, 1), NOT_REPRODUCED),
        ((100, 10), (1, 1, 1), (4, 4, 4), INCONCLUSIVE),  # BN's is a lower bound
        ((100, 10), (4, 4, 4), (0, 0, 0), INCONCLUSIVE),
        ((100, 10), (0, 0, 0), (4, 4, 4), INCONCLUSIVE),
        ((100, 100.5), (1, 1, 1), (1, 1, 1), NOT_REPRODUCED),
        ((100, None), (1, 1, 1), (1, 1, 1), INCONCLUSIVE),
    ],
)
def test_verdict_of_the_sharpness(sharpness, plain, bn, verdict):
    found = judge_sharpness(
        CONFIG, with_sharpness(*sharpness)._replace(descents=descents(plain, bn))
    )
    assert found.verdict == verdict


def test_far_apart_in_units_of_the_limit_is_not_reproduced():
    wide = dataclasses.replace(CONFIG, descent_factors=(1.0, 2.0, 16.0, 32.0))
    made = {
        (arm, f): [{"loss": [0.5 if f <= best else math.nan], "diverged": 0}] * 3
        for arm, best in (("plain", 1.0), ("BN", 16.0))
        for f in wide.descent_factors
    }
    found = judge_sharpness(wide, with_sharpness(100, 10)._replace(descents=made))
    assert found.verdict == NOT_REPRODUCED
    assert found.measured["the second over the first, low"] == pytest.approx(8)
    assert found.measured["largest stable rate, BN/plain, low"] == pytest.approx(80)


def test_stable_is_what_trains():
    assert is_stable(CONFIG, {"loss": [3.0, 1.0], "diverged": 0})
    assert not is_stable(CONFIG, {"loss": [3.0, 2.25], "diverged": 0})  # thrown out: it guesses
    assert not is_stable(CONFIG, {"loss": [3.0, None], "diverged": 1})
    assert stable_factors(CONFIG, descents((0, 1, 4), (2, 2, 2)), "plain") == [
        (1e-30, 1.0),
        (1.0, 2.0),
        (4.0, math.inf),
    ]


def edges(plain, bn, lost=False):
    def record(value, seed):
        found = np.full(5 if lost else 8, value * (1 + 0.02 * seed) / 0.05)
        return {
            "through": {"largest": found.tolist(), "largest_residual": (0 * found).tolist()},
            "loss": [0.5] * 80,
            "rate": 0.05,
            "diverged": 0,
        }

    rows = {"plain": plain, "BN": bn}
    return Records({}, {}, {arm: [record(v, s) for s in range(3)] for arm, v in rows.items()})


@pytest.mark.parametrize(
    ("made_up", "verdict"),
    [
        (dict(plain=2.0, bn=2.1), REPRODUCED),
        (dict(plain=2.0, bn=0.2), REPRODUCED),  # BN is reported only
        (dict(plain=0.5, bn=2.0), INCONCLUSIVE),
        (dict(plain=2.95, bn=2.0), INCONCLUSIVE),
        (dict(plain=2.0, bn=2.0, lost=True), INCONCLUSIVE),
        (dict(plain=5.0, bn=0.5), NOT_REPRODUCED),
    ],
)
def test_verdict_of_the_edge(made_up, verdict):
    assert judge_edge(CONFIG, edges(**made_up)).verdict == verdict


# --- settings ---


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound(preset):
    prepare(dataclasses.replace(PRESETS[preset], dataset="digits"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": "c4 P f7"}, "end it in f10"),
        ({"network": "c4 P P P P f10"}, "remove a P"),
        ({"fixed_examples": 5000}, "fixed_examples=5000"),
        ({"num_steps": 5}, "num_steps=5"),
        ({"curvature_steps": (2,)}, r"curvature_steps=\(2,\)"),
        ({"curvature_steps": (0, 6)}, "below num_steps=6"),
    ],
)
def test_bad_settings_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        prepare(dataclasses.replace(SMOKE, **changes))
