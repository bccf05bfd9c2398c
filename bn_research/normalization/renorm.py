r"""Batch renormalization: normalizing by the batch, corrected towards the running statistics.

    y = γ·(x̂·r + d) + β,    x̂ = (x − μ_B)/σ_B,    σ = √(var + ε)
    r = clip(σ_B/σ, 1/r_max, r_max)        d = clip((μ_B − μ)/σ, −d_max, d_max)

with μ and var the running statistics, μ_B and σ_B those of the batch. Without bounds y is what
inference gives, γ·(x − μ)/σ + β; with r_max = 1 and d_max = 0 it is batch normalization. To the
gradient r and d are constants.

Source: S. Ioffe, "Batch renormalization: towards reducing minibatch dependence in
batch-normalized models", NeurIPS 2017, arXiv 1702.03275, algorithm 1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from numpy.typing import DTypeLike

from bn_research.normalization.batch_norm import Sharing, check_groups, transform
from bn_research.normalization.batch_stats import BatchStats
from bn_research.normalization.moments import (
    Moments,
    accumulator_dtype,
    check_input,
    promoted,
    squeeze_moments,
)
from bn_research.normalization.normalize import (
    check_epsilon,
    per_feature,
    result_dtype,
    rsqrt_or_zero,
    scale_and_bias,
    scale_and_shift,
)


def batch_renorm(
    x: Float[Array, "..."],
    stats: BatchStats,
    scale: Float[Array, "*features"] | None = None,
    bias: Float[Array, "*features"] | None = None,
    *,
    r_max: float | Float[Array, ""],
    d_max: float | Float[Array, ""],
    feature_axes: int | Sequence[int] = -1,
    epsilon: float | Float[Array, ""] = 1e-5,
    where: Bool[Array, "..."] | None = None,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "..."], Moments]:
    """Normalizes x by its own statistics, corrected towards running ones: algorithm 1.

    Differentiable in x, scale and bias to any order, and so are the returned moments in x; r, d,
    epsilon, the mask and the running statistics carry no gradient. The paper's
    schedule is r_max = 1 and d_max = 0 for 5,000 steps, relaxed gradually from there to reach
    r_max = 3 at 40,000 steps and d_max = 5 at 25,000.

    With epsilon = 0, division by a deviation of 0 gives 0, as in `normalize`: a feature constant
    in the batch comes out as scale·d + bias, one whose running variance is 0 with r = 1/r_max and
    d = 0, and one that is both as `bias`.

    Args:
      x: real array; statistics are computed in float32, or float64 when x is float64. Integers and
        bool are taken as float32.
      stats: running statistics before this batch, shape of the feature axes in ascending order.
      scale: γ, shape as the statistics; None is 1.
      bias: β, shape as the statistics; None is 0.
      r_max: bound of σ_B/σ and of its inverse; ≥ 1, may be infinite, may be traced.
      d_max: bound of |μ_B − μ|/σ; ≥ 0, may be infinite, may be traced.
      feature_axes: axes that keep statistics of their own; all others are reduced.
      epsilon: added to the variance of the batch and to the running one; ≥ 0.
      where: mask, broadcastable to x. Masked elements take no part in the statistics, come out as
        `bias` and receive no gradient, even when they hold NaN.
      axis_name: axis of `pmap`, `shard_map` or `vmap` over whose devices statistics are shared.
      axis_index_groups: share within these groups of devices only; a partition of the axis.
      dtype: dtype of y; None promotes the dtypes of x, scale and bias.

    Returns:
      y, of the shape of x, and the moments of the batch to update running statistics with.

    Raises:
      ValueError: r_max < 1, d_max < 0, or a bad axis, shape, dtype, epsilon or mask.
    """
    x, where, axes = check_input(x, feature_axes, where, real=True)
    check_epsilon(epsilon)
    groups = check_groups(axis_name, axis_index_groups)
    _check_bound("r_max", r_max, 1)
    _check_bound("d_max", d_max, 0)
    mean = per_feature("stats.mean", stats.mean, x, axes)
    var = per_feature("stats.var", stats.var, x, axes)
    result = result_dtype(x, scale, bias, dtype)
    scale, bias = scale_and_bias(scale, bias, x, axes)

    x = x.astype(accumulator_dtype(x.dtype))
    kept = tuple(n if axis in axes else 1 for axis, n in enumerate(x.shape))
    reduced = tuple(axis for axis in range(x.ndim) if axis not in axes)
    one, zero = jnp.ones(kept, x.dtype), jnp.zeros(kept, x.dtype)
    floor = jnp.asarray(epsilon)
    x_hat, batch = transform(x, where, one, zero, floor, Sharing(reduced, axis_name, groups))

    # Mean and shift apart: their rounded sum is off by 1e-3 of a standard deviation at a mean of
    # 1e4 of them, while shift − mean cancels exactly there.
    shift, rest, m2 = jax.lax.stop_gradient((batch.shift, batch.mean, batch.m2))
    mean, var = (v.astype(promoted(v.dtype, x.dtype)).reshape(kept) for v in (mean, var))
    shift, rest, m2 = (v.astype(mean.dtype) for v in (shift, rest, m2))
    floor = floor.astype(mean.dtype)
    rstd = rsqrt_or_zero(var + floor)
    batch_std = jnp.sqrt(m2 / jnp.maximum(batch.count, 1).astype(m2.dtype) + floor)
    r = jnp.clip(batch_std * rstd, 1 / r_max, r_max).astype(x.dtype)
    d = jnp.clip(((shift - mean) + rest) * rstd, -d_max, d_max).astype(x.dtype)
    y = x_hat * jax.lax.stop_gradient(r) + jax.lax.stop_gradient(d)
    if where is not None:
        y = jnp.where(where, y, 0)
    y = scale_and_shift(y, scale, bias, kept, result)
    return y, squeeze_moments(batch, reduced)


def _check_bound(name: str, value, least: int) -> None:
    """ValueError unless value ≥ least (a traced one is not looked at)."""
    if not isinstance(value, jax.core.Tracer) and not value >= least:
        raise ValueError(f"{name}={value!r} is not allowed: it must be ≥ {least}")
