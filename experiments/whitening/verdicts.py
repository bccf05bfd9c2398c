"""The claim of `experiments.whitening`, and how records decide it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.bounded import Bounded, Ratio, first_reaching, ratio
from bn_research.claims.claim import Claim
from bn_research.claims.estimate import estimate, paired_difference
from bn_research.claims.finding import INCONCLUSIVE, Finding, conjunction, decide
from bn_research.claims.formatting import format_interval, format_number
from experiments.whitening.inputs import TRANSFORMS

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


def smoothed(record: Mapping[str, Any], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean training loss of the last `window` of them; NaN where one was lost."""
    loss = np.array([np.nan if x is None else x for x in record["loss"]], np.float64)
    steps = np.arange(window, max(len(loss), window) + 1)
    if len(loss) < window:
        return steps, np.full(1, np.nan)
    return steps, np.convolve(loss, np.full(window, 1 / window), "valid")


def other(epsilon: float) -> str:
    """Name of the inputs that are ZCA-whitened with another ε."""
    return f"zca, ε {epsilon:g}"


def kinds(config: Any) -> tuple[str, ...]:
    """Names of all inputs, in the order of the figures."""
    return *TRANSFORMS, *map(other, config.other_epsilons)


def steps_to_target(config: Any, record: Mapping[str, Any], target: float | None = None) -> Bounded:
    """Steps until the averaged loss is at most the target; a bound where it never is.

    A run that was lost ends early, but would not have got there later either: its bound is that of
    the others, num_steps.
    """
    target = config.target_loss if target is None else target
    found = first_reaching(*_negated(smoothed(record, config.window)), -target)
    return found._replace(low=float(config.num_steps)) if found.is_censored else found


def _negated(curve: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return curve[0], -curve[1]


def choose(config: Any, records: Sequence[Mapping[str, Any]]) -> float:
    """The rate that reached the target in the fewest steps, else the one with the lowest loss."""

    def cost(record):
        steps = steps_to_target(config, record)
        last = smoothed(record, config.window)[1][-1]
        last = last if np.isfinite(last) and not record["diverged"] else np.inf
        return steps.is_censored, steps.low, last

    return min(records, key=cost)["learning_rate"]


def judge(
    config: Any,
    regressions: Sequence[Mapping[str, Any]],
    spectra: Mapping[str, Mapping[str, Any]],
    trained: Sequence[Mapping[str, Any]],
) -> Finding:
    """whitened-inputs-converge-faster."""
    settings = [setting for record in regressions for setting in record["settings"]]
    worst_steps = max(map(_steps_deviation, settings))
    dominated = [s for s in settings if _is_dominated(s)]
    worst_eigenvalue = max(map(_eigenvalue_deviation, dominated), default=np.nan)
    theory = decide((worst_steps, worst_steps), at_most=_DEVIATION)
    if dominated:
        theory = conjunction(
            theory, decide((worst_eigenvalue, worst_eigenvalue), at_most=_DEVIATION)
        )
    else:
        theory = conjunction(theory, INCONCLUSIVE)
    ratios = {
        (placement, a, b): steps_ratio(config, trained, placement, a, b)
        for placement in ("none", "hidden")
        for a, b in _COMPARED
    }
    order = [ratios["none", a, b] for a, b in _COMPARED[:3]]
    verdict = conjunction(theory, *(decide(found.interval, at_least=1) for found in order))
    headline = ratios["none", "raw", "zca"]
    named = {
        f"steps {a}/{b}" + (", BN" if placement == "hidden" else ""): found
        for (placement, a, b), found in ratios.items()
    }
    named["steps raw/raw with BN"] = ratio(
        *(
            [steps_to_target(config, record) for record in _group(trained, placement, "raw")]
            for placement in ("none", "hidden")
        )
    )
    first = ("steps raw/zca", "steps raw/scaled", "steps scaled/zca", "steps raw/raw with BN")
    measured = {name: named[name].known for name in first}
    measured["largest deviation of steps from theory"] = worst_steps
    measured["largest deviation of the mean's eigenvalue"] = worst_eigenvalue
    for epsilon in config.other_epsilons:
        for a in ("raw", "scaled"):
            named[f"steps {a}/{other(epsilon)}"] = steps_ratio(
                config, trained, "none", a, other(epsilon)
            )
    for target in config.other_targets:
        for a, b in _COMPARED[:3]:
            named[f"steps {a}/{b} to a loss of {target:g}"] = steps_ratio(
                config, trained, "none", a, b, target
            )
    for name, found in named.items():
        measured[name] = found.known
        measured[f"{name}, low"], measured[f"{name}, high"] = found.interval
    for placement in ("none", "hidden"):
        for name in kinds(config):
            group = _group(trained, placement, name)
            where = f"{name}, BN" if placement == "hidden" else name
            measured[f"best rate, {where}"] = group[0]["learning_rate"]
            measured[f"test accuracy, {where}"] = float(
                np.mean([record["accuracy"] for record in group])
            )
    for name, spectrum in spectra.items():
        measured[f"condition number, {name}"] = spectrum["condition_number"]
    return Finding(
        CLAIMS[0],
        measured,
        headline.interval,
        verdict,
        _note(config, trained, ratios, len(settings)),
    )


def _note(config, trained, ratios, count: int) -> str:
    groups = [(p, n) for p in ("none", "hidden") for n in kinds(config)]
    lost = sum(record["diverged"] > 0 for record in trained)
    missed = sum(steps_to_target(config, record).is_censored for record in trained)
    ends = [
        f"{name}{', BN' if placement == 'hidden' else ''}"
        for placement, name in groups
        if _group(trained, placement, name)[0]["learning_rate"]
        in (min(config.rates), max(config.rates))
    ]
    better = {
        name: paired_difference(
            [record["accuracy"] for record in _group(trained, "none", name)],
            [record["accuracy"] for record in _group(trained, "none", "raw")],
        )
        for name in ("scaled", "zca")
    }
    steps = "; ".join(_steps(config, trained, *group) for group in groups)
    return (
        f"interval: over seeds, of steps raw/zca to a loss of {config.target_loss:g}. Regression: "
        f"{count} settings. Steps, mean [range]: {steps}. "
        f"Ratios: {'; '.join(_words(*item) for item in ratios.items())}. "
        "Test accuracy less that on raw: "
        + "; ".join(
            f"{name} {format_number(found.mean)} {format_interval(found.interval)}"
            for name, found in better.items()
        )
        + f". {lost} runs had a step that was not finite, {missed} did not reach the target"
        + (f". Best rate at an end of the grid: {', '.join(ends)}" if ends else "")
    )


def _steps(config, trained, placement: str, name: str) -> str:
    found = [steps_to_target(config, record) for record in _group(trained, placement, name)]
    where = f"{name}, BN" if placement == "hidden" else name
    if any(steps.is_censored for steps in found):
        return f"{where} {', '.join(map(str, found))}"
    mean = estimate([steps.low for steps in found]).mean
    low, high = min(s.low for s in found), max(s.low for s in found)
    return f"{where} {format_number(round(mean))} {format_interval((low, high))}"


def _words(pair: tuple[str, str, str], found: Ratio) -> str:
    placement, a, b = pair
    where = ", BN" if placement == "hidden" else ""
    return f"{a}/{b}{where} {found.mean} {format_interval(found.interval)}"


def steps_ratio(
    config: Any,
    trained: Sequence[Mapping[str, Any]],
    placement: str,
    a: str,
    b: str,
    target: float | None = None,
) -> Ratio:
    """Steps to a target on inputs a over those on inputs b."""
    sides = [
        [steps_to_target(config, record, target) for record in _group(trained, placement, name)]
        for name in (a, b)
    ]
    return ratio(*sides)


def _group(trained, placement: str, name: str) -> list[Mapping[str, Any]]:
    return [r for r in trained if (r["placement"], r["inputs"]) == (placement, name)]


def _steps_deviation(setting: Mapping[str, Any]) -> float:
    """Relative deviation beyond the one step that rounding may cost; inf where it never ended."""
    if setting["measured_steps"] is None:
        return np.inf
    off = abs(setting["measured_steps"] - setting["predicted_steps"])
    return 0.0 if off <= 1 else off / setting["predicted_steps"]


def _is_dominated(setting: Mapping[str, Any]) -> bool:
    largest = np.sqrt(setting["kappa"])
    return setting["name"] == "raw" and setting["mean_norm"] ** 2 >= _DOMINATES * largest


def _eigenvalue_deviation(setting: Mapping[str, Any]) -> float:
    return abs(setting["top_eigenvalue"] / setting["mean_eigenvalue"] - 1)
