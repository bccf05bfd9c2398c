r"""How noisy batch normalization makes examples, measured on the pre-activations of a set.

The notation is that of `batch_noise`. Convolutions share statistics over positions too. Those of
one image are correlated, so m images of p positions are worth less than m·p independent values: the
*effective* sizes are σ²/Var(μ_B) and (κ − 1)σ⁴/Var(σ_B²), one for the mean and one for the
variance. They are predicted by how image means scatter: with u the mean over an image of x̃, and v
that of x̃²,

    Var(δ) = Var(u)/m,  Cov(δ, ε) = Cov(u, v)/m,  Var(ε) = Var(v)/m,

the first exactly, the others to first order in 1/m. p·Var(u) is the design effect of cluster
samples, 1 + (p − 1)ρ, ρ the correlation within images. Batches without replacement from N examples
scatter less, by the factor (N − m)/(N − 1). Everything is NumPy; ε = 0 in the normalization.

Source: L. Kish, "Survey sampling", 1965, chapter 5, for design effects.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike

from bn_research.probes.batch_noise import NormalizedMoments, StatisticsNoise, whole_number

_ELEMENTS = 2**21  # gathered at once: bounds the memory
_CONSTANT = 1e-12  # a batch's variance over the population's that rounding alone can leave


class EffectiveBatch(NamedTuple):
    """Independent values that would scatter as much; shape=(features,)."""

    mean: np.ndarray  # σ²/Var(μ_B)
    var: np.ndarray  # (κ − 1)σ⁴/Var(σ_B²)


class Population(NamedTuple):
    """Pre-activations of a whole set in units of their population; NaN for constant features."""

    normalized: np.ndarray  # x̃, shape=(examples, *positions, features), float32 or float64
    first: np.ndarray  # u, mean of x̃ over an example's positions, shape=(examples, features)
    second: np.ndarray  # v, mean of x̃² over them
    skewness: np.ndarray  # γ₁ = E[x̃³], shape=(features,)
    kurtosis: np.ndarray  # κ = E[x̃⁴], 3 for a Gaussian

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.first)

    @property
    def num_positions(self) -> int:
        """p, of an example: h·w of a convolution, 1 of a dense layer."""
        return math.prod(self.normalized.shape[1:-1])


def describe_population(features: ArrayLike) -> Population:
    """Normalizes the pre-activations of a set by the set's own mean and variance, per feature.

    Args:
      features: shape=(examples, features), or (examples, *positions, features) of convolutions.

    Raises:
      ValueError: fewer than 2 axes or examples, or values that are not finite floats.
    """
    features = np.asarray(features)
    if features.ndim < 2 or len(features) < 2 or 0 in features.shape:
        raise ValueError(
            f"features has shape {features.shape}: allowed is (examples, ..., features) with 2 "
            "examples or more"
        )
    if not np.issubdtype(features.dtype, np.floating):
        raise ValueError(f"features is of {features.dtype}: allowed are floating-point arrays")
    axes = tuple(range(features.ndim - 1))
    mean = np.mean(features, axis=axes, dtype=np.float64)
    if not np.all(np.isfinite(mean)):
        raise ValueError("features holds NaN or infinity: allowed are finite numbers")
    dtype = np.promote_types(features.dtype, np.float32)
    normalized = (features - mean).astype(dtype)
    std = np.sqrt(np.mean(np.square(normalized), axis=axes, dtype=np.float64))
    # Of a constant feature rounding alone is left.
    constant = std <= 4 * np.finfo(dtype).eps * np.abs(mean)
    normalized /= np.where(constant, np.nan, std).astype(dtype)
    square = np.square(normalized)

    def average(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        return np.asarray(np.mean(values, axis=axes, dtype=np.float64))

    return Population(
        normalized,
        first=average(normalized, axes[1:]),
        second=average(square, axes[1:]),
        skewness=average(square * normalized, axes),
        kurtosis=average(np.square(square), axes),
    )


def conditional_moments(
    population: Population,
    examples: Sequence[int] | Int[np.ndarray, "chosen"],
    m: int,
    *,
    num_batches: int,
    rng: np.random.Generator,
) -> NormalizedMoments:
    """Mean and variance of x̂ over random batches of m that contain an example, measured.

    One set of batches serves all examples: of a batch that lacks the example, a random member makes
    room for it, which leaves its others a random draw from the rest of the set. All positions of
    an example share a batch's factor a = 1/σ_B and shift b = −μ_B/σ_B, so that E[x̂] = E[a]·x̃ + E[b]
    and Var(x̂) = Var(a)·x̃² + 2Cov(a, b)·x̃ + Var(b) need no x̂. A batch in which the feature is
    constant gives x̂ = 0. The variance has a relative standard error of about √(2/num_batches).

    Args:
      population: of the features.
      examples: numbers of the examples to look at.
      m: examples of a batch, from 2 to N.
      num_batches: at least 2.
      rng: draws the batches, each without replacement.

    Returns:
      Moments of shape=(chosen, *positions, features).

    Raises:
      ValueError: m, num_batches or an example's number is out of range.
    """
    count = population.num_examples
    chosen = np.asarray(examples)
    if chosen.ndim != 1 or not len(chosen) or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"examples={examples} is not allowed: give whole numbers, 1 or more")
    if chosen.min() < 0 or chosen.max() >= count:
        raise ValueError(
            f"examples={chosen.tolist()} is not allowed: they are numbered from 0 to {count - 1}"
        )
    first, second = population.first, population.second
    shape = (len(chosen), first.shape[1])
    sums = np.zeros((5, *shape))  # of a − 1, b, (a − 1)², (a − 1)·b, b²
    for draws in _draws(population, m, num_batches, rng, rows=len(chosen)):
        inside = _members(draws, count)[:, chosen]
        leaves = np.where(inside, chosen, draws[:, :1])

        def batch_mean(values: np.ndarray) -> np.ndarray:
            total = values[draws].sum(axis=1)[:, None]  # noqa: B023
            return (total - values[leaves] + values[chosen]) / m  # noqa: B023

        mean = batch_mean(first)
        var = batch_mean(second) - mean**2
        inverse = np.where(var > _CONSTANT, 1 / np.sqrt(np.maximum(var, _CONSTANT)), 0.0)
        a, b = inverse - 1, -mean * inverse
        sums += [part.sum(axis=0) for part in (a, b, a * a, a * b, b * b)]
    mean_a, mean_b = sums[:2] / num_batches
    products = [mean_a * mean_a, mean_a * mean_b, mean_b * mean_b]
    var_a, cov, var_b = (sums[2:] - num_batches * np.array(products)) / (num_batches - 1)
    x = population.normalized[chosen].astype(np.float64)
    to_x = (len(chosen), *(1,) * (x.ndim - 2), shape[1])
    mean_a, mean_b, var_a, cov, var_b = (
        part.reshape(to_x) for part in (mean_a, mean_b, var_a, cov, var_b)
    )
    return NormalizedMoments(x + mean_a * x + mean_b, var_a * x**2 + 2 * cov * x + var_b)


def predicted_noise(population: Population, m: int) -> StatisticsNoise:
    """How batches' statistics scatter by the scatter of image means, to first order in 1/m.

    Var(u)/m, Cov(u, v)/m and Var(v)/m, times (N − m)/(N − 1); the first is exact. Of a dense layer
    they are 1/m, γ₁/m and (κ − 1)/m, times that factor.

    Raises:
      ValueError: m is out of range.
    """
    factor = _finite_population(population, m) / m
    u = population.first - population.first.mean(axis=0)
    v = population.second - population.second.mean(axis=0)
    return StatisticsNoise(*(factor * np.mean(part, axis=0) for part in (u * u, u * v, v * v)))


def measured_noise(
    population: Population, m: int, *, num_batches: int, rng: np.random.Generator
) -> StatisticsNoise:
    """How the statistics of random batches of m examples scatter, drawn without replacement.

    Raises:
      ValueError: m or num_batches is out of range.
    """
    pairs = [
        (population.first[draws].mean(axis=1), population.second[draws].mean(axis=1))
        for draws in _draws(population, m, num_batches, rng, rows=1)
    ]
    mean, square = (np.concatenate(part) for part in zip(*pairs, strict=True))
    var = square - mean**2
    mean, var = mean - mean.mean(axis=0), var - var.mean(axis=0)
    freedom = num_batches - 1
    return StatisticsNoise(
        *((part.sum(axis=0) / freedom) for part in (mean * mean, mean * var, var * var))
    )


def effective_batch_size(population: Population, m: int, noise: StatisticsNoise) -> EffectiveBatch:
    """Independent values whose statistics would scatter as those of batches of m examples do.

    σ²/Var(μ_B) and (κ − 1)σ⁴/Var(σ_B²), as of batches from an infinite population: what batches
    without replacement lack in scatter, (N − m)/(N − 1), is given back. m where all positions of an
    example are equal, m·p where they are independent; more for the mean where they balance out,
    as behind filters that take differences.

    Args:
      population: of the features.
      m: examples of a batch, below N.
      noise: of such batches, predicted or measured.

    Raises:
      ValueError: m is out of range, or N, of which all batches are the same.
    """
    factor = _finite_population(population, m)
    if not factor:
        raise ValueError(f"m={m} is not allowed: it is the whole set, whose statistics are fixed")
    with np.errstate(divide="ignore"):
        return EffectiveBatch(factor / noise.mean, (population.kurtosis - 1) * factor / noise.var)


def _finite_population(population: Population, m: int) -> float:
    count = population.num_examples
    m = whole_number("m", m, least=1, most=count)
    return (count - m) / (count - 1)


def _draws(
    population: Population, m: int, num_batches: int, rng: np.random.Generator, *, rows: int
) -> Iterator[Int[np.ndarray, "batches m"]]:
    """Numbers of the examples of batches, in random order, as many at once as memory is for."""
    count, num_features = population.first.shape
    m = whole_number("m", m, least=2, most=count)
    num_batches = whole_number("num_batches", num_batches, least=2)
    together = max(1, _ELEMENTS // (num_features * max(m, rows)))
    for start in range(0, num_batches, together):
        size = min(together, num_batches - start)
        yield np.stack([rng.choice(count, m, replace=False) for _ in range(size)])


def _members(draws: np.ndarray, count: int) -> Bool[np.ndarray, "batches examples"]:
    members = np.zeros((len(draws), count), bool)
    np.put_along_axis(members, draws, True, axis=1)
    return members
