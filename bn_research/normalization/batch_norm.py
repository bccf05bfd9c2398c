r"""The batch-normalizing transform, with its closed-form gradient.

    x̂ = (x − μ)·r,    r = 1/√(σ² + ε),    y = γ·x̂ + β

with μ and σ² the mean and the biased variance of each feature over the elements that share
statistics. A change ẋ of the input moves x̂ by

    x̂' = r·(ẋ − ⟨ẋ⟩ − x̂·⟨x̂·ẋ⟩)        r' = −r²·⟨x̂·ẋ⟩

with ⟨·⟩ the mean over the same elements. Nothing in it is larger than r², so float32 carries it
for standard deviations from 1e-18 to 1e15 and for ε = 0, where autodiff through rsqrt would form
σ⁻³ and overflow below 1e-13. The rule is linear in ẋ, so JAX derives forward mode, reverse mode
and Hessian-vector products from it. The moments that are returned move by

    μ' = ⟨ẋ⟩        m2' = 2n·⟨x̂·ẋ⟩/r

so that what is computed from running statistics has the gradient of the batch's. For complex x the
variance is the mean of |x − μ|², and ⟨x̂·ẋ⟩ the mean of the real part of conj(x̂)·ẋ.

Source: S. Ioffe, C. Szegedy, "Batch normalization: accelerating deep network training by reducing
internal covariate shift", ICML 2015, arXiv 1502.03167, algorithm 1 and section 3.
"""

import contextlib
import contextvars
import functools
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from numpy.typing import DTypeLike

from bn_research.normalization.moments import (
    Moments,
    ShiftedMoments,
    accumulator_dtype,
    check_input,
    group_psum,
    promoted,
    shifted_moments,
    squeeze_moments,
    sync_shifted_moments,
)
from bn_research.normalization.normalize import (
    check_epsilon,
    result_dtype,
    rsqrt_or_zero,
    scale_and_bias,
)

_logger = logging.getLogger("bn_research")
_warned: set[tuple[int, str, int]] = set()  # places that were told
_warnings_wanted = contextvars.ContextVar("_warnings_wanted", default=True)
_LIBRARIES = ("bn_research", "jax", "flax", "contextlib", "functools")


class Sharing(NamedTuple):
    """Which elements share statistics; hashable, so that it can be static."""

    axes: tuple[int, ...]  # reduced axes
    axis_name: str | None  # merged over this axis of devices
    axis_index_groups: tuple[tuple[int, ...], ...] | None  # within these groups of devices


def batch_norm(
    x: Float[Array, "..."],
    scale: Float[Array, "*features"] | None = None,
    bias: Float[Array, "*features"] | None = None,
    *,
    feature_axes: int | Sequence[int] = -1,
    epsilon: float | Float[Array, ""] = 1e-5,
    where: Bool[Array, "..."] | None = None,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    group_size: int | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "..."], Moments]:
    """Normalizes x by its own statistics: algorithm 1 of Ioffe & Szegedy (2015).

    Differentiable in x, scale and bias to any order, forwards and backwards, and so are the
    returned moments in x; epsilon and the mask carry no gradient. What does not use the moments'
    gradient does not pay for it.

    What has no spread to divide by:
      - one value per feature (a batch of one example without other axes), or none: y is `bias`,
        the gradient of x is 0, and where the shapes alone tell, the logger "bn_research" says so
        when the program runs, once for each place that calls; moments have that count, and a count
        of 0 leaves running statistics as they are;
      - a feature masked everywhere: likewise, without a warning, since masks are data;
      - a constant feature: y is `bias`; the gradient of x is that of a spread of √epsilon, and 0
        with epsilon=0;
      - NaN or Inf in one example: NaN in that feature of every example that shares statistics with
        it, and in its moments; other features and groups are untouched. Masked, it reaches nothing.

    Args:
      x: array; statistics are computed in float32, or float64 when x is float64. Integers and bool
        are taken as float32. Complex numbers have a complex mean and a real variance, the mean of
        |x − μ|².
      scale: γ, shape of the feature axes in ascending order; None is 1.
      bias: β, shape as scale; None is 0.
      feature_axes: axes that keep statistics of their own; all others are reduced.
      epsilon: added to the variance; ≥ 0. With 0 a constant feature gives `bias` and no gradient.
      where: mask, broadcastable to x. Masked elements take no part in the statistics, come out as
        `bias` and receive no gradient, even when they hold NaN.
      axis_name: axis of `pmap`, `shard_map` or `vmap` over whose devices statistics are shared.
      axis_index_groups: share within these groups of devices only; a partition of the axis.
      group_size: number of examples (entries of axis 0) that share statistics, whatever the
        number of devices that hold them; None is the whole batch, of all devices of axis_name.
        Groups within one device need no collective, larger ones need axis_name.
      dtype: dtype of y; None promotes the dtypes of x, scale and bias, and integers to float32.

    Returns:
      y, of the shape of x, and the moments to update running statistics with. With a group_size
      these pool the groups on this device: the mean of their means and the sum of squared
      deviations each from its own group's mean.

    Raises:
      ValueError: a bad axis, shape, dtype, epsilon, mask or group size.
    """
    x, where, axes = check_input(x, feature_axes, where)
    check_epsilon(epsilon)
    groups = check_groups(axis_name, axis_index_groups)
    result = result_dtype(x, scale, bias, dtype)
    kept = tuple(n if axis in axes else 1 for axis, n in enumerate(x.shape))
    scale, bias = scale_and_bias(scale, bias, x, axes)
    wide = accumulator_dtype(x.dtype)
    reduced = tuple(axis for axis in range(x.ndim) if axis not in axes)

    def per_feature(value, default):
        if value is None:
            return jnp.full(kept, default, jnp.finfo(wide).dtype)
        return value.astype(promoted(value.dtype, jnp.finfo(wide).dtype)).reshape(kept)

    gamma, beta = per_feature(scale, 1), per_feature(bias, 0)

    def apply(x, where, sharing):
        one_rank = (jnp.expand_dims(v, range(x.ndim - v.ndim)) for v in (gamma, beta))
        return transform(x, where, *one_rank, jnp.asarray(epsilon), sharing)

    if group_size is None:
        y, shifted = apply(x, where, Sharing(reduced, axis_name, groups))
        moments = squeeze_moments(shifted, reduced)
    else:
        y, moments = _apply_to_groups(apply, x, where, axes, reduced, group_size, axis_name, groups)
    return y.astype(result), moments


def check_groups(
    axis_name: str | None, axis_index_groups: Sequence[Sequence[int]] | None
) -> tuple[tuple[int, ...], ...] | None:
    """Groups of devices as tuples; ValueError when there is no axis for them."""
    if axis_index_groups is None:
        return None
    if axis_name is None:
        raise ValueError(
            f"axis_index_groups={axis_index_groups!r} needs axis_name: name the axis of devices"
        )
    return tuple(map(tuple, axis_index_groups))


def _apply_to_groups(apply, x, where, axes, reduced, group_size, axis_name, groups):
    """Transforms groups of consecutive examples; the moments are pooled over local groups."""
    if 0 in axes:
        raise ValueError(
            f"group_size={group_size} groups the examples of axis 0, which feature_axes names too"
        )
    if groups is not None:
        raise ValueError(
            f"group_size={group_size} and axis_index_groups={groups} exclude each other: give one"
        )
    batch = x.shape[0]
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size={group_size!r} must be a positive number of examples")
    if not isinstance(batch, int) and batch % group_size != 0:
        raise ValueError(
            f"group_size={group_size} does not divide the batch of {batch} examples, as far as its "
            f"name tells: call a symbolic batch '{group_size}*n'"
        )
    if not isinstance(batch, int) or group_size <= batch:
        if batch % group_size != 0:
            raise ValueError(
                f"group_size={group_size} does not divide the batch of {batch} examples on a device"
            )
        shape = (batch // group_size, group_size, *x.shape[1:])
        mask = None if where is None else jnp.broadcast_to(where, x.shape).reshape(shape)
        inner = tuple(axis + 1 for axis in reduced)
        y, shifted = apply(x.reshape(shape), mask, Sharing(inner, None, None))
        return y.reshape(x.shape), _pool(squeeze_moments(shifted, inner))
    if axis_name is None:
        raise ValueError(
            f"group_size={group_size} is larger than the batch of {batch} examples: allowed are "
            "its divisors, or give the axis_name of the devices that share a group"
        )
    devices, size = group_size // batch, jax.lax.axis_size(axis_name)
    if group_size % batch or size % devices:
        raise ValueError(
            f"group_size={group_size} does not divide the batch: {size} devices with {batch} "
            "examples each must split into equal groups of whole devices"
        )
    groups = tuple(tuple(range(i, i + devices)) for i in range(0, size, devices))
    sharing = Sharing(reduced, axis_name, None if devices == size else groups)
    y, shifted = apply(x, where, sharing)
    return y, squeeze_moments(shifted, reduced)


def _warn_of_too_few_values(x, sharing):
    """Has the program say so when it runs; one that is traced for its shapes alone never does."""
    if not _warnings_wanted.get():
        return
    values = math.prod(x.shape[axis] for axis in sharing.axes)
    if sharing.axis_index_groups is not None:
        values *= min(map(len, sharing.axis_index_groups))
    elif sharing.axis_name is not None:
        values *= jax.lax.axis_size(sharing.axis_name)
    if isinstance(values, int) and values < 2:
        jax.debug.callback(functools.partial(_warn, values, *_caller()))


def _warn(values: int, filename: str, line: int) -> None:
    """Once for each place in the user's code; logged, since a running program can raise nothing."""
    if (values, filename, line) not in _warned:
        _warned.add((values, filename, line))
        _logger.warning(
            "%s:%d: batch_norm of %d value(s) per feature: y is bias whatever x is; give at least "
            "2, or normalize by running statistics",
            filename,
            line,
            values,
        )


def _caller() -> tuple[str, int]:
    """File and line where a user's own code called."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


@contextlib.contextmanager
def few_values_allowed() -> Iterator[None]:
    """Within it no program is made to warn: models are often initialized with one example."""
    token = _warnings_wanted.set(False)
    try:
        yield
    finally:
        _warnings_wanted.reset(token)


def _pool(moments: Moments) -> Moments:
    """Pools groups, axis 0: weighted mean of means, sum of m2, each about its group's mean."""
    count = jnp.sum(moments.count, 0, keepdims=True)
    share = moments.count / jnp.maximum(count, 1)
    # Relative to one of them, so that equal means stay exactly what they are.
    reference = jax.lax.stop_gradient(jnp.max(moments.mean, 0, keepdims=True))
    mean = reference + jnp.sum(share * (moments.mean - reference), 0, keepdims=True)
    mean = jnp.where(count > 0, mean, 0)
    return Moments(count[0], mean[0], jnp.sum(moments.m2, 0))


class _Statistics(NamedTuple):
    """What an element needs to be standardized; axes kept: x̂ = ((x − centre) − rest)·rstd."""

    centre: Array  # near the mean, within a few standard deviations
    rest: Array  # mean − centre; their sum would be rounded, at a mean of 1e4 σ to 1e-3 σ
    rstd: Array  # 1/√(σ² + ε)


# Deviations are written x − c, −c + x, 2·x − 2·c or 8·x − 8·c, all exact, so that each sum over the
# batch has a full-size operand of its own. XLA on a CPU fuses such an operand into its sum; one
# used twice it writes to memory and reads back, which costs more than everything else here.

# Reverse mode keeps x in its own dtype and a few numbers for each feature, and computes the rest
# again: x̂ and x − c would be two arrays more, wider ones for bfloat16.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def transform(
    x: Array, where: Array | None, scale: Array, bias: Array, epsilon: Array, sharing: Sharing
) -> tuple[Array, ShiftedMoments]:
    """Output and shifted moments of the elements that share statistics, axes kept throughout."""
    _warn_of_too_few_values(x, sharing)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)
    if sharing.axis_name is None or _is_of_devices(sharing.axis_name):
        return _transform(x, where, scale, bias, epsilon, sharing)
    return _transform_under_vmap(x, where, scale, bias, epsilon, sharing)


def _is_of_devices(axis_name: str | tuple[str, ...]) -> bool:
    """Whether an axis is one of `shard_map` or `pmap` rather than of `vmap`."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    return set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _transform(x, where, scale, bias, epsilon, sharing):
    x = _widened(x, where)
    statistics, shared = _statistics(x, where, epsilon, sharing)
    return _standardize_and_affine(x, where, scale, bias, statistics), shared


@_transform.defjvp
def _transform_jvp(sharing, primals, tangents):
    x, where, scale, bias, epsilon = primals
    t, _, scale_dot, bias_dot, _ = tangents
    wide = _widened(x, where)
    statistics, shared = _statistics(wide, where, epsilon, sharing)
    y = _standardize_and_affine(wide, where, scale, bias, statistics)

    @_recomputed
    def tangent(x, where, scale, statistics, shared, t, scale_dot, bias_dot):
        x, t = _widened(x, where), _widened(t, where)
        # Gathered per feature, so that in reverse mode two sums over the batch, of ȳ and of x̂·ȳ,
        # serve the gradients of x, scale and bias alike.
        mean_t, mean_xt = _mean_products(x, where, t, statistics, shared, sharing)
        centre, rest, rstd = statistics
        factor = rstd * scale
        for_one = bias_dot - factor * mean_t
        for_x_hat = scale_dot - factor * mean_xt
        slope = rstd * for_x_hat
        y_dot = factor * t + (2 * x - 2 * centre) * (slope / 2) + (for_one - rest * slope)
        return y_dot if where is None else jnp.where(where, y_dot, bias_dot), mean_t, mean_xt

    y_dot, *means = tangent(x, where, scale, statistics, shared, t, scale_dot, bias_dot)
    return (y, shared), (y_dot, _moments_dot(shared, epsilon, *means))


def _widened(x, where):
    """In the dtype of the statistics, zero where masked."""
    x = x.astype(accumulator_dtype(x.dtype))
    return x if where is None else jnp.where(where, x, 0)


def _plain_statistics(x, where, epsilon, sharing):
    """Statistics, and the moments that they come from; x is zero where masked."""
    shared = shifted_moments(x, sharing.axes, where)
    if sharing.axis_name is not None:
        shared = sync_shifted_moments(shared, sharing.axis_name, sharing.axis_index_groups)
    rstd = rsqrt_or_zero(_spread(shared, epsilon))
    return _Statistics(shared.shift, shared.mean, rstd), shared


_statistics = jax.custom_jvp(_plain_statistics, nondiff_argnums=(3,))


@_statistics.defjvp
def _statistics_jvp(sharing, primals, tangents):
    x, where, epsilon = primals
    t = tangents[0] if where is None else jnp.where(where, tangents[0], 0)
    statistics, shared = _statistics(x, where, epsilon, sharing)
    mean_t, mean_xt = _mean_products(x, where, t, statistics, shared, sharing)
    rstd_dot = -jnp.square(statistics.rstd) * mean_xt
    statistics_dot = _Statistics(mean_t, jnp.zeros_like(mean_t), rstd_dot)
    return (statistics, shared), (statistics_dot, _moments_dot(shared, epsilon, mean_t, mean_xt))


def _spread(shared, epsilon):
    """σ² + ε."""
    return shared.m2 / jnp.maximum(shared.count, 1) + epsilon.astype(shared.m2.dtype)


def _moments_dot(shared, epsilon, mean_t, mean_xt):
    """What the change of x moves the moments by; the shift stays."""
    m2_dot = 2 * shared.count * jnp.sqrt(_spread(shared, epsilon)) * mean_xt
    return ShiftedMoments(
        jnp.zeros_like(shared.count), jnp.zeros_like(shared.shift), mean_t, m2_dot
    )


def _mean_products(x, where, t, statistics, shared, sharing):
    """⟨t⟩ and ⟨x̂·t⟩ over the elements that share statistics, by one collective."""
    centre, rest, rstd = statistics
    x_hat = ((-centre + x) - rest) * rstd
    if where is not None:
        x_hat = jnp.where(where, x_hat, 0)
    sums = [jnp.sum(v, sharing.axes, keepdims=True) for v in (t, _product(x_hat, t))]
    if sharing.axis_name is not None:
        packed = jnp.stack([v.astype(t.dtype) for v in sums])
        sums = group_psum(packed, sharing.axis_name, sharing.axis_index_groups)
    divisor = jnp.maximum(shared.count, 1)
    return sums[0] / divisor, sums[1].real / divisor


def _product(a, b):
    """a·b, and of complex numbers the real part of conj(a)·b."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b


def _standardize_and_affine(x, where, scale, bias, statistics):
    centre, rest, rstd = statistics
    y = ((-centre + x) - rest) * (rstd * scale) + bias
    return y if where is None else jnp.where(where, y, bias)


@functools.partial(_recomputed, static_argnums=(5,))
def _transform_under_vmap(x, where, scale, bias, epsilon, sharing):
    """The same values, with derivatives that JAX finds by itself.

    A derivative rule is traced when someone differentiates. By then `vmap` may have put an axis of
    arrays in the place of its named one, as in grad(jit(vmap(f, axis_name="b"))), and a rule's sum
    over that name fails. Here every sum is traced at once. Nor does any of them become too large:
    x̂ has mean 0 and variance 1, and its mean and variance as functions of x, by statistics that
    are held fixed, tell how x moves the statistics themselves, to any order.
    """
    x = _widened(x, where)
    fixed, shared = jax.lax.stop_gradient(_plain_statistics(x, where, epsilon, sharing))
    centre, rest, rstd = fixed
    deviation = (-centre + x) - rest
    if where is not None:
        deviation = jnp.where(where, deviation, 0)
    x_hat = deviation * rstd
    sums = [jnp.sum(v, sharing.axes, keepdims=True) for v in (deviation, _product(x_hat, x_hat))]
    divisor = jnp.maximum(shared.count, 1)
    mean, square = (
        group_psum(v, sharing.axis_name, sharing.axis_index_groups) / divisor for v in sums
    )
    var = square - _product(mean * rstd, mean * rstd)
    mean, var = (v - jax.lax.stop_gradient(v) for v in (mean, var))  # 0, but for derivatives
    statistics = _Statistics(centre, rest + mean, rstd * jax.lax.rsqrt(1 + var))
    m2 = shared.m2 + shared.count * _spread(shared, epsilon) * var
    shared = shared._replace(mean=shared.mean + mean, m2=m2)
    return _standardize_and_affine(x, where, scale, bias, statistics), shared
