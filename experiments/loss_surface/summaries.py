"""Numbers of a run that the verdicts and figures of `experiments.loss_surface` compare."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.bounded import Bounded, Ratio, ratio
from bn_research.models.spec import num_logits

TRAINS = 0.2  # nats below the loss of guessing
UNBOUNDED = Bounded(1e-30, math.inf)  # a positive number of which nothing is known
_EPSILON = 1e-7  # of float32: a range of losses below it reads as 0

Record = Mapping[str, Any]
Descents = Mapping[tuple[str, float], Sequence[Record]]  # (arm, factor) -> by seed


def surface_curves(record: Record, dispatches: int) -> dict[str, np.ndarray]:
    """What is compared, of each dispatch; NaN where a loss was not finite or the run had ended.

    Args:
      record: of an SGD run.
      dispatches: that a whole run has.
    """
    found = {name: np.array(leaf, float) for name, leaf in record["surface"].items()}
    curves = {
        "loss range": found["loss"].max(axis=1) - found["loss"].min(axis=1),
        "gradient distance": found["gradient_distance"].max(axis=1),
        "effective smoothness": found["smoothness"],
        "relative gradient distance": found["relative_gradient_distance"].max(axis=1),
        "gradient norm": found["start_gradient_norm"],
        "smoothness·‖θ‖²": found["smoothness"] * found["param_norm"] ** 2,
        "cosine at the step": found["cosine"][:, 1],
    }
    missing = dispatches - len(found["smoothness"])
    return {
        name: np.concatenate([np.where(np.isfinite(curve), curve, np.nan), [np.nan] * missing])
        for name, curve in curves.items()
    }


def geometric_mean(values: Sequence[float] | np.ndarray) -> Bounded:
    """Over a run. NaN is above all that is finite, and 0 is below the resolution of float32."""
    values = np.asarray(values, float)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return UNBOUNDED
    lost = len(finite) < len(values)
    least = np.where(np.isfinite(values), values, finite.max())
    low = math.exp(np.mean(np.log(np.maximum(least, UNBOUNDED.low))))
    high = math.exp(np.mean(np.log(np.maximum(least, _EPSILON)))) if finite.min() == 0 else low
    return Bounded(low, UNBOUNDED.high if lost else high)


def edge_curve(config: Any, record: Record) -> np.ndarray:
    """rate·λmax of each dispatch; NaN from where the run had ended."""
    found = np.array(record["through"]["largest"], float) * record["rate"]
    missing = config.edge_steps // config.steps_per_dispatch - len(found)
    return np.concatenate([found, [np.nan] * missing])


def compared(numerators: Sequence[Bounded], denominators: Sequence[Bounded]) -> Ratio:
    """Their `ratio`; an end that rests on a number of which nothing is known is open."""
    found = ratio(numerators, denominators)
    if any(number.low <= UNBOUNDED.low for number in numerators):
        found = found._replace(low=0.0, mean=Bounded(0.0, found.mean.high))
    if any(number.low <= UNBOUNDED.low for number in denominators):
        found = found._replace(high=math.inf, mean=Bounded(found.mean.low, math.inf))
    return found


def sharpness_at_start(records: Sequence[Record]) -> list[Bounded]:
    """λmax of each seed before the first step, statistics differentiated through."""
    return [exact(record["through"]["largest"][0]) for record in records]


def stable_factors(config: Any, descents: Descents, arm: str) -> list[Bounded]:
    """Largest multiple of 2/λmax that is stable, of each seed; the next of the grid is not."""
    factors = sorted(config.descent_factors)
    found = []
    for seed in range(config.seeds):
        stable = [
            index
            for index, factor in enumerate(factors)
            if is_stable(config, descents[arm, factor][seed])
        ]
        ends = [UNBOUNDED.low, *factors, UNBOUNDED.high]
        best = max(stable, default=-1) + 1
        found.append(Bounded(ends[best], ends[best + 1]))
    return found


def is_stable(config: Any, record: Record) -> bool:
    """Whether a descent ends below the loss of guessing, as one that is thrown out does not."""
    guessing = math.log(num_logits(config.network))
    loss = final_loss(record)
    return not record["diverged"] and bool(loss < guessing - TRAINS)


def final_loss(record: Record) -> float:
    """Mean training loss over the last tenth of the steps; infinite if one is not finite."""
    loss = np.array(record["loss"][-max(1, len(record["loss"]) // 10) :], float)
    return float(np.mean(loss)) if np.isfinite(loss).all() else math.inf


def largest_residual(records: Sequence[Record]) -> float:
    """Of λmax, relative to it."""
    found = [
        np.abs(np.array(record[kind]["largest_residual"], float))
        / np.abs(np.array(record[kind]["largest"], float))
        for record in records
        for kind in ("through", "frozen")
        if kind in record
    ]
    return float(np.nanmax(np.concatenate(found)))


def exact(value: float | None) -> Bounded:
    """A measured number; of one that was not finite, or not positive, nothing is known."""
    if value is None or not math.isfinite(value) or value <= 0:
        return UNBOUNDED
    return Bounded(value, value)
