"""The part of experiments.regularization about groups: its trainings, verdicts, and figures."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.step import Batch
from bn_research.training.sweep import Sweep
from experiments.regularization import groups
from experiments.regularization.data import Data
from experiments.regularization.groups_verdicts import (
    FROZEN,
    GAP,
    INJECTED,
    LOSS_GAP,
    PLAIN,
    PLAIN_FROZEN,
    POPULATION,
    by_seed,
    judge,
    ladder_arm,
    ratio_of_means,
    recovery,
    slopes,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What the part reads of the experiment's."""

    dataset: str = "made up"
    seeds: int = 2
    groups_network: str = "f6 f3"
    groups_examples: int = 80
    groups_sizes: tuple[int, ...] = (4, 32)
    groups_size: int = 4
    groups_rates: tuple[float, ...] = (0.02, 0.05)
    groups_slower: float = 4.0
    groups_steps: int = 4
    groups_steps_per_dispatch: int = 2
    compiler_level: int = 0
    groups_tuning_seeds: int = 1
    groups_seeds: int = 3


CONFIG = Config()
LADDER = dataclasses.replace(CONFIG, groups_sizes=(8, 16, 512), groups_size=16, groups_seeds=3)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)

    def examples(count):
        label = rng.integers(3, size=count)
        image = rng.standard_normal((count, 3, 3, 1)) + label[:, None, None, None]
        return Batch(jnp.asarray(image, jnp.float32), jnp.asarray(label, jnp.int32))

    return Data(examples(90), examples(64), examples(64))


def run(path, data, config=CONFIG):
    ledger = Ledger(path / "metrics.jsonl")
    steps = groups.total_steps(config)
    with Runner(path, ledger, total_steps=steps, strategy="devices") as runner:
        taken = []
        runner._bar.update = taken.append
        return groups.measure(config, data, runner), sum(taken)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("groups")
    groups.check(CONFIG)
    return path, *run(path, data)


# --- the trainings ---


def test_every_arm_is_trained_in_its_setting(finished):
    _, records, _ = finished
    settings = {
        record["arm"]: (record["norm"], record["group_size"], record["regrouped"])
        for record in records["main"]
    }
    assert settings == {
        "BN, groups of 4": ("batch", 4, True),
        "BN, groups of 32": ("batch", 32, True),
        FROZEN: ("batch", 4, False),
        POPULATION: ("population", 0, True),
        "measured": ("measured", 4, True),
        "borrowed": ("borrowed", 4, True),
        "additive": ("additive", 4, True),
        PLAIN: ("none", 4, True),
        PLAIN_FROZEN: ("none", 4, False),
    }
    for record in records["main"]:
        assert record["batch_size"] == 32 and record["population"] == "running"
    assert [r["seed"] for r in records["main"]] == [0, 1, 2] * len(settings)
    losses = {r["arm"]: r["train_loss"] for r in records["main"] if r["seed"] == 0}
    assert len(set(losses.values())) == len(settings)


def test_rates_are_those_of_the_best_validation_accuracy(finished):
    _, records, _ = finished
    assert {r["seed"] for r in records["tuning"]} == {3}
    for norm, arms in (("batch", [ladder_arm(4), "measured"]), ("none", [PLAIN, PLAIN_FROZEN])):
        tried = [r for r in records["tuning"] if r["norm"] == norm]
        best = max(tried, key=lambda r: (r["validation_accuracy"], -r["rate"]))["rate"]
        assert {r["rate"] for r in records["main"] if r["arm"] in arms} == {best}
    assert [r["seed"] for r in records["slower"]] == [0, 1] * 2
    slower = {(r["arm"], r["rate"]) for r in records["slower"]}
    rate = records["main"][0]["rate"]
    assert slower == {(ladder_arm(4), rate / 4), (ladder_arm(32), rate / 4)}


def test_steps_are_as_many_as_announced(finished):
    assert finished[2] == groups.total_steps(CONFIG)
    less = dataclasses.replace(CONFIG, groups_slower=0)
    assert groups.total_steps(CONFIG) - groups.total_steps(less) == 2 * 2 * 4


def test_started_again_nothing_is_trained(finished, data, monkeypatch):
    path, records, _ = finished
    monkeypatch.setattr(Sweep, "run", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run(path, data)[0] == records


def test_findings_and_figures_of_a_run(finished, tmp_path):
    _, records, _ = finished
    findings = groups.judge(CONFIG, records)
    assert [f.claim for f in findings] == list(groups.CLAIMS)
    for finding in findings:
        assert finding.measured and finding.interval is not None
    name = "gap, BN, groups of 4"
    expected = [
        100 * (r["train_accuracy"] - r["test_accuracy"])
        for r in records["main"]
        if r["arm"] == ladder_arm(4)
    ]
    assert findings[0].measured[name] == pytest.approx(np.mean(expected))
    for figure in groups.draw(CONFIG, records, tmp_path):
        assert figure.path.stat().st_size > 10_000


# --- the verdicts, by made-up records ---


def record(arm, seed, train, test, **changes):
    """Accuracies in points."""
    made = {
        "arm": arm,
        "seed": seed,
        "rate": 0.02,
        "train_accuracy": train / 100,
        "test_accuracy": test / 100,
        "train_loss": 0.1,
        "test_loss": 0.1 + (train - test) / 100,
        "dose": 0.01,
        "diverged": 0,
    }
    return made | changes


def records(test, *, train=100.0, changes=None, seeds=3):
    """Records of LADDER's arms: test accuracies, to which seeds add a common part and a scatter."""
    scatter = itertools.cycle([0.02, -0.01, 0.0, -0.02, 0.01])
    main = [
        record(arm, seed, train, accuracy + 0.3 * seed + next(scatter), **(changes or {}))
        for arm, accuracy in test.items()
        for seed in range(seeds)
    ]
    return {"tuning": [], "main": main, "slower": []}


REGULARIZES = {
    ladder_arm(8): 85.0,
    ladder_arm(16): 84.5,
    ladder_arm(512): 83.0,
    FROZEN: 83.2,
    POPULATION: 82.9,
    "measured": 84.2,
    "borrowed": 84.4,
    "additive": 83.0,
    PLAIN: 82.0,
    PLAIN_FROZEN: 82.0,
}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, REPRODUCED),
        # Flat: the ladder surely rises by less than half a point.
        ({ladder_arm(8): 83.1, ladder_arm(16): 83.1}, NOT_REPRODUCED),
        ({ladder_arm(8): 81.0, ladder_arm(16): 82.0}, NOT_REPRODUCED),
        # Not enough of it recovered, or none of it a gain of g*.
        ({"measured": 83.4}, INCONCLUSIVE),
        ({ladder_arm(16): 83.0, ladder_arm(8): 86.0}, INCONCLUSIVE),
    ],
)
def test_noise_regularizes(changes, verdict):
    finding = judge(LADDER, records(REGULARIZES | changes))[0]
    assert finding.verdict == verdict
    assert finding.interval[0] <= finding.measured["gap by doubling of groups, points"]


def test_a_gap_that_closes_because_training_gets_worse_is_no_regularization():
    made = records(dict.fromkeys(REGULARIZES, 83.0))
    for entry in made["main"]:
        if entry["arm"] in (ladder_arm(8), ladder_arm(16), "measured"):
            entry["train_accuracy"] -= 0.05 if entry["arm"] == ladder_arm(8) else 0.03
    finding = judge(LADDER, made)[0]
    assert finding.measured["gap by doubling of groups, points, low"] > 0
    assert finding.verdict == INCONCLUSIVE


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, REPRODUCED),
        # Half a point and less is no flat loss; only a slope that is surely not above 0.
        ({ladder_arm(8): 83.1, ladder_arm(16): 83.1, "measured": 83.1}, REPRODUCED),
        ({ladder_arm(8): 81.0, ladder_arm(16): 82.0}, NOT_REPRODUCED),
        ({"measured": 83.4}, INCONCLUSIVE),
        ({ladder_arm(16): 83.0, ladder_arm(8): 86.0}, INCONCLUSIVE),
    ],
)
def test_noise_regularizes_by_loss(changes, verdict):
    """The accuracies say nothing here: those of training and of the test set are all alike."""
    made = records(REGULARIZES | changes)
    for entry in made["main"]:
        entry |= {"train_accuracy": 1.0, "test_accuracy": 0.9}
    by_accuracy, by_loss, _ = judge(LADDER, made)
    assert by_loss.verdict == verdict
    assert by_accuracy.verdict == NOT_REPRODUCED
    assert by_loss.interval[0] <= by_loss.measured["loss gap by doubling of groups, nats"]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, REPRODUCED),
        ({FROZEN: 84.9}, NOT_REPRODUCED),
        ({FROZEN: 84.5}, INCONCLUSIVE),
        ({PLAIN_FROZEN: 80.0}, INCONCLUSIVE),  # the same without BN: not its doing
    ],
)
def test_reshuffling(changes, verdict):
    finding = judge(LADDER, records(REGULARIZES | changes))[2]
    assert finding.verdict == verdict
    assert ("inside" in finding.note) == (finding.interval[0] <= 1 <= finding.interval[1])


def test_parts_recovered_and_slopes_are_those_of_the_means():
    made = records(REGULARIZES)
    finding = judge(LADDER, made)[0]
    for noise, part in (("measured", 1.3 / 1.6), ("borrowed", 1.5 / 1.6), ("additive", 0.1 / 1.6)):
        found = finding.measured[f"part of the gap recovered, {noise}"]
        assert found == pytest.approx(part, abs=0.05)
        pairs = recovery(made["main"], 16, noise, GAP)
        assert found == pytest.approx(pairs[:, 0].mean() / pairs[:, 1].mean())
    for seed, found in enumerate(slopes(made["main"], LADDER.groups_sizes, LOSS_GAP)):
        values = [by_seed(made["main"], ladder_arm(g), LOSS_GAP)[seed] for g in (8, 16, 512)]
        assert found == pytest.approx(stats.linregress([3, 4, 9], values).slope)
    assert set(INJECTED) == {"measured", "borrowed", "additive"}


def test_ratio_of_means_is_where_students_test_turns():
    pairs = np.random.default_rng(0).standard_normal((6, 2)) * 0.3 + [1.0, 2.0]
    found = ratio_of_means(pairs)
    assert found.low < found.mean < found.high
    for end in found.interval:
        test = stats.ttest_1samp(pairs[:, 0] - end * pairs[:, 1], 0)
        assert test.pvalue == pytest.approx(0.05)
    assert ratio_of_means(pairs - [0, 2]).interval == (-math.inf, math.inf)
    assert ratio_of_means(pairs[:1]).interval == (-math.inf, math.inf)


def test_lost_runs_are_counted_and_numbers_that_are_not_finite_decide_nothing():
    made = records(REGULARIZES)
    made["main"][0]["diverged"] = 3
    findings = judge(LADDER, made)
    assert all("Of 30 runs 1 had steps that were not finite" in f.note for f in findings)
    made["main"][0]["test_loss"] = None
    assert [f.verdict for f in judge(LADDER, made)] == [INCONCLUSIVE] * 3


def test_one_seed_decides_nothing():
    config = dataclasses.replace(LADDER, groups_seeds=1)
    findings = judge(config, records(REGULARIZES, seeds=1))
    assert [f.verdict for f in findings] == [INCONCLUSIVE] * 3


def test_a_rate_at_an_end_of_the_grid_is_said():
    note = judge(LADDER, records(REGULARIZES))[0].note
    assert "0.02 with BN, an end of the grid; 0.02 without, an end of the grid" in note
    wide = dataclasses.replace(LADDER, groups_rates=(0.01, 0.02, 0.04))
    assert "an end" not in judge(wide, records(REGULARIZES))[0].note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups_seeds": 0}, "groups_seeds=0 is not allowed"),
        ({"groups_size": 2.0}, "groups_size=2.0 is not allowed"),
        ({"groups_sizes": (4,)}, "groups_sizes=.* two or more"),
        ({"groups_sizes": (32, 4)}, "groups_sizes=.* ascending"),
        ({"groups_sizes": (1, 32)}, "groups_sizes=.* above 1"),
        ({"groups_sizes": (4, 30)}, "groups_sizes=.* must divide the last"),
        ({"groups_size": 32}, "groups_size=32 is not allowed: one of groups_sizes"),
        ({"groups_examples": 31}, "groups_examples=31 is not allowed: at least the SGD batch, 32"),
        ({"groups_steps": 5}, "groups_steps=5 is not allowed.*groups_steps_per_dispatch=2"),
        ({"groups_rates": ()}, r"groups_rates=\(\) is not allowed"),
        ({"groups_rates": (0.1, 0.1)}, "groups_rates=.* all different"),
        ({"groups_rates": (-0.1,)}, "groups_rates=.* positive"),
        ({"groups_slower": 0.5}, "groups_slower=0.5 is not allowed"),
        ({"groups_network": "f6 P"}, "network 'f6 P'"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        groups.check(dataclasses.replace(CONFIG, **changes))
