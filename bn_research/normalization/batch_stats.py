r"""Statistics for inference: exponential averages, and population statistics (Algorithm 2).

Source: S. Ioffe, C. Szegedy, ICML 2015, arXiv 1502.03167, section 3.1 and algorithm 2.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bn_research.normalization.moments import Moments, merge_moments, promoted, variance


class BatchStats(NamedTuple):
    """What the `batch_stats` collection holds for a layer: Flax's leaves, nothing more."""

    mean: Array  # shape=(*features), dtype=float32; complex64 for complex input
    var: Array  # shape=(*features), dtype=float32


def update_batch_stats(
    stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | Float[Array, ""] = 0.99,
    unbiased: bool = False,
    stop_gradient: bool = False,
) -> BatchStats:
    """Exponential average: new = momentum·old + (1 − momentum)·batch, Flax's convention.

    PyTorch's momentum is one minus this one. A feature keeps its mean where the batch has no
    element of it, and its variance too where the batch has too few: none, or one if unbiased.

    Shapes, dtypes and shardings stay those of `stats`, whatever those of the moments, so that the
    statistics can be carried by a loop. Two dtypes are left after the first step, for no average
    fits them. bfloat16 and float16 become float32: at a momentum of 0.99 most steps would move a
    value by less than half of what separates two of their numbers, and the average would stand
    still short of its end. And the mean of complex numbers becomes complex.

    Args:
      stats: running statistics.
      moments: of the batch, as `batch_norm` returns them.
      momentum: in [0, 1]; `cumulative_momentum(step)` gives the mean of all batches instead.
      unbiased: average m2/(n − 1), as PyTorch does, rather than m2/n, as Flax does.
      stop_gradient: cut the gradient by which the new statistics depend on the batch, and on the
        old ones. A loss on the new statistics trains by it, as in Flax.

    Raises:
      ValueError: momentum outside [0, 1], or moments of another shape than the statistics.
    """
    check_momentum(momentum)
    known = isinstance(momentum, (int, float))  # then 1 − momentum keeps Python's digits
    batch = BatchStats(moments.mean, variance(moments, unbiased=unbiased))
    enough = BatchStats(moments.count > 0, moments.count > int(unbiased))

    def average(name, old, new, enough):
        old = jnp.asarray(old)
        if new.shape != old.shape:
            raise ValueError(
                f"moments has features of shape {new.shape}: it must be that of stats.{name}, "
                f"{old.shape}"
            )
        new, enough = _sharded_as(new, old), _sharded_as(enough, old)
        wide = promoted(old.dtype, new.dtype)
        share = momentum if known else jnp.asarray(momentum, jnp.finfo(wide).dtype)
        blend = share * old.astype(wide) + (1 - share) * new.astype(wide)
        kept = promoted(old.dtype, jnp.float32)
        if jnp.iscomplexobj(new):
            kept = promoted(kept, jnp.complex64)
        return jnp.where(enough, blend, old.astype(wide)).astype(kept)

    new = BatchStats(*map(average, BatchStats._fields, stats, batch, enough))
    return jax.lax.stop_gradient(new) if stop_gradient else new


def _sharded_as(x: Array, like: Array) -> Array:
    """X, laid over a mesh of explicit axes as `like` is."""
    have, want = jax.typeof(x).sharding, jax.typeof(like).sharding
    if have.spec == want.spec:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(have.mesh, want.spec))


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
    initial: Any = None,
) -> Any:
    """Statistics of the population, from batches seen with frozen weights.

    "algorithm2" is the paper's: E[x] is the mean over batches of μ_B, and Var[x] the mean over
    batches of the unbiased variance m/(m − 1)·σ_B². "merged" merges the batches' moments exactly
    (Chan et al. 1983) and takes the unbiased variance of the whole, which also holds for batches
    of unequal size. A batch without an element of a feature takes no part in that feature's mean,
    nor one with a single element in its variance.

    Args:
      moments_fn: batch -> pytree whose leaves are `Moments`, one per layer.
      batches: at least one.
      method: "algorithm2" or "merged".
      initial: pytree like the result, for the features of which no batch has enough elements; None
        is 0 everywhere.

    Returns:
      The same pytree with `BatchStats` for `Moments`.

    Raises:
      ValueError: an unknown method, or no batches.
    """
    if method not in ("algorithm2", "merged"):
        raise ValueError(f"method={method!r} is unknown: allowed are 'algorithm2' and 'merged'")

    def is_moments(leaf):
        return isinstance(leaf, Moments)

    def statistics(m):
        """Those of one batch, and in how many batches they could be told."""
        told = [jnp.asarray(m.count > least, m.m2.dtype) for least in (0, 1)]
        return BatchStats(m.mean, variance(m, unbiased=True)), BatchStats(*told)

    def average(total, new):
        (old, before), (value, told) = total, new
        count = jax.tree.map(jnp.add, before, told)
        # A running mean keeps the digits that a sum of many batches would lose.
        mean = jax.tree.map(
            lambda o, v, t, n: o + jnp.where(t > 0, (v - o) / jnp.maximum(n, 1), 0),
            *(old, value, told, count),
        )
        return mean, count

    def combine(a, b):
        if method == "merged":
            return merge_moments(a, b)
        return average(a, statistics(b))

    total = None
    for batch in batches:
        new = moments_fn(batch)
        if total is not None:
            total = jax.tree.map(lambda m, t: combine(t, m), new, total, is_leaf=is_moments)
        elif method == "merged":
            total = new
        else:
            total = jax.tree.map(statistics, new, is_leaf=is_moments)
    if total is None:
        raise ValueError("batches is empty: population statistics need at least one batch")
    if method == "merged":
        total = jax.tree.map(statistics, total, is_leaf=is_moments)

    def result(_, found, initial=None):
        value, told = found
        other = jax.tree.map(jnp.zeros_like, value) if initial is None else initial
        return jax.tree.map(lambda v, n, o: jnp.where(n > 0, v, o), value, told, other)

    trees = (total,) if initial is None else (total, initial)
    return jax.tree.map(result, new, *trees, is_leaf=is_moments)


def check_momentum(momentum) -> None:
    """ValueError unless momentum is in [0, 1] (a traced one is not looked at)."""
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum={momentum!r} is not allowed: it must lie in [0, 1] "
            "(new = momentum·old + (1 − momentum)·batch)"
        )
