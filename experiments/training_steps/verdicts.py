"""The claims of `experiments.training_steps`, and how records of trainings decide them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_research.claims import Claim, Finding, paired_difference
from bn_research.claims.bounded import Bounded, Ratio, first_reaching, ratio
from bn_research.claims.estimate import Estimate
from bn_research.claims.finding import INCONCLUSIVE, conjunction, verdict_of
from bn_research.claims.judging import at_end, final, listed, numbers, with_intervals
from experiments.training_steps import Config
from experiments.training_steps.networks import LADDER, TUNED, TUNED_BN, switched

PLAIN, BASELINE, X5, X30, SIGMOID = LADDER
_SAME_RATE, _CHANGED = 1.5, 3.0  # times fewer steps
_LEARNED = 3  # times the accuracy of chance
_NEAR = 0.95  # of the best accuracy: a target that noise in a maximum hardly moves

_STEPS = (
    "steps until the test accuracy reaches the best of the plain network of the same seed; ratio "
    "plain over BN, geometric mean over seeds with its 95 % interval, a network that never gets "
    "there known by a bound"
)
_GUARD = (
    f"Inconclusive if the plain network has not learned: its best accuracy is below {_LEARNED} "
    "times chance"
)

CLAIMS = (
    Claim(
        id="fewer-steps-same-rate",
        statement="BN alone needs fewer training steps, at the same learning rate",
        source="Paper, figure 3: BN-Baseline 13.3e6 against 31.0e6 steps to 72.2 %, 2.3 times",
        criterion=f"{_STEPS}. Reproduced if the interval lies at {_SAME_RATE} or above; not "
        f"reproduced if it includes 1 or lies below. {_GUARD}",
        expected="2.3 on ImageNet",
    ),
    Claim(
        id="fewer-steps-tuned",
        statement="BN at five times the rate, and with the paper's changes, needs 14 times fewer "
        "training steps",
        source="Notes; Paper, figure 3: BN-x5 2.1e6 against 31.0e6 steps to 72.2 %, 14.8 times",
        criterion=f"{_STEPS}. Against the plain network at the base rate, and against the plain "
        "network at its own best rate (its own best accuracy the target then), tuned on a seed "
        f"apart. Reproduced if the first interval lies at {_CHANGED:g} or above and the second "
        f"above 1; not reproduced if one of the two lies at 1 or below. {_GUARD}",
        expected="14.8 on ImageNet, against the plain network at the base rate",
    ),
    Claim(
        id="fewer-steps-x30",
        statement="At 30 times the rate it still needs 11.5 times fewer, and ends higher",
        source="Paper, figure 3: BN-x30 2.7e6 steps to 72.2 %, and 74.8 % against 73.0 % of BN-x5",
        criterion=f"{_STEPS}. As fewer-steps-tuned, of BN-x30; and its final accuracy (mean over "
        "the last tenth of the run) exceeds that of BN-x5, by the paired interval over seeds. Not "
        "reproduced if one of the three surely fails: a ratio at 1 or below, an accuracy at or "
        f"below that of BN-x5. {_GUARD}",
        expected="11.5 on ImageNet, and 1.8 points",
    ),
)

Record = Mapping[str, Any]
Arms = Mapping[str, Sequence[Record]]  # by name of the network, a record for each seed


class Records(NamedTuple):
    """What a run has measured."""

    by_arm: Arms  # of the ladder, the tuned networks and every switch
    seconds: Mapping[str, float]  # of a training step of PLAIN, BASELINE and X5
    num_classes: int


def best(record: Record) -> float:
    """The highest test accuracy of a run."""
    return float(np.nanmax(np.array(record["accuracy"], np.float64), initial=0.0))


def steps_to(record: Record, target: float) -> Bounded:
    """Steps until the test accuracy is at least target."""
    return first_reaching(record["steps"], np.array(record["accuracy"], np.float64), target)


def fewer(baseline: Sequence[Record], records: Sequence[Record], targets: Sequence[float]) -> Ratio:
    """How many times fewer steps records need than baseline, to the target of each seed."""
    pairs = (zip(each, targets, strict=True) for each in (baseline, records))
    return ratio(*(list(itertools.starmap(steps_to, of)) for of in pairs))


def against(baseline: Sequence[Record], records: Sequence[Record], share: float = 1.0) -> Ratio:
    """As `fewer`, to this share of the best accuracy of the baseline's run of each seed."""
    return fewer(baseline, records, [share * best(record) for record in baseline])


def gain(records: Sequence[Record], baseline: Sequence[Record]) -> Estimate:
    """Final accuracy of records minus that of baseline, paired by seed."""
    # A run that was lost kept the weights of its last sound step, and counts with their accuracy.
    return paired_difference(numbers(records, _final_accuracy), numbers(baseline, _final_accuracy))


def _final_accuracy(record: Record) -> float:
    return final(record["accuracy"])


def contributions(config: Config, arms: Arms) -> dict[str, tuple[Ratio, Estimate]]:
    """For each change made alone to BN-Baseline: steps saved and accuracy gained by it.

    The target is the plain network's best accuracy at the base rate, as in the claims.
    """
    baseline, targets = arms[BASELINE], [best(record) for record in arms[PLAIN]]
    return {
        name: (fewer(baseline, arms[name], targets), gain(arms[name], baseline))
        for name in switched(config)
        if name in arms
    }


def judge(config: Config, records: Records) -> list[Finding]:
    """A finding for each claim, in their order."""
    arms = records.by_arm
    learned = numbers(arms[PLAIN], best).mean() >= _LEARNED / records.num_classes
    higher = gain(arms[X30], arms[X5])
    findings = []
    for claim, arm in zip(CLAIMS, (BASELINE, X5, X30), strict=True):
        base, tuned = (against(arms[baseline], arms[arm]) for baseline in (PLAIN, TUNED))
        measured = _measured(records, arm)
        verdicts = [_at_least(base, _CHANGED), _at_least(tuned, 1.0)]
        if arm == BASELINE:
            both = against(arms[TUNED], arms[TUNED_BN])
            measured = {"steps, both at their own best rate": both} | measured
            measured[f"rate, {TUNED_BN}"] = arms[TUNED_BN][0]["rate"]
            measured[f"best accuracy, {TUNED_BN}"] = numbers(arms[TUNED_BN], best).mean()
            refuted = _is_known(base) and base.low <= 1
            verdicts = [verdict_of(reproduced=base.low >= _SAME_RATE, refuted=refuted)]
        if arm == X5:
            for name, (steps, accuracy) in contributions(config, arms).items():
                measured[f"steps, {BASELINE} over {name} alone"] = steps
                measured[f"final accuracy, {name} alone − {BASELINE}"] = accuracy
            measured[f"best accuracy, {SIGMOID}"] = numbers(arms[SIGMOID], best).mean()
        if arm == X30:
            measured[f"final accuracy, {X30} − {X5}"] = higher
            verdicts.append(verdict_of(reproduced=higher.low > 0, refuted=higher.high <= 0))
        verdict = conjunction(*verdicts) if learned else INCONCLUSIVE
        note = _note(config, arms, arm)
        findings.append(Finding(claim, with_intervals(measured), base.interval, verdict, note))
    return findings


def _is_known(found: Ratio) -> bool:
    """Whether there is an interval: one seed alone gives none."""
    return found.interval != (0.0, np.inf)


def _at_least(found: Ratio, threshold: float) -> str:
    enough = found.low >= threshold and found.low > 1
    return verdict_of(reproduced=enough, refuted=_is_known(found) and found.high <= 1)


def _measured(records: Records, arm: str) -> dict[str, float | Ratio | Estimate]:
    arms, seconds = records.by_arm, records.seconds
    program = X5 if arm == X30 else arm  # the two differ in the rate
    faster = seconds[PLAIN] / seconds[program]
    measured: dict[str, float | Ratio | Estimate] = {}
    for baseline, words in ((PLAIN, "base rate"), (TUNED, "its own best rate")):
        of = f"plain at {words} over {arm}"
        measured[f"steps, {of}"] = found = against(arms[baseline], arms[arm])
        near = against(arms[baseline], arms[arm], _NEAR)
        measured[f"steps to {_NEAR:.0%} of the target, {of}"] = near
        known, low, high = (faster * x for x in (found.known, *found.interval))
        measured[f"wall-clock time, {of}"] = Estimate(known, low, high, found.pairs)
    for name in (PLAIN, TUNED, arm):
        measured[f"best accuracy, {name}"] = numbers(arms[name], best).mean()
        measured[f"final accuracy, {name}"] = numbers(arms[name], _final_accuracy).mean()
        measured[f"rate, {name}"] = arms[name][0]["rate"]
    measured[f"ms per step, {PLAIN}"] = 1e3 * seconds[PLAIN]
    measured[f"ms per step, {arm}"] = 1e3 * seconds[program]
    return measured


def _note(config: Config, arms: Arms, arm: str) -> str:
    note = (
        f"interval: of the ratio to plain at the base rate {config.base_rate:g}. Accuracy on "
        f"{config.eval_examples} test examples by running statistics, every "
        f"{config.steps_per_dispatch} of {config.num_steps} steps, which is the resolution of "
        f"every number of steps"
    )
    for name in (TUNED, TUNED_BN):
        rate = arms[name][0]["rate"]
        end = ", an end of the grid" if at_end(rate, config.learning_rates) else ""
        note += f". {name}: rate {rate:g}{end}"
    for baseline, words in ((PLAIN, "the base rate"), (TUNED, "its own best rate")):
        if censored := against(arms[baseline], arms[arm]).censored:
            note += (
                f". Of {len(arms[arm])} seeds {censored} never reached the best accuracy of "
                f"plain at {words}: there the ratio is an upper bound"
            )
    lost = {n: sum(r["diverged"] > 0 for r in arms[n]) for n in (*LADDER, TUNED, TUNED_BN)}
    told = [f"{count} of {name}" for name, count in lost.items() if count]
    return note + listed("Runs with steps that were not finite and not taken", told)
