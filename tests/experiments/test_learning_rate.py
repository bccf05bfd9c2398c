"""Tests of experiments.learning_rate: its search, its verdicts, a whole run and its config."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

from bn_research.claims.bounded import Bounded
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.launch import main
from experiments.learning_rate import EXPERIMENT, PRESETS, search
from experiments.learning_rate.search import (
    Search,
    Setting,
    final_loss,
    find_limits,
    grid,
    is_stable,
)
from experiments.learning_rate.training import BOOSTED, boosted_arms, settings
from experiments.learning_rate.verdicts import (
    advantage_slope,
    judge_batches,
    judge_rates,
    judge_sigmoid,
)

SMOKE = PRESETS["smoke"]
CNN, MLP = "c8 P f10", "f9 f10"


def launch(workdir, *flags):
    return main(EXPERIMENT, ["learning_rate", "--preset=smoke", f"--workdir={workdir}", *flags])


def test_start_is_the_last_stable_place_above_the_best():
    places, losses = [0, 4, 8, 12, 16], [2.0, 0.5, 0.6, 2.3, 0.9]
    assert search.start_place(places, losses, [False, True, True, False, True]) == 8
    assert search.start_place(places, losses, [False] * 5) == 4
    assert search.start_place(places, [math.inf] * 5, [False] * 5) == 0


def test_grid_and_places_above():
    np.testing.assert_allclose(grid(-1, 1, 2), [0.5, 0.5**0.5, 1, 2**0.5, 2], rtol=1e-15)
    assert search.places_above({3: True, 4: False}, 20) == [5, 7]
    assert search.places_above({3: True, 4: False}, 6) == [5]
    assert search.places_above({0: False}, 6) == [] == search.places_above({5: True}, 6)


def test_stable_is_a_low_loss_at_the_end_and_no_step_lost():
    half = math.log(10) / 2
    loss = [9.0] * 36 + [half - 0.3, half - 0.2, half + 0.2, half + 0.2]
    record = {"loss": loss, "diverged": 0, "num_steps": 40}
    assert final_loss(record) == pytest.approx(half - 0.025)
    assert is_stable(record, 10) and not is_stable(record, 9)
    assert not is_stable({**record, "diverged": 1}, 10)
    lost = {"loss": [2.0, None, None], "diverged": 2, "num_steps": 40}
    assert final_loss(lost) == math.inf and not is_stable(lost, 10)


class Quadratic:
    """Stands in for a Trainer: momentum SGD on λx²/2, by NumPy in float64."""

    momentum = 0.9

    def __init__(self, curvature):
        self.curvature, self.calls = curvature, []

    def tune(self, runs):
        assert len(set(runs)) == len(runs)
        self.calls.append(runs)
        return [self.record(arm, seed) for arm, seed in runs]

    def record(self, arm, seed):
        curvature = self.curvature(arm.placement, arm.batch_size, seed)
        x, v, loss = 1.0, 0.0, []
        for _ in range(arm.num_steps):
            loss.append(curvature * x**2 / 2)
            if loss[-1] > 1e30:  # so long gone that its end is known
                return {"loss": loss, "diverged": 2, "num_steps": arm.num_steps}
            v = self.momentum * v + curvature * x
            x -= arm.learning_rate * v
        return {"loss": loss, "diverged": 0, "num_steps": arm.num_steps}


def test_limits_of_quadratics_are_those_of_theory():
    """Momentum SGD is stable below 2(1 + μ)/λ; λ differs by placement and seed."""
    config = dataclasses.replace(SMOKE, seeds=3, num_steps=2000, lowest_log2_rate=-8)

    def curvature(placement, batch_size, seed):
        return {"none": 8.0, "all": 0.3}[placement] * (1 + 0.4 * seed)

    asked = [Setting(CNN, "none", 8), Setting(CNN, "all", 8)]
    trainer = Quadratic(curvature)
    found = find_limits(config, asked, trainer, 10)
    rates = np.array(grid(-8, 6, 1))
    for setting in asked:
        for seed, number in enumerate(found[setting].limits):
            bound = 2 * 1.9 / curvature(setting.placement, 8, seed)
            expected = rates[rates < bound].max()
            assert number == (expected, expected)
        assert found[setting].islands == [False] * 3
        assert found[setting].best in found[setting].rates
        assert found[setting].losses[found[setting].rates.index(found[setting].best)] == min(
            found[setting].losses
        )
    # The seed apart tunes; it enters no search but to fill up a sweep with what is known.
    tuned = {(arm, seed) for arm, seed in trainer.calls[0]}
    assert {seed for _, seed in tuned} == {3}
    assert all(run in tuned or run[1] < 3 for call in trainer.calls[1:] for run in call)
    # Every sweep has at least as many members as there are lanes to fill: one program.
    for call in trainer.calls[1:]:
        sizes = {s: sum(arm.placement == s for arm, _ in call) for s in ("none", "all")}
        assert all(size in (0, *range(4, 9)) for size in sizes.values())


def test_a_limit_outside_the_grid_is_a_bound():
    config, setting = dataclasses.replace(SMOKE, num_steps=400), Setting(CNN, "all", 8)
    only = find_limits(config, [setting], Quadratic(lambda *_: 1e-2), 10)[setting]
    assert only.limits == [Bounded(64.0, math.inf)] * 2 and only.islands == [None] * 2
    only = find_limits(config, [setting], Quadratic(lambda *_: 1e6), 10)[setting]
    assert all(0 < low < 1e-30 and high == 2.0**-6 for low, high in only.limits)


def exactly(*values):
    return [Bounded(float(v), float(v)) for v in values]


def found(limits, best=0.1):
    return Search([0.01, 0.1, 1.0], [1.0, 0.5, 2.0], best, limits, [False] * len(limits))


def boosted(accuracies=(0.8, 0.81, 0.82), loss=0.4, diverged=0):
    record = {"loss": [loss] * 20, "num_steps": 20, "diverged": diverged, "learning_rate": 0.1}
    return {name: [{**record, "accuracy": a} for a in accuracies] for name in BOOSTED}


def rates_judged(bn, plain, **options):
    searches = {Setting(CNN, "none", 32): found(plain), Setting(CNN, "all", 32): found(bn)}
    return judge_rates(searches, CNN, boosted(**options), 10)


PLAIN, ABOVE = exactly(0.1, 0.11, 0.1), [Bounded(4.0, math.inf)] * 3
RATIO = "BN on all layers/plain, CNN, batch 32"


@pytest.mark.parametrize(
    ("bn", "plain", "verdict"),
    [
        (exactly(2, 2.1, 2), PLAIN, REPRODUCED),
        (exactly(0.2, 0.21, 0.2), PLAIN, NOT_REPRODUCED),
        (exactly(0.5, 0.55, 0.5), PLAIN, INCONCLUSIVE),  # 5: in between
        (exactly(0.5, 5, 2), PLAIN, INCONCLUSIVE),
        (ABOVE, PLAIN, REPRODUCED),
        (ABOVE, ABOVE, INCONCLUSIVE),
        ([Bounded(1e-38, 1e-3)] * 3, PLAIN, NOT_REPRODUCED),
    ],
)
def test_rate_verdicts_on_both_sides_of_each_criterion(bn, plain, verdict):
    assert rates_judged(bn, plain).verdict == verdict


def test_the_headline_stands_first_and_censored_limits_stay_bounds():
    measured = rates_judged(exactly(2, 2.2, 2), PLAIN).measured
    assert measured[RATIO] == pytest.approx(20)
    assert next(iter(measured)) == RATIO and measured[f"{RATIO}, low"] <= 20.1
    above = rates_judged(ABOVE, PLAIN)
    assert above.interval[1] == math.inf and "3 limits are bounds only" in above.note
    assert math.isnan(above.measured[RATIO])


def test_thirty_times_is_counted_with_what_it_lost():
    said = rates_judged(exactly(2, 2, 2), exactly(0.1, 0.1, 0.1), diverged=1)
    assert "trains for 0 of 3 seeds" in said.note and "9 of the runs at those three" in said.note
    assert math.isnan(said.measured["training loss at the end, BN at 30× that"])
    sound = rates_judged(exactly(2, 2, 2), exactly(0.1, 0.1, 0.1))
    assert "trains for 3 of 3 seeds" in sound.note
    assert sound.measured["test accuracy, BN at 30× that"] == pytest.approx(0.81)


def test_thirty_times_the_best_rate_of_the_plain_network():
    searches = {s: found([], best=0.25 if s.placement == "none" else 2.0) for s in settings(SMOKE)}
    arms = boosted_arms(SMOKE, searches)
    assert [arm.learning_rate for arm in arms.values()] == [0.25, 7.5, 2.0]
    assert [arm.placement for arm in arms.values()] == ["none", "all", "all"]
    assert {arm.batch_size for arm in arms.values()} == {32}
    told = {(arm.optimizer, arm.initializer, arm.use_bias) for arm in arms.values()}
    assert told == {("momentum", "he", True)}
    assert search.arm_of(SMOKE, Setting(CNN, "none", 8), 0.5).batch_size == 8


def sigmoid(plain, bn, shallow=(0.5, 0.51, 0.5)):
    def rows(accuracies):
        return [{"accuracy": a, "learning_rate": 0.1, "diverged": 0} for a in accuracies]

    trained = {("s", "none"): rows(shallow), ("s", "all"): rows(bn)}
    trained |= {("d", "none"): rows(plain), ("d", "all"): rows(bn)}
    return judge_sigmoid(("s", "d"), trained, (0.1, 1.0), 10)


def test_sigmoid_verdicts():
    stuck, trains = (0.1, 0.1, 0.11), (0.7, 0.71, 0.7)
    assert sigmoid(stuck, trains).verdict == REPRODUCED
    assert sigmoid(trains, trains).verdict == NOT_REPRODUCED
    assert sigmoid(stuck, stuck).verdict == NOT_REPRODUCED
    assert sigmoid((0.1, 0.1, 0.3), trains).verdict == INCONCLUSIVE
    assert sigmoid(stuck, (0.2, 0.4, 0.35)).verdict == INCONCLUSIVE
    assert "Control, s: plain 0.50" in sigmoid(stuck, trains).note
    assert "at an end of the grid" in sigmoid(stuck, trains).note


def batches(cnn, mlp=None):
    """Verdict where BN/plain grows as the batch to these powers, one for each seed."""
    searches, sizes = {}, {}
    for network, powers in ((CNN, cnn), (MLP, mlp)):
        if powers is None:
            continue
        sizes[network] = [8, 32, 128]
        for size in sizes[network]:
            searches[Setting(network, "none", size)] = found(exactly(*(0.1 for _ in powers)))
            searches[Setting(network, "all", size)] = found(exactly(*(size**p for p in powers)))
    return judge_batches(searches, sizes), searches


def test_batch_verdicts():
    falling, rising, flat = (-0.5, -0.4, -0.45), (0.5, 0.4, 0.45), (-0.2, 0.2, 0.1)
    assert batches(rising)[0].verdict == REPRODUCED
    assert batches(falling)[0].verdict == NOT_REPRODUCED
    assert batches(flat)[0].verdict == INCONCLUSIVE
    assert batches(rising, rising)[0].verdict == REPRODUCED
    assert batches(rising, falling)[0].verdict == NOT_REPRODUCED
    assert batches(rising, flat)[0].verdict == INCONCLUSIVE
    finding, searches = batches(falling)
    mean, low, high, _ = advantage_slope(searches, CNN, [8, 32, 128])
    assert mean == pytest.approx(np.mean(falling))
    half = stats.t.ppf(0.975, 2) * np.std(falling, ddof=1) / math.sqrt(3)
    assert (low, high) == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert finding.interval == (low, high)
    assert judge_batches(searches, {CNN: [8]}).verdict == INCONCLUSIVE


def test_a_censored_limit_leaves_the_slope_open():
    _, searches = batches((-0.5, -0.4, -0.45))
    searches[Setting(CNN, "all", 128)] = found([*exactly(0.1, 0.15), Bounded(0.1, math.inf)])
    finding = judge_batches(searches, {CNN: [8, 32, 128]})
    assert finding.verdict == INCONCLUSIVE and finding.interval[1] == math.inf


def test_results_are_those_of_the_ledger(smoke_run):
    """Each limit of the results by a scan of the ledger: a stable rate, the next one not."""
    finished = smoke_run("learning_rate")
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    measured = json.loads((finished / "results.json").read_text())["claims"][0]["measured"]
    half = math.log(10) / 2
    rates = [2.0**k for k in range(-6, 7)]
    checked = 0
    tried = [r for r in rows if r["name"].startswith("tune/") and r["activation"] == "relu"]
    for placement, words in (("none", "plain"), ("all", "BN on all layers")):
        limits = []
        for seed in range(2):
            stable = {
                row["learning_rate"]: not row["diverged"] and np.mean(row["loss"][-2:]) < half
                for row in tried
                if (row["placement"], row["batch_size"], row["seed"]) == (placement, 32, seed)
            }
            assert set(stable) <= set(rates)
            good = [rate for rate in rates if stable.get(rate) and not stable.get(2 * rate, 1)]
            limits.append(good[0] if good else math.nan)
            checked += bool(good)
        shown = measured[f"largest stable rate, {words}, CNN, batch 32"]
        if shown is not None and np.isfinite(limits).all():
            assert shown == pytest.approx(math.sqrt(limits[0] * limits[1]))
    assert checked >= 1
    thirty = [row for row in rows if row["name"].startswith("train/") and "relu" in row["name"]]
    accuracy = np.mean([row["accuracy"] for row in thirty if row["placement"] == "none"])
    assert measured["test accuracy, plain at its best rate"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.num_steps=25"], "num_steps=25"),
        (["--config.cnn_batch_sizes=(8,)"], "must hold 32"),
        (["--config.cnn_batch_sizes=(32, 500)"], "at most 128, the training set"),
        (["--config.placements=('all',)"], "must hold 'none'"),
        (["--config.cnn=f10"], "must begin with a layer cN"),
        (["--config.cnn=c4 P P P P f10"], "remove a P"),
        (["--config.sigmoid_networks=('c4 P f7',)"], "end it in f10"),
        (["--config.highest_log2_rate=-4"], "must hold at least 5 rates"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, flags, said):
    assert launch(tmp_path / "run", *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert not (tmp_path / "run").exists()
