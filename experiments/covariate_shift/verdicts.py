"""The claims of `experiments.covariate_shift`, and how records of its runs decide them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.bounded import Bounded, Ratio, ratio
from bn_research.claims.claim import Claim
from bn_research.claims.estimate import paired_difference
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Finding, decide
from bn_research.claims.formatting import format_interval, format_number
from bn_research.models.spec import num_logits, num_weight_layers

PLAIN, SAME, OWN = "plain", "BN, the plain network's settings", "BN, its own best"
ARMS = (PLAIN, SAME, OWN)
DRIFT, UNCHANGED = 0.5, 1.0  # of the ratio BN/plain: at most the first, or spanning the second
SHIFT, SMALLER = 1.0, 0.8  # likewise: at least the first, or surely below the second

Record = Mapping[str, Any]
Runs = Mapping[str, Sequence[Record]]  # arm -> records by seed

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


def small_weights(config: Any) -> str:
    """Name of the comparison that has small weights only."""
    return f"{config.activations[0]}, weights of {config.small_init_std:g}"


# --- numbers of a run ---


def path(record: Record, start: int = 0) -> float:
    """Mean over units of the path from a measured time on; NaN where the run is lost."""
    if record["path"] is None:
        return math.nan
    return float(np.sum(np.array(record["movement"][start:], float)))


def shift(record: Record, start: int = 0, *, key: str = "relative") -> float:
    """Mean over layers from the second on and measured times; NaN where one is not finite."""
    values = np.array(record[key], float)[start:, 1:]
    return float(values.mean()) if values.size else math.nan


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
        (Bounded(n, n), Bounded(d, d))
        for n, d in zip(numerators, denominators, strict=True)
        if 0 < n < math.inf and 0 < d < math.inf
    ]
    return ratio(*zip(*pairs, strict=True)) if pairs else None


def _compare(runs: Runs, arm: str, of: Callable[..., float], *rest: Any) -> Ratio | None:
    """Arm over plain; rest are lists of further arguments, one for each seed."""
    both = [[of(*given) for given in zip(runs[name], *rest, strict=True)] for name in (arm, PLAIN)]
    return pair_ratio(*both)


def _late(runs: Runs, of: Callable[..., float], num_classes: int) -> Ratio | None:
    """BN over plain at the same settings, both from where the plain network has left its plateau.

    None unless all seeds' have.
    """
    starts = [plateau_end(record, num_classes) for record in runs[PLAIN]]
    return None if None in starts else _compare(runs, SAME, of, starts)


def drift_ratios(config: Any, runs: Runs) -> dict[str, Ratio | None]:
    """Ratios BN/plain of the drift; the first is the claim's."""
    return {
        "drift, BN/plain": _compare(runs, SAME, path),
        "drift after the plateau, BN/plain": _late(runs, path, num_logits(config.network)),
        "drift, BN/plain, each at its own best": _compare(runs, OWN, path),
        "drift from first to last, BN/plain": _compare(
            runs, SAME, lambda r: r.get("net") or math.nan
        ),
        "drift in units of the input, BN/plain": _compare(
            runs, SAME, lambda r: float(np.sum(np.array(r.get("raw_movement", math.nan), float)))
        ),
    }


def shift_ratios(config: Any, runs: Runs) -> dict[str, Ratio | None]:
    """Ratios BN/plain of the gradient shift; the first is the claim's."""
    return {
        "gradient shift, BN/plain": _compare(runs, SAME, shift),
        "gradient shift after the plateau, BN/plain": _late(
            runs, shift, num_logits(config.network)
        ),
        "gradient shift, BN/plain, each at its own best": _compare(runs, OWN, shift),
        "gradient shift over noise floor, BN/plain": _compare(
            runs, SAME, lambda r: shift(r) / shift(r, key="noise")
        ),
    }


# --- verdicts ---


def judge_drift(config: Any, runs: Mapping[str, Runs]) -> Finding:
    """distribution-drift-reduced, of the first comparison."""
    measured: dict[str, float] = {}
    first = next(iter(runs.values()))
    for name, arms in runs.items():
        prefix = "" if arms is first else f"{name}: "
        _put(measured, prefix, drift_ratios(config, arms))
        for arm, records in arms.items():
            measured[f"{prefix}drift, {arm}"] = _mean([path(r) for r in records])
            measured[f"{prefix}test accuracy, {arm}"] = _mean([r["accuracy"] for r in records])
            floors = [_mean(r["floor"]) if r["path"] is not None else math.nan for r in records]
            measured[f"{prefix}distance of two halves, {arm}"] = _mean(floors)
            intervals = [path(r) / (len(r["step"]) - 1) for r in records if len(r["step"]) > 1]
            measured[f"{prefix}drift of an interval, {arm}"] = _mean(intervals)
        starts = [plateau_end(r, num_logits(config.network)) for r in arms[PLAIN]]
        ends = [r["step"][i] for r, i in zip(arms[PLAIN], starts, strict=True) if i is not None]
        measured[f"{prefix}plain network off its plateau, step"] = _mean(ends or [math.nan])
    gain = paired_difference(
        [r["accuracy"] for r in first[SAME]], [r["accuracy"] for r in first[PLAIN]]
    )
    measured["accuracy, BN − plain"] = gain.mean
    if config.seeds > 1:
        measured |= {"accuracy, BN − plain, low": gain.low, "accuracy, BN − plain, high": gain.high}
    found = drift_ratios(config, first)["drift, BN/plain"]
    verdict = INCONCLUSIVE
    if _decides(config, first, found):
        assert found is not None
        if decide(found.interval, at_most=DRIFT) == REPRODUCED and gain.low > 0:
            verdict = REPRODUCED
        elif found.high >= UNCHANGED or gain.high < 0:
            verdict = NOT_REPRODUCED
    note = (
        f"interval: over seeds, of the ratio. Accuracy BN − plain: {format_interval(gain.interval)}"
        f". Percentiles are of {config.measuring_images} test images that stay the same, with BN "
        "by their own statistics, measured every "
        f"{config.steps_per_dispatch} steps. The distance of two halves, between their percentiles "
        "at one time, is what sampling does; it is common to all times and so cancels. 'After the "
        "plateau' begins, for both networks, where the plain one's loss has fallen below "
        f"ln({num_logits(config.network)})/2. {_settings_note(config, runs)}"
    )
    constant = max(
        r.get("constant", 0) for arms in runs.values() for rs in arms.values() for r in rs
    )
    if constant:
        note += f". Units without width at some time, left out of the means: up to {constant} a run"
    return Finding(CLAIMS[0], measured, found and found.interval, verdict, note)


def judge_gradient(config: Any, runs: Mapping[str, Runs]) -> Finding:
    """gradient-shift-not-reduced, of the first comparison."""
    measured: dict[str, float] = {}
    first = next(iter(runs.values()))
    for name, arms in runs.items():
        prefix = "" if arms is first else f"{name}: "
        _put(measured, prefix, shift_ratios(config, arms))
        for arm, records in arms.items():
            measured[f"{prefix}gradient shift, {arm}"] = _mean([shift(r) for r in records])
            measured[f"{prefix}noise floor, {arm}"] = _mean(
                [shift(r, key="noise") for r in records]
            )
            for layer in range(2, num_weight_layers(config.network) + 1):
                for key, words in (("relative", "gradient shift"), ("cosine", "cosine")):
                    by_seed = [np.array(r[key], float)[:, layer - 1].mean() for r in records]
                    measured[f"{prefix}{words}, layer {layer}, {arm}"] = _mean(by_seed)
    found = shift_ratios(config, first)["gradient shift, BN/plain"]
    verdict = INCONCLUSIVE
    if _decides(config, first, found):
        assert found is not None
        if found.low >= SHIFT:
            verdict = REPRODUCED
        elif found.high < SMALLER:
            verdict = NOT_REPRODUCED
    note = (
        "interval: over seeds, of the ratio. Measured every "
        f"{config.steps_per_dispatch} steps, on the batch and the update of the step that training "
        "takes next. BN's statistics are those of the batch under the mixed parameters; its scale "
        "and bias belong to their layer. The noise floor is ‖G_a − G_b‖/‖G_a‖ of two disjoint "
        f"batches of {config.batch_size} at the same parameters. What was tuned, and which runs "
        f"were lost, stands with {CLAIMS[0].id}"
    )
    return Finding(CLAIMS[1], measured, found and found.interval, verdict, note)


def _decides(config: Any, runs: Runs, found: Ratio | None) -> bool:
    """Whether every seed has a pair, and there are two or more: a lost run decides nothing."""
    return (
        found is not None and config.seeds > 1 and found.pairs == config.seeds and not _lost(runs)
    )


def _lost(runs: Runs) -> list[Record]:
    """Runs of the claim's two arms that did not come to their end."""
    records = [record for arm in (PLAIN, SAME) for record in runs[arm]]
    most = max(len(record["step"]) for record in records)
    return [r for r in records if r["path"] is None or len(r["step"]) < most]


def _put(measured: dict[str, float], prefix: str, ratios: Mapping[str, Ratio | None]) -> None:
    for name, found in ratios.items():
        if found is None:
            measured[f"{prefix}{name}"] = math.nan
            continue
        measured[f"{prefix}{name}"] = found.mean.low
        if found.pairs > 1:
            measured[f"{prefix}{name}, low"] = found.low
            measured[f"{prefix}{name}, high"] = found.high


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(np.array(values, float)))


def _settings_note(config: Any, runs: Mapping[str, Runs]) -> str:
    """What was tuned, what lies at an end of its grid, and which runs had steps not taken."""
    grids = {
        "learning_rate": config.learning_rates,
        "momentum": config.momenta,
        "init_std": config.init_stds,
        "epsilon": config.epsilons,
    }
    chosen, ends = [], []
    for name, arms in runs.items():
        for arm, records in arms.items():
            used = {k: records[0][k] for k in grids if arm != PLAIN or k != "epsilon"}
            words = ", ".join(f"{k} {format_number(v)}" for k, v in used.items())
            chosen.append(f"{name}, {arm}: {words}")
            ends += [
                f"{key} of {name}, {arm}"
                for key in ("learning_rate", "init_std")
                if arm != SAME and used[key] in (min(grids[key]), max(grids[key]))
                if key != "init_std" or name != small_weights(config)
            ]
    note = (
        f"Chosen by the training loss of {config.tuning_steps} steps on a seed apart, from one "
        f"grid: {'; '.join(chosen)}"
    )
    if ends:
        note += f". At an end of its grid: {'; '.join(ends)}"
    records = [r for arms in runs.values() for rs in arms.values() for r in rs]
    diverged = sum(record["diverged"] > 0 for record in records)
    if diverged:
        note += f". Of {len(records)} runs {diverged} had steps that were not finite and not taken"
    if any(_lost(arms) for arms in runs.values()):
        note += (
            ". A run that did not come to its end is in no ratio; a claim it is for is inconclusive"
        )
    return note
