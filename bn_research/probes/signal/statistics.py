"""What a layer's values and gradient look like, in numbers that do not underflow."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bn_research.normalization.moments import batch_moments


def log10_rms(x: Float[Array, "..."]) -> Float[Array, ""]:
    """log₁₀ of the root mean square of all elements, log₁₀ √⟨x²⟩.

    The elements are divided by the largest first: squares of 1e-20 would underflow in float32.
    An array of zeros gives −∞; NaN or ∞ in x gives NaN.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(x))
    dead = largest == 0
    largest = jnp.where(dead, 1, largest)
    relative = jnp.mean(jnp.square(x / largest))
    return jnp.where(dead, -jnp.inf, jnp.log10(largest) + 0.5 * jnp.log10(relative))


class Statistics(NamedTuple):
    """Statistics of one array [batch, ..., features]; scalars in float32 or wider.

    Mean and std are in units of the largest magnitude, so that none of them underflows.
    """

    log10_rms: Array
    largest: Array
    mean: Array
    std: Array
    non_positive: Array  # share of features that are ≤ 0 for all examples at all positions
    zero: Array  # share of features that are 0 for all examples at all positions
    conditioning: Array  # Σ_f mean_f² / Σ_f var_f over features f
    soft_rank: Array


def statistics(x: Float[Array, "batch ... features"]) -> Statistics:
    """Everything that `LayerSignal` says of an array; NaN where it is not finite."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(x))
    unit = x / jnp.where(largest > 0, largest, 1)
    examples_and_positions = tuple(range(x.ndim - 1))
    whole = batch_moments(unit.reshape(-1, 1))
    features = batch_moments(unit)
    squared_mean = jnp.sum(jnp.square(features.mean))
    var = jnp.sum(features.m2 / features.count)
    conditioning = squared_mean / jnp.where(var > 0, var, 1)
    constant = jnp.where(squared_mean > 0, jnp.inf, 0)
    return Statistics(
        log10_rms=log10_rms(x),
        largest=largest,
        mean=whole.mean[0],
        std=jnp.sqrt(whole.m2[0] / whole.count[0]),
        non_positive=jnp.mean(jnp.all(x <= 0, axis=examples_and_positions), dtype=jnp.float32),
        zero=jnp.mean(jnp.all(x == 0, axis=examples_and_positions), dtype=jnp.float32),
        conditioning=jnp.where(var == 0, constant, conditioning),
        soft_rank=_soft_rank(unit.reshape(x.shape[0], -1)),
    )


def _soft_rank(h: Float[Array, "batch elements"]) -> Float[Array, ""]:
    """(Σλ)²/Σλ², λ the eigenvalues of the smaller Gram matrix; those of the larger are the same."""
    h = h if h.shape[0] <= h.shape[1] else h.T
    gram = jnp.matmul(h, h.T, precision=jax.lax.Precision.HIGHEST)
    trace = jnp.trace(gram)
    relative = gram / jnp.where(trace > 0, trace, 1)
    squares = jnp.sum(jnp.square(relative))
    return jnp.where(trace == 0, 0, 1 / jnp.where(squares > 0, squares, 1))
