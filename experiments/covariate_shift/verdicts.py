"""The claims of `experiments.covariate_shift`, and how records of its runs decide them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims import Claim, Finding, paired_difference
from bn_research.claims.bounded import Ratio, ratio
from bn_research.claims.finding import INCONCLUSIVE, verdict_of
from bn_research.claims.formatting import format_interval, format_number
from bn_research.claims.judging import at_end, listed, lost, numbers, with_intervals
from bn_research.models.spec import num_logits, num_weight_layers
from experiments.covariate_shift import Config

PLAIN, SAME, OWN = "plain", "BN, the plain network's settings", "BN, its own best"
ARMS = (PLAIN, SAME, OWN)
DRIFT, UNCHANGED = 0.5, 1.0  # of the ratio BN/plain: at most the first, or spanning the second
SHIFT, SMALLER = 1.0, 0.8  # likewise: at least the first, or surely below the second

Record = Mapping[str, Any]
Arms = Mapping[str, Sequence[Record]]  # by name, records by seed
Ratios = dict[str, Ratio | None]  # None without a pair of positive, finite numbers

CLAIMS = (
    Claim(
        id="distribution-drift-reduced",
        statement="BN keeps the distribution of a layer's inputs steady while the layers below "
        "learn",
        source="Notes; Paper, section 4.1 and figure 1, which shows one typical unit; the measure "
        "of drift and the margins are this project's",
        criterion="Drift of a unit: the path of the {15, 50, 85} percentiles of its input to the "
        "nonlinearity from initialization on, in widths of that distribution, averaged over all "
        "last hidden units; both networks at the rate, momentum and initialization tuned for the "
        f"plain one. Reproduced if BN/plain is at most {DRIFT} (interval over seeds of the "
        "geometric mean) and BN's final test accuracy is higher (paired interval above 0); not "
        f"reproduced if the ratio's interval spans {UNCHANGED:g} or lies above it, or the accuracy "
        "is surely lower",
        expected="a ratio below 0.5, and a higher accuracy",
    ),
    Claim(
        id="gradient-shift-not-reduced",
        statement="Measured on gradients, BN does not reduce internal covariate shift",
        source="Santurkar et al. (2018), arXiv 1805.11604, definition 2.1 and figure 2",
        criterion="‖G − G′‖/‖G‖, where G′ is a layer's gradient on the batch of the step after the "
        "layers below have taken that step, averaged over the measured times and the layers from "
        "the second on; both networks at the settings tuned for the plain one. Reproduced if "
        f"BN/plain is at least {SHIFT:g} (interval over seeds of the geometric mean); not "
        f"reproduced if it is surely below {SMALLER}",
        expected="a ratio of 1 or more",
    ),
)


def small_weights(config: Config) -> str:
    """Name of the comparison that has small weights only."""
    return f"{config.activations[0]}, weights of {config.small_init_std:g}"


def path(record: Record, start: int = 0, *, key: str = "movement") -> float:
    """Mean over units of the path from a measured time on; NaN where the run is lost."""
    return math.nan if record["path"] is None else float(np.sum(record[key][start:]))


def shift(record: Record, start: int = 0, *, key: str = "relative") -> float:
    """Mean over layers from the second on and measured times; NaN where one is not finite."""
    values = np.array(record[key], float)[start:, 1:]
    return float(values.mean()) if values.size else math.nan


def _noise(record: Record) -> float:
    return shift(record, key="noise")


def _mean(record: Record, key: str) -> float:
    return math.nan if record["path"] is None else float(np.mean(record[key]))


def plateau_end(record: Record, num_classes: int) -> int | None:
    """First measured time that follows a dispatch of mean loss below ln(classes)/2; or None.

    Half of the loss of guessing: a network that stays there learns nothing, and drifts little.
    """
    below = np.flatnonzero(np.array(record["loss"], float) < math.log(num_classes) / 2)
    if not len(below) or below[0] + 1 >= len(record["step"]):
        return None
    return int(below[0]) + 1


def pair_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio | None:
    """Geometric mean of ratios over the pairs of positive, finite numbers; None without any."""
    pairs = [
        (n, d)
        for n, d in zip(numerators, denominators, strict=True)
        if 0 < n < math.inf and 0 < d < math.inf
    ]
    return ratio(*zip(*pairs, strict=True)) if pairs else None


def _over(arms: Arms, of: Callable[..., float], *rest: Any, arm: str = SAME) -> Ratio | None:
    """Arm over plain; rest are lists of further arguments, one for each seed."""
    both = [[of(*given) for given in zip(arms[name], *rest, strict=True)] for name in (arm, PLAIN)]
    return pair_ratio(*both)


def _ratios(config: Config, arms: Arms, what: str, of: Callable[..., float]) -> Ratios:
    """Over the whole training, after the plateau, and with each network at its own best.

    After it is for both from where the plain network has left its own; None unless all seeds' have.
    """
    starts = [plateau_end(record, num_logits(config.network)) for record in arms[PLAIN]]
    return {
        f"{what}, BN/plain": _over(arms, of),
        f"{what} after the plateau, BN/plain": None if None in starts else _over(arms, of, starts),
        f"{what}, BN/plain, each at its own best": _over(arms, of, arm=OWN),
    }


def drift_ratios(config: Config, arms: Arms) -> Ratios:
    """Ratios BN/plain of the drift; the first is the claim's."""
    return _ratios(config, arms, "drift", path) | {
        "drift from first to last, BN/plain": _over(arms, lambda r: _mean(r, "net")),
        "drift in units of the input, BN/plain": _over(arms, lambda r: path(r, key="raw_movement")),
    }


def shift_ratios(config: Config, arms: Arms) -> Ratios:
    """Ratios BN/plain of the gradient shift; the first is the claim's."""
    return _ratios(config, arms, "gradient shift", shift) | {
        "gradient shift over noise floor, BN/plain": _over(arms, lambda r: shift(r) / _noise(r))
    }


def judge(config: Config, records: Mapping[str, Arms]) -> list[Finding]:
    """Both claims, of the first comparison; the others stand beside it."""
    return [judge_drift(config, records), judge_gradient(config, records)]


def judge_drift(config: Config, records: Mapping[str, Arms]) -> Finding:
    """distribution-drift-reduced."""
    measured: dict[str, float] = {}
    classes = num_logits(config.network)
    for prefix, arms in _prefixed(records):
        measured |= _with_ratios(prefix, drift_ratios(config, arms))
        for arm, runs in arms.items():
            whole = [path(r) / (len(r["step"]) - 1) for r in runs if len(r["step"]) > 1]
            halves = [_mean(r, "floor") for r in runs]
            measured[f"{prefix}drift, {arm}"] = numbers(runs, path).mean()
            measured[f"{prefix}test accuracy, {arm}"] = numbers(runs, "accuracy").mean()
            measured[f"{prefix}distance of two halves, {arm}"] = float(np.mean(halves))
            measured[f"{prefix}drift of an interval, {arm}"] = float(np.mean(whole))
        starts = [(r["step"], plateau_end(r, classes)) for r in arms[PLAIN]]
        left = [steps[start] for steps, start in starts if start is not None] or [math.nan]
        measured[f"{prefix}plain network off its plateau, step"] = float(np.mean(left))
    first = next(iter(records.values()))
    gain = paired_difference(*(numbers(first[arm], "accuracy") for arm in (SAME, PLAIN)))
    measured |= with_intervals({"accuracy, BN − plain": gain if config.seeds > 1 else gain.mean})
    found = drift_ratios(config, first)["drift, BN/plain"]
    verdict = INCONCLUSIVE
    if found is not None and _decides(config, first, found):
        verdict = verdict_of(
            reproduced=found.high <= DRIFT and gain.low > 0,
            refuted=found.high >= UNCHANGED or gain.high < 0,
        )
    note = (
        f"interval: over seeds, of the ratio. Accuracy BN − plain: {format_interval(gain.interval)}"
        f". Percentiles are of {config.measuring_images} test images that stay the same, with BN "
        "by their own statistics, measured every "
        f"{config.steps_per_dispatch} steps. The distance of two halves, between their percentiles "
        "at one time, is what sampling does; it is common to all times and so cancels. 'After the "
        "plateau' begins, for both networks, where the plain one's loss has fallen below "
        f"ln({classes})/2. {_settings_note(config, records)}"
    )
    if constant := max(r.get("constant", 0) for r in _all_runs(records)):
        note += f". Units without width at some time, left out of the means: up to {constant} a run"
    return Finding(CLAIMS[0], measured, found and found.interval, verdict, note)


def judge_gradient(config: Config, records: Mapping[str, Arms]) -> Finding:
    """gradient-shift-not-reduced."""
    measured: dict[str, float] = {}
    for prefix, arms in _prefixed(records):
        measured |= _with_ratios(prefix, shift_ratios(config, arms))
        for arm, runs in arms.items():
            measured[f"{prefix}gradient shift, {arm}"] = numbers(runs, shift).mean()
            measured[f"{prefix}noise floor, {arm}"] = numbers(runs, _noise).mean()
            for layer in range(2, num_weight_layers(config.network) + 1):
                for key, words in (("relative", "gradient shift"), ("cosine", "cosine")):
                    means = [np.array(r[key], float)[:, layer - 1].mean() for r in runs]
                    measured[f"{prefix}{words}, layer {layer}, {arm}"] = float(np.mean(means))
    first = next(iter(records.values()))
    found = shift_ratios(config, first)["gradient shift, BN/plain"]
    verdict = INCONCLUSIVE
    if found is not None and _decides(config, first, found):
        verdict = verdict_of(reproduced=found.low >= SHIFT, refuted=found.high < SMALLER)
    note = (
        "interval: over seeds, of the ratio. Measured every "
        f"{config.steps_per_dispatch} steps, on the batch and the update of the step that training "
        "takes next. BN's statistics are those of the batch under the mixed parameters; its scale "
        "and bias belong to their layer. The noise floor is ‖G_a − G_b‖/‖G_a‖ of two disjoint "
        f"batches of {config.batch_size} at the same parameters. What was tuned, and which runs "
        f"were lost, stands with {CLAIMS[0].id}"
    )
    return Finding(CLAIMS[1], measured, found and found.interval, verdict, note)


def _prefixed(records: Mapping[str, Arms]) -> list[tuple[str, Arms]]:
    """Comparisons with what stands before the names of their numbers: nothing with the first."""
    return [(f"{name}: " if i else "", arms) for i, (name, arms) in enumerate(records.items())]


def _with_ratios(prefix: str, ratios: Ratios) -> dict[str, float]:
    """Of a single pair only the ratio itself."""
    known = {n: math.nan if r is None else r if r.pairs > 1 else r.known for n, r in ratios.items()}
    return with_intervals({f"{prefix}{name}": ratio for name, ratio in known.items()})


def _all_runs(records: Mapping[str, Arms]) -> list[Record]:
    return [run for arms in records.values() for runs in arms.values() for run in runs]


def _decides(config: Config, arms: Arms, found: Ratio) -> bool:
    """Whether every seed has a pair, and there are two or more: a lost run decides nothing."""
    return config.seeds > 1 and found.pairs == config.seeds and not _ended_early(arms)


def _ended_early(arms: Arms) -> bool:
    """Whether a run of the claim's two arms did not come to its end."""
    runs = [run for arm in (PLAIN, SAME) for run in arms[arm]]
    most = max(len(run["step"]) for run in runs)
    return any(run["path"] is None or len(run["step"]) < most for run in runs)


def _settings_note(config: Config, records: Mapping[str, Arms]) -> str:
    """What was tuned, what lies at an end of its grid, and which runs had steps not taken."""
    grids = {"learning_rate": config.learning_rates, "init_std": config.init_stds}
    chosen, ends = [], []
    for name, arms in records.items():
        for arm, runs in arms.items():
            used = ("learning_rate", "momentum", "init_std", "epsilon")[: 3 if arm == PLAIN else 4]
            words = ", ".join(f"{key} {format_number(runs[0][key])}" for key in used)
            chosen.append(f"{name}, {arm}: {words}")
            ends += [
                f"{key} of {name}, {arm}"
                for key, grid in grids.items()
                if arm != SAME and at_end(runs[0][key], grid)
                if key != "init_std" or name != small_weights(config)
            ]
    early = ". A run that did not come to its end is in no ratio; a claim it is for is inconclusive"
    return (
        f"Chosen by the training loss of {config.tuning_steps} steps on a seed apart, from one "
        f"grid: {'; '.join(chosen)}{listed('At an end of its grid', ends, '; ')}"
        f"{lost(_all_runs(records))}{early if any(map(_ended_early, records.values())) else ''}"
    )
