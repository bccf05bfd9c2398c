"""From numbers over seeds, or points of a line, to an estimate with its interval.

Intervals have a coverage of 95 % unless another `confidence` is asked for.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bn_research.claims.formatting import format_interval, format_number


class Estimate(NamedTuple):
    """A mean (or a slope) with its confidence interval."""

    mean: float
    low: float  # -inf where there are too few values for an interval
    high: float  # +inf likewise
    count: int  # type: ignore[assignment]  # of values, or points; hides tuple.count

    @property
    def interval(self) -> tuple[float, float]:
        """The pair `(low, high)`."""
        return self.low, self.high

    def __str__(self) -> str:
        """`0.49 [0.45, 0.53]`."""
        return f"{format_number(self.mean)} {format_interval(self.interval)}"

    def mapped(self, function: Callable[[float], float]) -> "Estimate":
        """Mean and ends under a rising function, such as `numpy.exp` of a mean logarithm."""
        mean, low, high = (float(function(number)) for number in self[:3])
        return Estimate(mean, low, high, self.count)


def estimate(values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean over seeds with its Student-t interval, x̄ ± t(n − 1)·s/√n.

    One value alone gives the interval `(-inf, inf)`.

    Raises:
      ValueError: there are no values, or one of them is not finite. Decide beforehand what a
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
    """Estimate of `a - b` for two arms that share their seeds.

    Pairing removes what the seeds do to both arms alike, so the interval is narrower than that of
    two separate means.

    Raises:
      ValueError: the arms differ in length, or a value is not finite.
    """
    a, b = _paired(a, b)
    return estimate(a - b, confidence=confidence)


def slope(x: ArrayLike, y: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Least-squares slope of `y` over `x` (pass logarithms to fit an exponent), with its interval.

    Two points alone give the interval `(-inf, inf)`.

    Raises:
      ValueError: lengths differ, fewer than two points, all `x` equal, or a value not finite.
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


def ratio_of_means(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Quotient of two means, paired by seed, with Fieller's interval.

    All ρ for which the mean of a − ρ·b does not differ from 0 by Student's t. Where the mean of b
    may be 0 these are no bounded interval, and `(-inf, inf)` is given.

    Raises:
      ValueError: the arms differ in length, or a value is not finite.

    Source: E. C. Fieller, "Some problems in interval estimation", J. R. Stat. Soc. B 16 (1954).
    """
    pairs = np.stack(_paired(a, b), axis=1)
    _check_confidence(confidence)
    count = len(pairs)
    mean_a, mean_b = pairs.mean(axis=0)
    quotient = float(mean_a / mean_b) if mean_b else math.nan
    unknown = Estimate(quotient, -math.inf, math.inf, count)
    if count < 2:
        return unknown
    from scipy import special

    square = special.stdtrit(count - 1, (1 + confidence) / 2) ** 2 / count
    (aa, ab), (_, bb) = square * np.cov(pairs.T)
    # (a − ρb)² ≤ t²·Var(a − ρb)/n, a quadratic in ρ.
    p, q, r = mean_b**2 - bb, mean_a * mean_b - ab, mean_a**2 - aa
    if p <= 0 or q**2 < p * r:
        return unknown
    half = math.sqrt(q**2 - p * r)
    return Estimate(quotient, float((q - half) / p), float((q + half) / p), count)


def median_interval(values: ArrayLike) -> Estimate:
    """Median with its 95 % interval from order statistics; infinite below 6 values.

    The k-th smallest and the k-th largest of n values enclose the median but with probability
    2·P(Binomial(n, 1/2) < k), whatever the distribution.

    Raises:
      ValueError: there are no values, or one of them is not finite.
    """
    from scipy import stats

    ordered = np.sort(_finite_vector(values, "values"))
    count = len(ordered)
    k = int(stats.binom.ppf(0.025, count, 0.5))
    ends = (float(ordered[k - 1]), float(ordered[-k])) if k else (-math.inf, math.inf)
    return Estimate(float(np.median(ordered)), *ends, count)


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = _finite_vector(a, "a"), _finite_vector(b, "b")
    if len(a) != len(b):
        raise ValueError(f"a and b must be paired by seed, got {len(a)} and {len(b)} values")
    return a, b


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
