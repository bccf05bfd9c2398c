"""The claim of `experiments.whitening`, and how records decide it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_research.claims.bounded import Bounded, Ratio, first_reaching, ratio
from bn_research.claims.claim import Claim
from bn_research.claims.estimate import estimate, paired_difference
from bn_research.claims.finding import INCONCLUSIVE, Finding, conjunction, decide
from bn_research.claims.formatting import format_interval, format_number
from bn_research.claims.judging import Record, at_end, by_seed, listed, numbers, with_intervals
from bn_research.normalization.input_whitening import TRANSFORMS
from experiments.whitening import Config

PLACES: dict[Any, str] = {"none": "without BN", "hidden": "BN on hidden layers"}  # of BN
_DEVIATION = 0.02  # of steps and eigenvalues from theory
_DOMINATES = 10.0  # ‖μ‖² over the largest variance, from which the first order is held to that
_COMPARED = (("raw", "scaled"), ("raw", "zca"), ("scaled", "zca"), ("zca", "pca"))

CLAIMS = (
    Claim(
        id="whitened-inputs-converge-faster",
        statement="Networks converge faster on whitened inputs",
        source="Notes, after LeCun et al. (1998), sections 4 and 5",
        criterion="Reproduced if (a) in linear regression no number of steps to 1e-6 deviates by "
        "more than 2 % (or one step) from ln(1e-6)/ln((κ − 1)/(κ + 1)), nor the top eigenvalue of "
        "inputs with a mean that dominates by more than 2 % from its first order, and (b) without "
        "BN the ratios of steps to the target loss raw/scaled, raw/zca and scaled/zca are at least "
        "1, each at its own best rate (intervals over seeds). Not reproduced if (a) fails or one "
        "of these ratios is surely below 1: the order is reversed",
        expected="(a) as predicted; (b) raw > scaled ≥ whitened",
    ),
)


class Records(NamedTuple):
    """Of a run."""

    regressions: Sequence[Record]  # by seed
    spectra: Mapping[str, Record]  # of E[x̃·x̃ᵀ], by kind of inputs
    trained: Sequence[Record]  # with their `placement` and `inputs`


def smoothed(record: Record, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean training loss of the last `window` of them; NaN where one was lost."""
    loss = np.array(record["loss"], np.float64)
    if len(loss) < window:
        return np.array([window]), np.full(1, np.nan)
    mean = np.convolve(loss, np.full(window, 1 / window), "valid")
    return np.arange(window, len(loss) + 1), mean


def other(epsilon: float) -> str:
    """Name of the inputs that are ZCA-whitened with another ε."""
    return f"zca, ε {epsilon:g}"


def kinds(config: Config) -> tuple[str, ...]:
    """Names of all inputs, in the order of the figures."""
    return *TRANSFORMS, *map(other, config.other_epsilons)


def steps_to_target(config: Config, record: Record, target: float | None = None) -> Bounded:
    """Steps until the averaged loss is at most the target; a bound where it never is.

    A run that was lost ends early, but would not have got there later either: its bound is that of
    the others, num_steps.
    """
    steps, loss = smoothed(record, config.window)
    found = first_reaching(steps, -loss, -(config.target_loss if target is None else target))
    return found._replace(low=float(config.num_steps)) if found.is_censored else found


def steps_of(
    config: Config, records: Records, placement: str, name: str, target: float | None = None
) -> list[Bounded]:
    """Steps to a target of each seed on one kind of inputs."""
    runs = by_seed(records.trained, placement=placement, inputs=name)
    return [steps_to_target(config, record, target) for record in runs]


def steps_ratio(
    config: Config, records: Records, a: str, b: str, target: float | None = None, on: str = "none"
) -> Ratio:
    """Steps to a target on inputs a over those on inputs b, with BN placed on these layers."""
    return ratio(*(steps_of(config, records, on, name, target) for name in (a, b)))


def choose(config: Config, records: Sequence[Record]) -> float:
    """The rate that reached the target in the fewest steps, else the one with the lowest loss."""

    def cost(record: Record) -> tuple[bool, float, float]:
        steps = steps_to_target(config, record)
        last = smoothed(record, config.window)[1][-1]
        lost = record["diverged"] or not np.isfinite(last)
        return steps.is_censored, steps.low, math.inf if lost else last

    return min(records, key=cost)["learning_rate"]


def judge(config: Config, records: Records) -> list[Finding]:
    """whitened-inputs-converge-faster."""
    settings = [setting for record in records.regressions for setting in record["settings"]]
    worst_steps = max(map(_steps_deviation, settings))
    dominated = filter(_is_dominated, settings)
    off = [abs(s["top_eigenvalue"] / s["mean_eigenvalue"] - 1) for s in dominated]
    worst_eigenvalue = max(off, default=math.nan)
    theory = decide((worst_steps,) * 2, at_most=_DEVIATION)
    first_order = decide((worst_eigenvalue,) * 2, at_most=_DEVIATION) if off else INCONCLUSIVE
    ratios = {
        _where(placement, f"{a}/{b}"): steps_ratio(config, records, a, b, on=placement)
        for placement in PLACES
        for a, b in _COMPARED
    }
    order = [decide(ratios[f"{a}/{b}"].interval, at_least=1) for a, b in _COMPARED[:3]]
    named = {f"steps {name}": found for name, found in ratios.items()}
    on_raw = (steps_of(config, records, placement, "raw") for placement in PLACES)
    named["steps raw/raw with BN"] = ratio(*on_raw)
    first = ("steps raw/zca", "steps raw/scaled", "steps scaled/zca", "steps raw/raw with BN")
    measured = {name: named[name].known for name in first}
    measured["largest deviation of steps from theory"] = worst_steps
    measured["largest deviation of the mean's eigenvalue"] = worst_eigenvalue
    for kind in map(other, config.other_epsilons):
        for a in ("raw", "scaled"):
            named[f"steps {a}/{kind}"] = steps_ratio(config, records, a, kind)
    for target in config.other_targets:
        for a, b in _COMPARED[:3]:
            found = steps_ratio(config, records, a, b, target)
            named[f"steps {a}/{b} to a loss of {target:g}"] = found
    measured |= with_intervals(named)
    steps, ends = [], []  # for the note
    for placement, name in itertools.product(PLACES, kinds(config)):
        runs = by_seed(records.trained, placement=placement, inputs=name)
        where = _where(placement, name)
        measured[f"best rate, {where}"] = runs[0]["learning_rate"]
        measured[f"test accuracy, {where}"] = float(numbers(runs, "accuracy").mean())
        steps.append(f"{where} {_in_words(steps_of(config, records, placement, name))}")
        if at_end(runs[0]["learning_rate"], config.rates):
            ends.append(where)
    for name, spectrum in records.spectra.items():
        measured[f"condition number, {name}"] = spectrum["condition_number"]
    raw, *others = (
        numbers(by_seed(records.trained, placement="none", inputs=name), "accuracy")
        for name in ("raw", "scaled", "zca")
    )
    better = map("{} {}".format, ("scaled", "zca"), (paired_difference(a, raw) for a in others))
    lost = sum(record["diverged"] > 0 for record in records.trained)
    missed = sum(steps_to_target(config, record).is_censored for record in records.trained)
    note = (
        f"interval: over seeds, of steps raw/zca to a loss of {config.target_loss:g}. Regression: "
        f"{len(settings)} settings. Steps, mean [range]: {'; '.join(steps)}. "
        f"Ratios: {'; '.join(f'{name} {found}' for name, found in ratios.items())}. "
        f"Test accuracy less that on raw: {'; '.join(better)}. "
        f"{lost} runs had a step that was not finite, {missed} did not reach the target"
    )
    note += listed("Best rate at an end of the grid", ends)
    verdict = conjunction(theory, first_order, *order)
    return [Finding(CLAIMS[0], measured, ratios["raw/zca"].interval, verdict, note)]


def _in_words(found: Sequence[Bounded]) -> str:
    if any(steps.is_censored for steps in found):
        return ", ".join(map(str, found))
    lows = [steps.low for steps in found]
    ends = format_interval((min(lows), max(lows)))
    return f"{format_number(round(estimate(lows).mean))} {ends}"


def _where(placement: str, name: str) -> str:
    return f"{name}, BN" if placement == "hidden" else name


def _steps_deviation(setting: Record) -> float:
    """Relative deviation beyond the one step that rounding may cost; inf where it never ended."""
    if setting["measured_steps"] is None:
        return math.inf
    off = abs(setting["measured_steps"] - setting["predicted_steps"])
    return 0.0 if off <= 1 else off / setting["predicted_steps"]


def _is_dominated(setting: Record) -> bool:
    largest = math.sqrt(setting["kappa"])
    return setting["name"] == "raw" and setting["mean_norm"] ** 2 >= _DOMINATES * largest
