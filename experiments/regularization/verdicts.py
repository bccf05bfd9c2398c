"""Claims about groups, noise and dropout, and how records decide them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate, paired_difference, ratio_of_means
from bn_research.claims.finding import INCONCLUSIVE, Finding, conjunction, decide, verdict_of
from bn_research.claims.formatting import format_number
from bn_research.claims.judging import at_end, by_seed, listed, lost, numbers, with_intervals
from experiments.regularization import Config

FLAT = 0.5  # points of accuracy: half of the paper's 1 %
RECOVERED = 0.5  # part of the gap's change that noise of the measured law must bring back
PAPER = 1.0  # points of validation accuracy, "about 1 %", of shuffling anew
UNSHIFTED = 0.05  # of |ratio − 1|: up to it a BN layer counts as left alone

# Arms of the groups, beside those of `ladder_arm`.
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
    Claim(
        id="less-need-for-dropout",
        statement="BN reduces the need for dropout",
        source="Notes on Ioffe & Szegedy (2015); Paper section 3.4",
        criterion="Two by two, BN × dropout, each cell at the learning rate, and the two with "
        "dropout at the dropout rate above 0, of the highest validation accuracy on seeds apart. "
        "Dropout's gain in test accuracy without BN, less that with BN, paired by seed. Reproduced "
        "if the interval over seeds lies above 0; not reproduced if it ends at 0 or below",
        expected="dropout gains less with BN",
    ),
    Claim(
        id="dropout-before-bn-shifts-variance",
        statement="Below a BN layer, dropout makes its statistics wrong in inference; above the "
        "last one it does not",
        source="Li et al. (2018), arXiv 1801.05134; the margin is this project's",
        criterion="Variance of a BN layer's input in inference over that of its population "
        "statistics, taken with dropout on; median over units, ratio r of each layer. Reproduced "
        f"if |r − 1| is at least {UNSHIFTED} in every layer with dropout below it (dropout before "
        "every BN: all; after every activation: all but the first), and with dropout after the "
        f"last hidden layer at most {UNSHIFTED} in all (intervals over seeds, of the smallest "
        "and the largest). Not reproduced if one of the two is surely violated",
        expected="r ≤ 1 − p where dropout is right before BN; r = 1 above the last BN",
    ),
)

Runs = Sequence[Mapping[str, Any]]
Records = Mapping[str, Runs]


def judge(config: Config, records: Records) -> list[Finding]:
    """Findings of CLAIMS, in their order."""
    return [
        *judge_groups(config, records),
        judge_need(config, records["dropout"]),
        judge_shift(config, records),
    ]


class Measure(NamedTuple):
    """A number by which networks are compared."""

    name: str
    key: str  # of a record
    less: str = ""  # that is subtracted from it
    factor: float = 1
    unit: str = "nats"

    def of(self, runs: Runs) -> np.ndarray:
        """Of each run."""
        found = self.factor * numbers(runs, self.key)
        return found - self.factor * numbers(runs, self.less) if self.less else found

    def of_arm(self, runs: Runs, arm: str) -> np.ndarray:
        """Of the runs of an arm, in the order of their seeds."""
        return self.of(by_seed(runs, arm=arm))


GAP = Measure("gap", "train_accuracy", less="test_accuracy", factor=100, unit="points")
TEST = Measure("test accuracy", "test_accuracy", factor=100, unit="points")
TRAIN = Measure("training accuracy", "train_accuracy", factor=100, unit="points")
LOSS_GAP = Measure("loss gap", "test_loss", less="train_loss")
TEST_LOSS = Measure("test loss", "test_loss")
TRAIN_LOSS = Measure("training loss", "train_loss")
DOSE = Measure("noise in the logits", "dose", unit="of the signal's power")


def ladder_arm(group_size: int) -> str:
    """Name of the arm whose examples share statistics by so many."""
    return f"BN, groups of {group_size}"


def slopes(runs: Runs, sizes: Sequence[int], measure: Measure) -> np.ndarray:
    """Least-squares slope of a measure over log₂ of the group size, shape=(seeds,)."""
    values = np.stack([measure.of_arm(runs, ladder_arm(size)) for size in sizes])
    return np.polyfit(np.log2(sizes), values, 1)[0]


def recovery(runs: Runs, group_size: int, noise: str, measure: Measure) -> list[np.ndarray]:
    """A measure by population statistics, less that by a noise, and less that of BN by groups.

    The quotient is the part of BN's change of the measure that the noise brings back.
    """
    population = measure.of_arm(runs, POPULATION)
    return [population - measure.of_arm(runs, arm) for arm in (noise, ladder_arm(group_size))]


def judge_groups(config: Config, records: Records) -> list[Finding]:
    """Findings of the first three claims."""
    main = records["groups"]
    measures = (GAP, TEST, LOSS_GAP, TEST_LOSS, TRAIN, TRAIN_LOSS)
    if not all(np.isfinite(measure.of(main)).all() for measure in measures):
        note = f"a loss or an accuracy of some run is not finite{lost(main)}"
        return [Finding(claim, {}, None, INCONCLUSIVE, note) for claim in CLAIMS[:3]]
    return [
        _judge_noise(config, records, CLAIMS[0], GAP, TEST),
        _judge_noise(config, records, CLAIMS[1], LOSS_GAP, TEST_LOSS),
        _judge_reshuffling(config, main),
    ]


def _judge_noise(
    config: Config, records: Records, claim: Claim, gap: Measure, test: Measure
) -> Finding:
    """By accuracies or by losses."""
    main, sizes, size = records["groups"], config.groups_sizes, config.groups_size
    whole = ladder_arm(sizes[-1])
    sign = -1 if test is TEST_LOSS else 1
    own, of_whole = (sign * test.of_arm(main, arm) for arm in (ladder_arm(size), whole))
    injected, groups = recovery(main, size, "measured", gap)
    slope = estimate(slopes(main, sizes, gap))
    gain = paired_difference(own, of_whole)
    margin = estimate(injected - RECOVERED * groups)
    rise = slope.high * math.log2(sizes[-1] / sizes[0])
    verdict = verdict_of(
        reproduced=min(part.low for part in (slope, gain, margin)) > 0,
        refuted=rise < FLAT if gap is GAP else slope.high <= 0,
    )
    found = {
        f"{gap.name} by doubling of groups, {gap.unit}": slope,
        f"{test.name} gained by g* over the whole batch, {gap.unit}": gain,
        f"{gap.name} recovered by measured noise, beyond half, {gap.unit}": margin,
    }
    for noise in INJECTED:
        part = ratio_of_means(*recovery(main, size, noise, gap))
        found[f"part of the {gap.name} recovered, {noise}"] = part
    for name, arm in (("no BN", PLAIN), ("population", POPULATION)):
        difference = paired_difference(gap.of_arm(main, arm), gap.of_arm(main, whole))
        found[f"{gap.name}, {name} less BN of the whole batch"] = difference
    note = (
        f"interval: of the slope, over {config.groups_seeds} seeds. g* = {size}, SGD batch "
        f"{sizes[-1]}, {config.groups_network}, {config.groups_examples} training examples, "
        f"{config.groups_steps} steps. {_rates(config, main)}. Measured, borrowed, additive: "
        "noise on population statistics, by the measured law, of another group, and for each "
        "element alone. A part recovered without a bounded interval has a change of the gap that "
        "may be 0"
    )
    if records["groups_slower"]:
        lower = estimate(slopes(records["groups_slower"], sizes, gap))
        found[f"{gap.name} by doubling at a lower rate, {gap.unit}"] = lower
        divided = f"divided by {config.groups_slower:g}, {config.seeds} seeds"
        note += f". Lower rate: that of the others {divided}"
    others = (TRAIN,) if gap is GAP else (TRAIN_LOSS, DOSE)
    for arm in dict.fromkeys(run["arm"] for run in main):
        for measure in (gap, test, *others):
            found[f"{measure.name}, {arm}"] = estimate(measure.of_arm(main, arm))
    return Finding(claim, with_intervals(found), slope.interval, verdict, note + lost(main))


def _judge_reshuffling(config: Config, main: Runs) -> Finding:
    own = ladder_arm(config.groups_size)
    arms = (own, FROZEN, PLAIN, PLAIN_FROZEN)
    regrouped, frozen, plain, plain_frozen = (TEST.of_arm(main, arm) for arm in arms)
    gain = paired_difference(regrouped, frozen)
    excess = paired_difference(regrouped - frozen, plain - plain_frozen)
    found = {
        "test accuracy gained by drawing anew, BN, points": gain,
        "likewise without BN, points": paired_difference(plain, plain_frozen),
        "excess of BN, points": excess,
    }
    for measure in (GAP, LOSS_GAP):
        name = f"{measure.name}, drawn once less anew, BN, {measure.unit}"
        found[name] = paired_difference(measure.of_arm(main, FROZEN), measure.of_arm(main, own))
    where = "inside" if gain.low <= PAPER <= gain.high else "outside"
    note = (
        f"interval: of BN's gain, over {config.groups_seeds} seeds; the paper's "
        f"{PAPER:g} % lies {where} it. Groups of {config.groups_size}; SGD batches are made of "
        f"other groups in each epoch in all arms. {_rates(config, main)}"
    )
    verdict = verdict_of(reproduced=min(gain.low, excess.low) > 0, refuted=gain.high <= 0)
    return Finding(CLAIMS[2], with_intervals(found), gain.interval, verdict, note + lost(main))


def _rates(config: Config, main: Runs) -> str:
    """The rates in words, and which of them lie at an end of the grid."""
    words = []
    for arm, name in ((ladder_arm(config.groups_sizes[-1]), "with BN"), (PLAIN, "without")):
        rate = by_seed(main, arm=arm)[0]["rate"]
        end = ", an end of the grid" if at_end(rate, config.groups_rates) else ""
        words.append(f"{format_number(rate)} {name}{end}")
    return f"Learning rate {'; '.join(words)}; chosen by validation accuracy on seeds apart"


CELLS = {  # of two by two: the norm, and whether there is dropout
    "no BN, no dropout": ("none", False),
    "no BN, dropout": ("none", True),
    "BN, no dropout": ("batch", False),
    "BN, dropout": ("batch", True),
}
PLACED = {
    "before": "before every BN",
    "after": "after every activation",
    "last": "after the last hidden layer",
}


def of_cell(runs: Runs, cell: str) -> Runs:
    """The runs of a cell, at whatever rates, in the order of their seeds."""
    norm, dropout = CELLS[cell]
    return [run for run in by_seed(runs, norm=norm) if (run["dropout"] > 0) == dropout]


def gains(runs: Runs) -> tuple[Estimate, Estimate, Estimate]:
    """Dropout's gain in test accuracy without BN, with BN, and their difference; by seed."""
    off, on, bn_off, bn_on = (numbers(of_cell(runs, cell), "test_accuracy") for cell in CELLS)
    plain, bn = on - off, bn_on - bn_off
    return estimate(plain), estimate(bn), paired_difference(plain, bn)


def judge_need(config: Config, runs: Runs) -> Finding:
    """less-need-for-dropout."""
    plain, bn, interaction = gains(runs)
    found = {
        "dropout's gain without BN less that with BN": interaction,
        "dropout's gain without BN": plain,
        "dropout's gain with BN": bn,
    }
    ends = []
    for cell, (_, dropout) in CELLS.items():
        own = of_cell(runs, cell)
        found[f"test accuracy, {cell}"] = estimate(numbers(own, "test_accuracy"))
        for measure in (TRAIN, TEST_LOSS, TRAIN_LOSS):
            found[f"{measure.name}, {cell}"] = numbers(own, measure.key).mean()
        for field, words, grid in (
            ("rate", "learning rate", config.dropout_learning_rates),
            ("dropout", "dropout rate", config.dropout_rates),
        )[: 1 + dropout]:
            value = own[0][field]
            found[f"{words}, {cell}"] = value
            if at_end(value, grid):
                ends.append(f"{words} {format_number(value)} ({cell})")
    note = (
        f"interval: over {config.dropout_seeds} seeds. {config.dropout_network}, "
        f"{config.dropout_examples} training examples, batch {config.dropout_batch_size}, "
        f"{config.dropout_steps} steps; dropout placed {PLACED[config.dropout_placement]}. Losses "
        "and accuracies in inference mode, by population statistics"
    )
    if plain.low <= 0:
        note += ". Dropout's own gain without BN is not surely above 0 here"
    note += listed("Chosen at an end of its grid", ends) + lost(runs)
    verdict = verdict_of(reproduced=interaction.low > 0, refuted=interaction.high <= 0)
    return Finding(CLAIMS[3], with_intervals(found), interaction.interval, verdict, note)


def shifted(placement: str, layers: int) -> list[int]:
    """Indices of the BN layers that have dropout below them."""
    return list(range({"before": 0, "after": 1, "last": layers}[placement], layers))


def accuracy_lost(runs: Runs) -> Estimate:
    """Test accuracy by statistics taken with dropout off, less that with dropout on; paired."""
    return paired_difference(numbers(runs, "off_accuracy"), numbers(runs, "test_accuracy"))


def judge_shift(config: Config, records: Records) -> Finding:
    """dropout-before-bn-shifts-variance."""
    runs = records["shift"]
    shift = {place: by_seed(runs, dropout_placement=place) for place in PLACED}
    ratios = {place: numbers(of_place, "ratio") for place, of_place in shift.items()}
    if not all(np.isfinite(r).all() for r in ratios.values()):
        note = f"a layer's variance is not finite or 0 in some run{lost(runs)}"
        return Finding(CLAIMS[4], {}, None, INCONCLUSIVE, note)
    layers = ratios["last"].shape[1]
    below = np.hstack([ratios[place][:, shifted(place, layers)] for place in PLACED])
    smallest = estimate(np.abs(below - 1).min(axis=1))
    largest = estimate(np.abs(ratios["last"] - 1).max(axis=1))
    found = {
        "smallest |r − 1|, dropout below": smallest,
        "largest |r − 1|, dropout after the last hidden layer": largest,
    }
    for place, of_place in shift.items():
        for layer, ratio in enumerate(ratios[place].T, start=1):
            found[f"r of BN {layer}, dropout {PLACED[place]}"] = estimate(ratio)
        found[f"accuracy lost to the shift, dropout {PLACED[place]}"] = accuracy_lost(of_place)
    closed = numbers(shift["before"], "population_over_closed_form")
    for layer, values in enumerate(closed.T, start=1):
        found[f"population variance over its closed form, BN {layer}"] = estimate(values)
    tuned = of_cell(records["dropout"], "BN, dropout")
    found["accuracy lost to the shift, tuned cell"] = accuracy_lost(tuned)
    note = (
        f"interval: over {config.seeds} seeds, of the smallest |r − 1| of all BN layers with "
        f"dropout below. Dropout {format_number(runs[0]['dropout'])}, learning rate "
        f"{format_number(runs[0]['rate'])}, that of BN without dropout. Accuracy lost: on the test "
        "set by statistics taken anew with dropout off, less that by statistics taken with it on. "
        "Closed form, of dropout right before BN: (Var z + p·(E z)²)/(1 − p), z the "
        "pre-activation in training"
    )
    verdict = conjunction(decide(smallest, at_least=UNSHIFTED), decide(largest, at_most=UNSHIFTED))
    return Finding(CLAIMS[4], with_intervals(found), smallest.interval, verdict, note + lost(runs))
