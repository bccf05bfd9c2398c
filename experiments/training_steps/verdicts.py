"""The claims of `experiments.training_steps`, and how records of trainings decide them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.bounded import Bounded, Ratio, first_reaching, ratio
from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, paired_difference
from bn_research.claims.finding import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Finding,
    conjunction,
)
from experiments.training_steps.arms import (
    BASELINE,
    LADDER,
    PLAIN,
    SIGMOID,
    TUNED,
    TUNED_BN,
    X5,
    X30,
    switched,
)
from experiments.training_steps.training import final

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
Records = Mapping[str, Sequence[Record]]  # by arm, a record for each seed


def accuracies(record: Record) -> np.ndarray:
    """Test accuracy at each of the record's steps; NaN where it was not finite."""
    return np.array([np.nan if x is None else x for x in record["accuracy"]], np.float64)


def best(record: Record) -> float:
    """The highest test accuracy of a run."""
    return float(np.nanmax(accuracies(record), initial=0.0))


def steps_to(record: Record, target: float) -> Bounded:
    """Steps until the test accuracy is at least target."""
    return first_reaching(record["steps"], accuracies(record), target)


def fewer(
    baseline: Sequence[Record],
    records: Sequence[Record],
    targets: Sequence[float],
) -> Ratio:
    """How many times fewer steps records need than baseline, to the target of each seed."""
    return ratio(
        [steps_to(r, target) for r, target in zip(baseline, targets, strict=True)],
        [steps_to(r, target) for r, target in zip(records, targets, strict=True)],
    )


def against(baseline: Sequence[Record], records: Sequence[Record], share: float = 1.0) -> Ratio:
    """As `fewer`, to this share of the best accuracy of the baseline's run of each seed."""
    return fewer(baseline, records, [share * best(record) for record in baseline])


def gain(records: Sequence[Record], baseline: Sequence[Record]) -> Estimate:
    """Final accuracy of records minus that of baseline, paired by seed."""
    # A run that was lost kept the weights of its last sound step, and counts with their accuracy.
    return paired_difference(
        *([final(list(accuracies(r))) for r in rs] for rs in (records, baseline))
    )


def judge(
    config: Any, records: Records, seconds: Mapping[str, float], num_classes: int
) -> list[Finding]:
    """The findings of all claims.

    Args:
      config: of the run.
      records: of the ladder, of `TUNED` and of every switch.
      seconds: of a training step of `PLAIN`, `BASELINE` and `X5`.
      num_classes: of the data set.
    """
    learned = np.mean([best(r) for r in records[PLAIN]]) >= _LEARNED / num_classes
    note = _note(config, records)
    findings = []
    for claim, arm in zip(CLAIMS, (BASELINE, X5, X30), strict=True):
        base = against(records[PLAIN], records[arm])
        tuned = against(records[TUNED], records[arm])
        higher = gain(records[X30], records[X5])
        verdicts = {
            BASELINE: [_same_rate(base)],
            X5: [_at_least(base, _CHANGED), _at_least(tuned, 1.0)],
            X30: [_at_least(base, _CHANGED), _at_least(tuned, 1.0), _positive(higher)],
        }[arm]
        measured = _measured(records, seconds, arm)
        if arm == BASELINE:
            both = against(records[TUNED], records[TUNED_BN])
            measured = _ratio_numbers("steps, both at their own best rate", both) | measured
            measured[f"rate, {TUNED_BN}"] = float(records[TUNED_BN][0]["rate"])
            measured[f"best accuracy, {TUNED_BN}"] = float(
                np.mean([best(r) for r in records[TUNED_BN]])
            )
        if arm == X5:
            measured |= _contributions(config, records) | _sigmoid(records)
        if arm == X30:
            measured |= _numbers(f"final accuracy, {X30} − {X5}", higher.mean, *higher.interval)
        verdict = conjunction(*verdicts) if learned else INCONCLUSIVE
        findings.append(Finding(claim, measured, base.interval, verdict, note[arm]))
    return findings


def _is_known(found: Ratio) -> bool:
    """Whether there is an interval: one seed alone gives none."""
    return found.interval != (0.0, np.inf)


def _same_rate(found: Ratio) -> str:
    if _is_known(found) and found.low <= 1:
        return NOT_REPRODUCED
    return REPRODUCED if found.low >= _SAME_RATE else INCONCLUSIVE


def _at_least(found: Ratio, threshold: float) -> str:
    if _is_known(found) and found.high <= 1:
        return NOT_REPRODUCED
    return REPRODUCED if found.low >= threshold and found.low > 1 else INCONCLUSIVE


def _positive(found: Estimate) -> str:
    if found.high <= 0:
        return NOT_REPRODUCED
    return REPRODUCED if found.low > 0 else INCONCLUSIVE


def _numbers(name: str, mean: float, low: float, high: float) -> dict[str, float]:
    return {name: mean, f"{name}, low": low, f"{name}, high": high}


def _ratio_numbers(name: str, found: Ratio, factor: float = 1.0) -> dict[str, float]:
    """A ratio with its interval; of one that is a bound only, the end that is known."""
    return _numbers(name, *(factor * x for x in (found.known, *found.interval)))


def _measured(records: Records, seconds: Mapping[str, float], arm: str) -> dict[str, float]:
    measured: dict[str, float] = {}
    program = X5 if arm == X30 else arm  # the two differ in the rate
    for baseline, words in ((PLAIN, "base rate"), (TUNED, "its own best rate")):
        of = f"plain at {words} over {arm}"
        found = against(records[baseline], records[arm])
        measured |= _ratio_numbers(f"steps, {of}", found)
        near = against(records[baseline], records[arm], _NEAR)
        measured |= _ratio_numbers(f"steps to {_NEAR:.0%} of the target, {of}", near)
        faster = seconds[PLAIN] / seconds[program]
        measured |= _ratio_numbers(f"wall-clock time, {of}", found, faster)
    for name in (PLAIN, TUNED, arm):
        measured[f"best accuracy, {name}"] = float(np.mean([best(r) for r in records[name]]))
        measured[f"final accuracy, {name}"] = float(
            np.mean([final(list(accuracies(r))) for r in records[name]])
        )
        measured[f"rate, {name}"] = float(records[name][0]["rate"])
    measured[f"ms per step, {PLAIN}"] = 1e3 * seconds[PLAIN]
    measured[f"ms per step, {arm}"] = 1e3 * seconds[program]
    return measured


def _contributions(config: Any, records: Records) -> dict[str, float]:
    """What each change does alone, made to BN-Baseline."""
    measured: dict[str, float] = {}
    for name, (found, accuracy) in contributions(config, records).items():
        measured |= _ratio_numbers(f"steps, {BASELINE} over {name} alone", found)
        measured |= _numbers(
            f"final accuracy, {name} alone − {BASELINE}", accuracy.mean, *accuracy.interval
        )
    return measured


def contributions(config: Any, records: Records) -> dict[str, tuple[Ratio, Estimate]]:
    """For each change made alone to BN-Baseline: steps saved and accuracy gained by it.

    The target is the plain network's best accuracy at the base rate, as in the claims.
    """
    targets = [best(record) for record in records[PLAIN]]
    return {
        name: (
            fewer(records[BASELINE], records[name], targets),
            gain(records[name], records[BASELINE]),
        )
        for name in switched(config)
        if name in records
    }


def _sigmoid(records: Records) -> dict[str, float]:
    return {f"best accuracy, {SIGMOID}": float(np.mean([best(r) for r in records[SIGMOID]]))}


def _note(config: Any, records: Records) -> dict[str, str]:
    """For the arm of each claim."""
    shared = (
        f"interval: of the ratio to plain at the base rate {config.base_rate:g}. Accuracy on "
        f"{config.eval_examples} test examples by running statistics, every "
        f"{config.steps_per_dispatch} of {config.num_steps} steps, which is the resolution of "
        f"every number of steps"
    )
    for name in (TUNED, TUNED_BN):
        rate = records[name][0]["rate"]
        at_end = rate in (min(config.learning_rates), max(config.learning_rates))
        shared += f". {name}: rate {rate:g}{', an end of the grid' if at_end else ''}"
    notes = {}
    for arm in (BASELINE, X5, X30):
        notes[arm] = shared
        for baseline, words in ((PLAIN, "the base rate"), (TUNED, "its own best rate")):
            censored = against(records[baseline], records[arm]).censored
            if censored:
                notes[arm] += (
                    f". Of {len(records[arm])} seeds {censored} never reached the best accuracy of "
                    f"plain at {words}: there the ratio is an upper bound"
                )
        lost = {
            name: sum(r["diverged"] > 0 for r in records[name])
            for name in (*LADDER, TUNED, TUNED_BN)
        }
        told = [f"{count} of {name}" for name, count in lost.items() if count]
        if told:
            notes[arm] += f". Runs with steps that were not finite and not taken: {', '.join(told)}"
    return notes
