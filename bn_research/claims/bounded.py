"""Numbers that a run may have ended too early to see: censored, so known as a bound only.

A run that never reaches its target within N steps needs more than N. Dropping it, or taking N for
it, favours the arm that fails. Here such a number stays a pair of bounds through ratios, means and
intervals.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bn_research.claims.estimate import estimate
from bn_research.claims.formatting import format_number


class Bounded(NamedTuple):
    """A number that lies between two bounds; they are equal where it was measured."""

    low: float
    high: float  # inf where only a lower bound is known

    @property
    def is_censored(self) -> bool:
        """Whether it is known as a bound only."""
        return self.low != self.high

    def __str__(self) -> str:
        """``1500``, or ``> 3000``, ``< 0.2``, ``0.2 to 3`` where it is a bound."""
        low, high = format_number(self.low), format_number(self.high)
        if not self.is_censored:
            return low
        if math.isinf(self.high):
            return f"> {low}" if self.low > 0 else "unknown"
        return f"{low} to {high}" if self.low > 0 else f"< {high}"


class Ratio(NamedTuple):
    """Geometric mean of ratios over pairs, with a 95 % interval."""

    mean: Bounded
    low: float  # of the interval; 0 where nothing bounds it
    high: float  # likewise inf
    pairs: int
    censored: int  # pairs of which one side or both are bounds

    @property
    def interval(self) -> tuple[float, float]:
        """The pair ``(low, high)``."""
        return self.low, self.high

    @property
    def known(self) -> float:
        """The mean, or the bound of it that is known; NaN where there is none."""
        if math.isfinite(self.mean.high):
            return self.mean.high
        return self.mean.low if self.mean.low > 0 else math.nan


def first_reaching(steps: ArrayLike, values: ArrayLike, target: float) -> Bounded:
    """First of the steps whose value is at least target; above the last step if there is none.

    Args:
        steps: At which values were measured, rising.
        values: One for each; NaN, of a run that is lost, reaches nothing.
        target: To reach; for a loss, pass ``-loss`` and ``-target``.

    Raises:
        ValueError: No steps, steps that do not rise, another number of values, or a target that is
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


def ratio(numerators: Sequence[Bounded], denominators: Sequence[Bounded]) -> Ratio:
    r"""Geometric mean of numerator/denominator over pairs, with bounds where there are bounds.

    With :math:`r_i` between :math:`l_i` and :math:`h_i` (logarithms), the interval begins where the
    Student-t interval of the :math:`l_i` begins and ends where that of the :math:`h_i` ends: since
    :math:`E\,l \le E\,r \le E\,h`, each end errs on the safe side. It is that of
    :func:`~bn_research.claims.estimate.estimate` where nothing is censored.

    Args:
        numerators: Positive; one for each seed.
        denominators: Those of the same seeds, in the same order.

    Raises:
        ValueError: None, not as many of both, bounds out of order or not positive.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(
            f"numerators and denominators must be paired by seed, got {len(numerators)} and "
            f"{len(denominators)}"
        )
    for number in (*numerators, *denominators):
        if not 0 < number.low <= number.high:
            raise ValueError(f"bounds must be positive and in order, got {tuple(number)}")
    pairs = list(zip(numerators, denominators, strict=True))
    lows = [_log_quotient(n.low, d.high) for n, d in pairs]
    highs = [_log_quotient(n.high, d.low) for n, d in pairs]
    low = estimate(lows) if np.all(np.isfinite(lows)) else None
    high = estimate(highs) if np.all(np.isfinite(highs)) else None
    return Ratio(
        Bounded(math.exp(low.mean) if low else 0.0, math.exp(high.mean) if high else math.inf),
        math.exp(low.low) if low else 0.0,
        _exp(high.high) if high else math.inf,
        len(pairs),
        sum(n.is_censored or d.is_censored for n, d in pairs),
    )


def _log_quotient(a: float, b: float) -> float:
    """log(a/b), of which one may be infinite."""
    if math.isinf(b):
        return -math.inf
    return math.inf if math.isinf(a) else math.log(a) - math.log(b)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
