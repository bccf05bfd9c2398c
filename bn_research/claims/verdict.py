"""From numbers over seeds to an interval, and from an interval to a verdict.

A verdict never rests on a mean alone: an interval that spans the criterion is inconclusive, and
one seed gives no interval at all.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bn_research.claims.registry import Claim

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE)


class Estimate(NamedTuple):
    """A mean (or a slope) with its confidence interval."""

    mean: float
    low: float  # -inf where there are too few values for an interval
    high: float  # +inf likewise
    count: int  # type: ignore[assignment]  # of values, or points; hides tuple.count

    @property
    def interval(self) -> tuple[float, float]:
        """The pair ``(low, high)``."""
        return self.low, self.high


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a run found out about one claim.

    Attributes:
        claim: The claim that was tested.
        measured: Named numbers; one that is not finite is allowed, since it is a finding too.
        interval: ``(low, high)`` of the quantity that the criterion is about, or None.
        verdict: One of ``VERDICTS``.
        note: Anything a reader must know: seeds that failed, controls that surprise.

    Raises:
        ValueError: The verdict is unknown, or the interval is not an ordered pair.
    """

    claim: Claim
    measured: Mapping[str, float]
    interval: tuple[float, float] | None
    verdict: str
    note: str = ""

    def __post_init__(self) -> None:
        _check_verdict(self.verdict)
        if self.interval is not None:
            _check_interval(self.interval)


def estimate(values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    r"""Mean with its Student-t interval, :math:`\bar x \pm t_{n-1} s / \sqrt n`.

    Args:
        values: One number per seed.
        confidence: Coverage of the interval, between 0 and 1.

    Returns:
        The estimate. One value alone gives the interval ``(-inf, inf)``.

    Raises:
        ValueError: There are no values, or one of them is not finite. Decide beforehand what a
            diverged seed means for the claim; leaving it out would bias the mean.
    """
    values = _finite_vector(values, "values")
    _check_confidence(confidence)
    count = len(values)
    mean = float(np.mean(values))
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, count)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return _student(mean, error, count - 1, count, confidence)


def paired_difference(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Estimate of ``a - b`` for two arms that share their seeds.

    Pairing removes what the seeds do to both arms alike, so the interval is narrower than that of
    two separate means.

    Raises:
        ValueError: The arms differ in length, or a value is not finite.
    """
    a, b = _finite_vector(a, "a"), _finite_vector(b, "b")
    if len(a) != len(b):
        raise ValueError(f"a and b must be paired by seed, got {len(a)} and {len(b)} values")
    return estimate(a - b, confidence=confidence)


def slope(x: ArrayLike, y: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Least-squares slope of ``y`` over ``x`` (pass logarithms to fit an exponent).

    Returns:
        The slope with its interval; two points alone give the interval ``(-inf, inf)``.

    Raises:
        ValueError: Lengths differ, fewer than two points, all ``x`` equal, or a value not finite.
    """
    x, y = _finite_vector(x, "x"), _finite_vector(y, "y")
    _check_confidence(confidence)
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same length, got {len(x)} and {len(y)}")
    if len(x) < 2 or np.all(x == x[0]):
        raise ValueError(f"x must hold at least two different values, got {x.tolist()}")
    from scipy import stats  # half a second, which those who ask for help need not wait for

    fit = stats.linregress(x, y)
    mean = float(fit.slope)
    if len(x) == 2:  # a line through two points has no residual to judge it by
        return Estimate(mean, -math.inf, math.inf, 2)
    return _student(mean, float(fit.stderr), len(x) - 2, len(x), confidence)


def decide(
    interval: Estimate | tuple[float, float],
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> str:
    """Verdict of an interval against the closed range ``[at_least, at_most]``.

    Args:
        interval: An estimate, or a pair ``(low, high)``; ``(x, x)`` for an exact number.
        at_least: Lower end of the range that the criterion allows.
        at_most: Upper end of it.

    Returns:
        ``REPRODUCED`` if the interval lies inside the range, ``NOT_REPRODUCED`` if the two are
        disjoint, ``INCONCLUSIVE`` otherwise.

    Raises:
        ValueError: The interval is not an ordered pair, or the range is empty or without bounds.
    """
    low, high = _check_interval(
        interval.interval
        if isinstance(interval, Estimate)
        else interval  # an Estimate has 4 fields
    )
    if not at_least <= at_most:
        raise ValueError(f"at_least must not exceed at_most, got {at_least} and {at_most}")
    if at_least == -math.inf and at_most == math.inf:
        raise ValueError(
            "at_least or at_most must be given: nothing can fail a range without bounds"
        )
    if at_least <= low and high <= at_most:
        return REPRODUCED
    if high < at_least or low > at_most:
        return NOT_REPRODUCED
    return INCONCLUSIVE


def conjunction(*verdicts: str) -> str:
    """Verdict of a claim of several parts, which is as strong as its weakest part."""
    if not verdicts:
        raise ValueError("verdicts must not be empty")
    for verdict in verdicts:
        _check_verdict(verdict)
    for verdict in (NOT_REPRODUCED, INCONCLUSIVE):
        if verdict in verdicts:
            return verdict
    return REPRODUCED


def _student(mean: float, error: float, freedom: int, count: int, confidence: float) -> Estimate:
    from scipy import special

    half = float(special.stdtrit(freedom, (1 + confidence) / 2)) * error
    return Estimate(mean, mean - half, mean + half, count)


def _finite_vector(values: ArrayLike, name: str) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name} must be one number per seed or point, got shape {vector.shape}")
    bad = [f"{name}[{i}] = {vector[i]}" for i in np.flatnonzero(~np.isfinite(vector))]
    if bad:
        raise ValueError(
            f"{name} must be finite, got {', '.join(bad)}: decide what a seed that diverged means "
            "for the claim, and say it in the finding's note"
        )
    return vector


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")


def _check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    # `not low <= high` also catches NaN, of which every comparison is false.
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise ValueError(f"interval must be a pair low <= high, got {interval!r}")
    return interval


def _check_verdict(verdict: str) -> None:
    if verdict not in VERDICTS:
        raise ValueError(f"verdict must be one of {VERDICTS}, got {verdict!r}")
