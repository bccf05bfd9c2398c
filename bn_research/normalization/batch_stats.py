r"""Statistics for inference: exponential averages, and population statistics (Algorithm 2).

Source: S. Ioffe, C. Szegedy, ICML 2015, arXiv 1502.03167, section 3.1 and algorithm 2.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bn_research.normalization.moments import Moments, merge_moments, variance


class BatchStats(NamedTuple):
    """What the `batch_stats` collection holds for a layer: Flax's leaves, nothing more."""

    mean: Array  # shape=(*features), dtype=float32
    var: Array  # shape=(*features), dtype=float32


def update_batch_stats(
    stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | Float[Array, ""] = 0.99,
    unbiased: bool = False,
) -> BatchStats:
    """Exponential average: new = momentum·old + (1 − momentum)·batch, Flax's convention.

    PyTorch's momentum is one minus this one. Shapes and dtypes stay those of `stats`, whatever
    the moments' dtype; statistics carry no gradient; features without valid elements keep theirs.

    Args:
      stats: running statistics.
      moments: of the batch, as `batch_norm` returns them.
      momentum: in [0, 1]; `cumulative_momentum(step)` gives the mean of all batches instead.
      unbiased: average m2/(n − 1), as PyTorch does, rather than m2/n, as Flax does.

    Raises:
      ValueError: momentum outside [0, 1].
    """
    check_momentum(momentum)
    batch = BatchStats(moments.mean, variance(moments, unbiased=unbiased))

    def average(old, new):
        blend = momentum * old + (1 - momentum) * new
        return jnp.where(moments.count > 0, blend, old).astype(old.dtype)

    return jax.lax.stop_gradient(jax.tree.map(average, stats, batch))


def cumulative_momentum(step: int | Int[Array, ""]) -> Float[Array, ""]:
    """Momentum step/(step + 1): statistics become the plain mean of all batches up to this one.

    After k updates with steps 0 … k − 1 each statistic is the mean of k batches', whatever it was
    initialized with; PyTorch calls this `momentum=None`. The mean of variances lacks the spread of
    the means between batches: `population_stats(..., method="merged")` has it.

    Args:
      step: number of updates made before this one, ≥ 0.
    """
    step = jnp.asarray(step, jnp.float32)
    return step / (step + 1)


def population_stats(
    moments_fn: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    method: Literal["algorithm2", "merged"] = "algorithm2",
) -> Any:
    """Statistics of the population, from batches seen with frozen weights.

    "algorithm2" is the paper's: E[x] is the mean over batches of μ_B, and Var[x] the mean over
    batches of the unbiased variance m/(m − 1)·σ_B². "merged" merges the batches' moments exactly
    (Chan et al. 1983) and takes the unbiased variance of the whole, which also holds for batches
    of unequal size.

    Args:
      moments_fn: batch -> pytree whose leaves are `Moments`, one per layer.
      batches: at least one.
      method: "algorithm2" or "merged".

    Returns:
      The same pytree with `BatchStats` for `Moments`.

    Raises:
      ValueError: an unknown method, or no batches.
    """
    if method not in ("algorithm2", "merged"):
        raise ValueError(f"method={method!r} is unknown: allowed are 'algorithm2' and 'merged'")

    def is_moments(leaf):
        return isinstance(leaf, Moments)

    def batch_statistics(m):
        return BatchStats(m.mean, variance(m, unbiased=True))

    total, batch_count = None, 0
    for batch in batches:
        new = moments_fn(batch)
        batch_count += 1
        if method == "algorithm2":
            new = jax.tree.map(batch_statistics, new, is_leaf=is_moments)
            # A running mean keeps the digits that a sum of many batches would lose.
            step = batch_count
            total = (
                new
                if total is None
                else jax.tree.map(lambda old, b, k=step: old + (b - old) / k, total, new)
            )
        else:
            total = (
                new
                if total is None
                else jax.tree.map(merge_moments, total, new, is_leaf=is_moments)
            )
    if total is None:
        raise ValueError("batches is empty: population statistics need at least one batch")
    if method == "merged":
        total = jax.tree.map(batch_statistics, total, is_leaf=is_moments)
    return total


def check_momentum(momentum) -> None:
    """ValueError unless momentum is in [0, 1] (a traced one is not looked at)."""
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum={momentum!r} is not allowed: it must lie in [0, 1] "
            "(new = momentum·old + (1 − momentum)·batch)"
        )
