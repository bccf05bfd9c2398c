"""Claims about groups and noise of `experiments.regularization`, and how records decide them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate, paired_difference
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Finding
from bn_research.claims.formatting import format_number

FLAT = 0.5  # points of accuracy: half of the paper's 1 %
RECOVERED = 0.5  # part of the gap's change that noise of the measured law must bring back
PAPER = 1.0  # points of validation accuracy, "about 1 %", of shuffling anew

FROZEN = "BN, groups drawn once"
POPULATION = "population statistics"
INJECTED = ("measured", "borrowed", "additive")
PLAIN = "no BN"
PLAIN_FROZEN = "no BN, groups drawn once"

CLAIMS = (
    Claim(
        id="batch-noise-regularizes",
        statement="The noise that an example gets from the others in its batch is why BN "
        "regularizes",
        source="Notes' open question; Paper section 3.4; the criterion is this project's",
        criterion="At a fixed SGD batch: (a) the generalization gap (training less test accuracy, "
        "inference) rises with the number of examples that share statistics: least-squares slope "
        "over log₂ of it above 0; (b) the test accuracy of groups of the size g* is above that of "
        "the whole batch; (c) population statistics with noise of the law measured at g* recover "
        f"at least {RECOVERED:g} of the gap's change from population statistics to BN by groups of "
        "g*. Reproduced if all three hold by their intervals over seeds, paired. Not reproduced "
        f"if the gap is flat: over the whole ladder it surely rises by less than {FLAT:g} points "
        "of accuracy",
        expected="the gap rises, and drawn noise brings back most of it",
    ),
    Claim(
        id="batch-noise-regularizes-by-loss",
        statement="Likewise, where generalization is measured by the cross-entropy",
        source="Own; added after trials on seeds of no verdict in which the gap of accuracies "
        "hardly moved and that of losses did",
        criterion="As batch-noise-regularizes with losses: the gap is test less training loss, and "
        "(b) the test loss of groups of the size g* is below that of the whole batch. Not "
        "reproduced if the slope of the gap is surely 0 or below",
        expected="the gap rises, and drawn noise brings back half of it or more",
    ),
    Claim(
        id="reshuffling-regularizes",
        statement="Meeting other examples in each epoch regularizes a BN network",
        source="Paper section 4.2.1: about 1 % of validation accuracy",
        criterion="Test accuracy with groups drawn anew in each epoch, less that with groups drawn "
        "once, at g* and paired by seed. Reproduced if its interval lies above 0, and so does that "
        "of its excess over the same difference without BN, where groups share nothing but their "
        "batch. Not reproduced if the interval ends at 0 or below",
        expected="about 1 % for BN, nothing without it",
    ),
)

Records = Sequence[Mapping[str, Any]]


class Measure(NamedTuple):
    """A number by which networks are compared."""

    name: str
    of: Any  # (record) -> float
    unit: str = "points"


def _points(key: str):
    return lambda record: 100 * _number(record[key])


GAP = Measure("gap", lambda r: _points("train_accuracy")(r) - _points("test_accuracy")(r))
TEST = Measure("test accuracy", _points("test_accuracy"))
LOSS_GAP = Measure("loss gap", lambda r: _number(r["test_loss"]) - _number(r["train_loss"]), "nats")
TEST_LOSS = Measure("test loss", lambda r: _number(r["test_loss"]), "nats")
TRAIN = Measure("training accuracy", _points("train_accuracy"))
TRAIN_LOSS = Measure("training loss", lambda r: _number(r["train_loss"]), "nats")
DOSE = Measure("noise in the logits", lambda r: _number(r["dose"]), "of the signal's power")
MEASURES = (GAP, TEST, LOSS_GAP, TEST_LOSS, TRAIN, TRAIN_LOSS)

_WORDS = (
    "{gap} by doubling of groups",
    "{test} gained by g* over the whole batch",
    "{gap} recovered by measured noise, beyond half",
)


def ladder_arm(group_size: int) -> str:
    """Name of the arm whose examples share statistics by so many."""
    return f"BN, groups of {group_size}"


def by_seed(records: Records, arm: str, measure: Measure) -> np.ndarray:
    """A measure of an arm, shape=(seeds,)."""
    found = sorted((r for r in records if r["arm"] == arm), key=lambda record: record["seed"])
    return np.array([measure.of(record) for record in found])


def slopes(records: Records, sizes: Sequence[int], measure: Measure) -> np.ndarray:
    """Least-squares slope of a measure over log₂ of the group size, shape=(seeds,)."""
    values = np.stack([by_seed(records, ladder_arm(size), measure) for size in sizes])
    return np.polyfit(np.log2(sizes), values, 1)[0]


def recovery(records: Records, group_size: int, noise: str, measure: Measure) -> np.ndarray:
    """What of BN's change of a measure a noise brings back, shape=(seeds, 2).

    The columns are population less noise, and population less BN by groups; their quotient is the
    part recovered.
    """
    arms = (POPULATION, noise, ladder_arm(group_size))
    population, injected, groups = (by_seed(records, arm, measure) for arm in arms)
    return np.stack([population - injected, population - groups], axis=1)


def ratio_of_means(pairs: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    r"""Quotient of two means, with Fieller's interval.

    All ρ for which the mean of a − ρ·b does not differ from 0 by Student's t. Where the mean of b
    may be 0 that is no bounded interval, and (−∞, ∞) is given.

    Args:
        pairs: a and b of each seed, shape=(seeds, 2).
        confidence: Of the interval.

    Source: E. C. Fieller, "Some problems in interval estimation", J. R. Stat. Soc. B 16 (1954).
    """
    count = len(pairs)
    a, b = pairs.mean(axis=0)
    unknown = Estimate(float(a / b) if b else math.nan, -math.inf, math.inf, count)
    if count < 2:
        return unknown
    from scipy import special

    square = special.stdtrit(count - 1, (1 + confidence) / 2) ** 2 / count
    (aa, ab), (_, bb) = square * np.cov(pairs.T)
    # (a − ρb)² ≤ t²·Var(a − ρb)/n, a quadratic in ρ.
    p, q, r = b**2 - bb, a * b - ab, a**2 - aa
    if p <= 0 or q**2 < p * r:
        return unknown
    half = math.sqrt(q**2 - p * r)
    return Estimate(float(a / b), float((q - half) / p), float((q + half) / p), count)


def judge(config: Any, records: Mapping[str, Records]) -> list[Finding]:
    """Findings of CLAIMS, in their order.

    Args:
      config: of the run.
      records: of `regularization_groups.measure`.
    """
    main = records["main"]
    if not all(math.isfinite(measure.of(record)) for record in main for measure in MEASURES):
        note = f"a loss or an accuracy of some run is not finite{_lost(main)}"
        return [Finding(claim, {}, None, INCONCLUSIVE, note) for claim in CLAIMS]
    return [
        judge_noise(config, records, CLAIMS[0], GAP, TEST),
        judge_noise(config, records, CLAIMS[1], LOSS_GAP, TEST_LOSS),
        judge_reshuffling(config, main),
    ]


def judge_noise(
    config: Any, records: Mapping[str, Records], claim: Claim, gap: Measure, test: Measure
) -> Finding:
    """batch-noise-regularizes, by accuracies or by losses."""
    main, sizes, size = records["main"], config.groups_sizes, config.groups_size
    parts = slope, gain, margin = three_parts(config, main, gap, test)
    verdict = INCONCLUSIVE
    if slope.high * math.log2(sizes[-1] / sizes[0]) < FLAT if gap is GAP else slope.high <= 0:
        verdict = NOT_REPRODUCED
    elif min(part.low for part in parts) > 0:
        verdict = REPRODUCED
    measured: dict[str, float] = {}
    for words, found in zip(_WORDS, parts, strict=True):
        name = words.format(gap=gap.name, test=test.name)
        measured |= with_interval(f"{name}, {gap.unit}", found)
    for noise in INJECTED:
        part = ratio_of_means(recovery(main, size, noise, gap))
        measured |= with_interval(f"part of the {gap.name} recovered, {noise}", part)
    whole = ladder_arm(sizes[-1])
    for name, arm in (("no BN", PLAIN), ("population", POPULATION)):
        found = paired_difference(by_seed(main, arm, gap), by_seed(main, whole, gap))
        measured |= with_interval(f"{gap.name}, {name} less BN of the whole batch", found)
    note = (
        f"interval: of the slope, over {config.groups_seeds} seeds. g* = {size}, SGD batch "
        f"{sizes[-1]}, {config.groups_network}, {config.groups_examples} training examples, "
        f"{config.groups_steps} steps. {_rates(config, main)}. Measured, borrowed, additive: "
        "noise on population statistics, by the measured law, of another group, and for each "
        "element alone. A part recovered without a bounded interval has a change of the gap that "
        "may be 0"
    )
    if records["slower"]:
        found = estimate(slopes(records["slower"], sizes, gap))
        measured |= with_interval(f"{gap.name} by doubling at a lower rate, {gap.unit}", found)
        note += (
            f". Lower rate: that of the others divided by {config.groups_slower:g}, "
            f"{config.seeds} seeds"
        )
    measured |= _of_arms(main, (gap, test, TRAIN) if gap is GAP else (gap, test, TRAIN_LOSS, DOSE))
    return Finding(claim, measured, slope.interval, verdict, note + _lost(main))


def judge_reshuffling(config: Any, main: Records) -> Finding:
    """reshuffling-regularizes."""
    own = ladder_arm(config.groups_size)
    regrouped, frozen, plain, plain_frozen = (
        by_seed(main, arm, TEST) for arm in (own, FROZEN, PLAIN, PLAIN_FROZEN)
    )
    gain = paired_difference(regrouped, frozen)
    control = paired_difference(plain, plain_frozen)
    excess = paired_difference(regrouped - frozen, plain - plain_frozen)
    verdict = INCONCLUSIVE
    if gain.high <= 0:
        verdict = NOT_REPRODUCED
    elif min(gain.low, excess.low) > 0:
        verdict = REPRODUCED
    measured = {
        **with_interval("test accuracy gained by drawing anew, BN, points", gain),
        **with_interval("likewise without BN, points", control),
        **with_interval("excess of BN, points", excess),
    }
    for measure in (GAP, LOSS_GAP):
        found = paired_difference(by_seed(main, FROZEN, measure), by_seed(main, own, measure))
        name = f"{measure.name}, drawn once less anew, BN, {measure.unit}"
        measured |= with_interval(name, found)
    where = "inside" if gain.low <= PAPER <= gain.high else "outside"
    note = (
        f"interval: of BN's gain, over {config.groups_seeds} seeds; the paper's "
        f"{PAPER:g} % lies {where} it. Groups of {config.groups_size}; SGD batches are made of "
        f"other groups in each epoch in all arms. {_rates(config, main)}"
    )
    return Finding(CLAIMS[2], measured, gain.interval, verdict, note + _lost(main))


def three_parts(
    config: Any, main: Records, gap: Measure, test: Measure
) -> tuple[Estimate, Estimate, Estimate]:
    """The parts (a), (b) and (c) of the criterion, each to be above 0."""
    size, sizes = config.groups_size, config.groups_sizes
    sign = -1 if test is TEST_LOSS else 1
    arms = ladder_arm(size), ladder_arm(sizes[-1])
    own, whole = (sign * by_seed(main, arm, test) for arm in arms)
    injected, groups = recovery(main, size, "measured", gap).T
    slope = estimate(slopes(main, sizes, gap))
    return slope, paired_difference(own, whole), estimate(injected - RECOVERED * groups)


def _of_arms(main: Records, measures: Sequence[Measure]) -> dict[str, float]:
    """Measures of every arm, with intervals."""
    measured: dict[str, float] = {}
    for arm in dict.fromkeys(record["arm"] for record in main):
        for measure in measures:
            found = estimate(by_seed(main, arm, measure))
            measured |= with_interval(f"{measure.name}, {arm}", found)
    return measured


def _rates(config: Any, main: Records) -> str:
    """The rates in words, and which of them lie at an end of the grid."""
    grid, words = config.groups_rates, []
    for arm, name in ((ladder_arm(config.groups_sizes[-1]), "with BN"), (PLAIN, "without")):
        rate = next(record["rate"] for record in main if record["arm"] == arm)
        end = ", an end of the grid" if rate in (min(grid), max(grid)) else ""
        words.append(f"{format_number(rate)} {name}{end}")
    return f"Learning rate {'; '.join(words)}; chosen by validation accuracy on seeds apart"


def _lost(records: Records) -> str:
    lost = sum(record["diverged"] > 0 for record in records)
    if not lost:
        return ""
    return f". Of {len(records)} runs {lost} had steps that were not finite and not taken"


def with_interval(name: str, found: Estimate) -> dict[str, float]:
    """Three named numbers of an estimate."""
    return {name: found.mean, f"{name}, low": found.low, f"{name}, high": found.high}


def _number(value: float | None) -> float:
    """A number of the ledger, where None stands for one that was not finite."""
    return float("nan") if value is None else float(value)
