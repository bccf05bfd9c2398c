"""Numbers that a run may have ended too early to see: censored, so known as a bound only.

A run that never reaches its target within N steps needs more than N. Dropping it, or taking N for
it, favours the arm that fails. Here such a number stays a pair of bounds through ratios, means and
intervals.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bn_research.claims.estimate import Estimate, estimate
from bn_research.claims.formatting import format_interval, format_number


class Bounded(NamedTuple):
    """A number that lies between two bounds; they are equal where it was measured."""

    low: float
    high: float  # inf where only a lower bound is known

    @property
    def is_censored(self) -> bool:
        """Whether it is known as a bound only."""
        return self.low != self.high

    def __str__(self) -> str:
        """`1500`, or `> 3000`, `< 0.2`, `0.2 to 3` where it is a bound."""
        low, high = format_number(self.low), format_number(self.high)
        if not self.is_censored:
            return low
        if math.isinf(self.high):
            return f"> {low}" if self.low > 0 else "unknown"
        return f"{low} to {high}" if self.low > 0 else f"< {high}"


UNBOUNDED = Bounded(1e-30, math.inf)  # a positive number of which nothing is known


class Ratio(NamedTuple):
    """Geometric mean of ratios over pairs, with a 95 % interval."""

    mean: Bounded
    low: float  # of the interval; 0 where nothing bounds it
    high: float  # likewise inf
    pairs: int
    censored: int  # pairs of which one side or both are bounds

    @property
    def interval(self) -> tuple[float, float]:
        """The pair `(low, high)`."""
        return self.low, self.high

    @property
    def known(self) -> float:
        """The mean, or the bound of it that is known; NaN where there is none."""
        if math.isfinite(self.mean.high):
            return self.mean.high
        return self.mean.low if self.mean.low > 0 else math.nan

    def __str__(self) -> str:
        """`32 [23.6, 43.4]`, or a bound of the mean in its place."""
        return f"{self.mean} {format_interval(self.interval)}"


def first_reaching(steps: ArrayLike, values: ArrayLike, target: float) -> Bounded:
    """First of the steps whose value is at least target; above the last step if there is none.

    Args:
      steps: at which values were measured, rising.
      values: one for each; NaN, of a run that is lost, reaches nothing.
      target: to reach; for a loss, pass `-loss` and `-target`.

    Raises:
      ValueError: no steps, steps that do not rise, another number of values, or a target that is
        not a number.
    """
    steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if steps.ndim != 1 or not len(steps) or values.shape != steps.shape:
        raise ValueError(
            f"steps and values must be one number each, got shapes {steps.shape} and {values.shape}"
        )
    if not np.all(np.diff(steps) > 0):
        raise ValueError(f"steps must rise, got {steps.tolist()}")
    if math.isnan(target):
        raise ValueError("target must be a number, got nan")
    reached = np.flatnonzero(values >= target)
    if len(reached):
        return Bounded(float(steps[reached[0]]), float(steps[reached[0]]))
    return Bounded(float(steps[-1]), math.inf)


def ratio(numerators: Sequence[Bounded | float], denominators: Sequence[Bounded | float]) -> Ratio:
    """Geometric mean of numerator/denominator over pairs, with bounds where there are bounds.

    With logarithms of ratios rᵢ between lᵢ and hᵢ, the interval begins where the Student-t interval
    of the lᵢ begins and ends where that of the hᵢ ends: since E l ≤ E r ≤ E h, each end errs on the
    safe side. It is that of `estimate` where nothing is censored.

    Args:
      numerators: positive, one for each seed; a plain number is one that was measured.
      denominators: those of the same seeds, in the same order.

    Raises:
      ValueError: no pairs, not as many of both, bounds out of order or not positive.
    """
    if not len(numerators) or len(numerators) != len(denominators):
        raise ValueError(
            f"numerators and denominators must be paired by seed, got {len(numerators)} and "
            f"{len(denominators)}"
        )
    pairs = [(_positive(n), _positive(d)) for n, d in zip(numerators, denominators, strict=True)]
    low, high = _estimates(*zip(*itertools.starmap(_log_quotient, pairs), strict=True))
    return Ratio(
        Bounded(math.exp(low.mean) if low else 0.0, math.exp(high.mean) if high else math.inf),
        math.exp(low.low) if low else 0.0,
        _exp(high.high) if high else math.inf,
        len(pairs),
        sum(n.is_censored or d.is_censored for n, d in pairs),
    )


def open_ratio(numerators: Sequence[Bounded], denominators: Sequence[Bounded]) -> Ratio:
    """`ratio` where `UNBOUNDED` may be among the numbers: an end that rests on one is open."""
    found = ratio(numerators, denominators)
    if any(number.low <= UNBOUNDED.low for number in numerators):
        found = found._replace(low=0.0, mean=Bounded(0.0, found.mean.high))
    if any(number.low <= UNBOUNDED.low for number in denominators):
        found = found._replace(high=math.inf, mean=Bounded(found.mean.low, math.inf))
    return found


def known(values: ArrayLike) -> list[Bounded]:
    """Numbers that were measured; of one that is NaN nothing is known."""
    numbers = np.asarray(values, np.float64).tolist()
    return [UNBOUNDED if math.isnan(number) else Bounded(number, number) for number in numbers]


def mean_of_curve(values: ArrayLike, *, resolution: float = 1e-7) -> Bounded:
    """Geometric mean of a curve that is never negative, such as a measure along a run.

    NaN, of what was lost, is above all that is finite, and 0 is below the resolution, by default
    that of float32.
    """
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return UNBOUNDED
    least = np.where(np.isfinite(values), values, finite.max())
    low = math.exp(np.mean(np.log(np.maximum(least, UNBOUNDED.low))))
    high = math.exp(np.mean(np.log(np.maximum(least, resolution)))) if finite.min() == 0 else low
    return Bounded(low, UNBOUNDED.high if len(finite) < len(values) else high)


def geometric_mean(numbers: Sequence[Bounded | float]) -> Bounded:
    """Geometric mean of positive numbers, a bound where one of them is."""
    return ratio(numbers, [1.0] * len(numbers)).mean


def bounded_slope(
    x: Sequence[float],
    numerators: Sequence[Bounded | float],
    denominators: Sequence[Bounded | float],
) -> Bounded:
    """Least-squares slope of log(numerator/denominator) over x, as its bounds.

    The slope is the sum of cᵢ·yᵢ with cᵢ = (xᵢ − x̄)/Σ(xⱼ − x̄)², so each bound of y enters by the
    sign of its c.
    """
    centred = np.asarray(x, float) - np.mean(x)
    low = high = 0.0
    for weight, n, d in zip(centred / np.sum(centred**2), numerators, denominators, strict=True):
        if weight:
            ends = [float(weight) * end for end in _log_quotient(_positive(n), _positive(d))]
            low, high = low + min(ends), high + max(ends)
    return Bounded(low, high)


def log_slope(
    x: Sequence[float],
    numerators: Sequence[Sequence[Bounded | float]],
    denominators: Sequence[Sequence[Bounded | float]],
) -> Estimate:
    """Slope of log(numerator/denominator) over x: mean over seeds of `bounded_slope`.

    At each x stand the numbers of all seeds. The interval errs on the safe side, as that of `ratio`
    does; the mean is NaN, and an end infinite, where nothing bounds it.
    """
    seeds = zip(zip(*numerators, strict=True), zip(*denominators, strict=True), strict=True)
    bounds = [bounded_slope(x, n, d) for n, d in seeds]
    low, high = _estimates(*zip(*bounds, strict=True))
    return Estimate(
        (low.mean + high.mean) / 2 if low and high else math.nan,
        low.low if low else -math.inf,
        high.high if high else math.inf,
        len(bounds),
    )


def _positive(number: Bounded | float) -> Bounded:
    bounds = number if isinstance(number, Bounded) else Bounded(number, number)
    if not 0 < bounds.low <= bounds.high:
        raise ValueError(f"bounds must be positive and in order, got {tuple(bounds)}")
    return bounds


def _estimates(lows: Sequence[float], highs: Sequence[float]) -> list[Estimate | None]:
    """Those of lower and of upper bounds; None where one of them is infinite."""
    return [estimate(ends) if np.all(np.isfinite(ends)) else None for ends in (lows, highs)]


def _log_quotient(n: Bounded, d: Bounded) -> tuple[float, float]:
    """Bounds of log(n/d)."""
    return _log(n.low) - _log(d.high), _log(n.high) - _log(d.low)


def _log(x: float) -> float:
    return math.log(x) if math.isfinite(x) else math.inf


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
