r"""Count, mean and sum of squared deviations of a batch: accurate, masked, mergeable, synced.

The variance is never computed as E[x²] − E[x]²: with a mean of 1e4 standard deviations float32
loses it entirely. A rough mean c is found first, from differences to an element of each
feature, so that a constant feature gives c exactly. Then d = x − c and d² are summed, from which

    mean = c + Σd/n        m2 = Σd² − (Σd)²/n

For c a sixteenth of the elements is enough: the mean of any fraction f of a set lies within
σ·√((1 − f)/f) of the mean of the whole, however the set is arranged, so the correction takes at
most 15 parts of 16 and four bits of the sum, never the digits that a large mean would. With a
mask, whose elements may be anywhere, c is the mean of all.

Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance:
analysis and recommendations", The American Statistician 37 (1983) 242-247.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from numpy.typing import DTypeLike

# Squares of float32 span 1e-38 to 1e38. Scaling deviations by a power of two (exact) before they
# are squared centres that window on the range promised for features, standard deviations of
# 1e-18 to 1e15: without it the smaller deviations of a feature at 1e-18 are flushed to zero.
_SQUARE_SCALE = 8.0
_SHARE = 16  # one part in so many gives the rough mean


class Moments(NamedTuple):
    """Moments of the elements reduced, one entry per feature; merge with `merge_moments`.

    The leaves are float32, and float64 for float64 input, since a count of float32 would leave a
    merge of float64 moments seven digits. For complex input the mean is complex and m2 is
    Σ|x − mean|².
    """

    count: Array  # type: ignore[assignment]  # shape=(*features): number of unmasked elements
    mean: Array  # shape=(*features)
    m2: Array  # shape=(*features), real: sum of squared deviations from the mean


class ShiftedMoments(NamedTuple):
    """Moments about a reference value; axes are kept, so every leaf broadcasts against x.

    `shift` + `mean` is the mean. Keeping the two apart saves the digits that their sum rounds
    away: at a mean of 1e4 standard deviations float32 resolves the mean to 1e-3 of one only.
    """

    count: Array  # type: ignore[assignment]  # number of unmasked elements
    shift: Array  # reference value, near the mean; carries no gradient
    mean: Array  # mean of x − shift
    m2: Array  # sum of squared deviations from the mean


def batch_moments(
    x: Float[Array, "..."],
    *,
    feature_axes: int | Sequence[int] = -1,
    where: Bool[Array, "..."] | None = None,
) -> Moments:
    """Moments of x over every axis that is not a feature axis.

    Args:
      x: array; reduced in float32, or in float64 when x is float64. Integers and bool are taken as
        float32.
      feature_axes: axes that keep their own statistics; results have the shape of these axes in
        ascending order.
      where: mask, broadcastable to x. Elements where it is False are left out before any
        arithmetic: a NaN there reaches neither values nor gradients.

    Returns:
      Moments, differentiable in x. A feature without elements has count, mean and m2 of zero.

    Raises:
      ValueError: x is no array of numbers, an axis is out of range or repeated, or where does not
        broadcast to x.
    """
    x, where, axes = check_input(x, feature_axes, where)
    reduction_axes = tuple(axis for axis in range(x.ndim) if axis not in axes)
    return squeeze_moments(shifted_moments(x, reduction_axes, where), reduction_axes)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets of elements (Chan, Golub & LeVeque 1983, eq. 1.5).

    n = n_a + n_b,  mean = mean_a + δ·n_b/n,  m2 = m2_a + m2_b + δ²·n_a·n_b/n,
    δ = mean_b − mean_a.

    Args:
      a: of one set; features in which it has no elements (count 0) take b's moments, bit by bit.
      b: of the other, with leaves of the same shapes.
    """
    a, b = (v._replace(count=v.count.astype(v.m2.dtype)) for v in (a, b))
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    # A side without elements has no mean to be far from.
    delta = jnp.where((a.count > 0) & (b.count > 0), b.mean - a.mean, 0)
    roots = [jnp.sqrt(a.count * share) * part for part in _parts(delta)]
    mean = jnp.where(a.count > 0, a.mean + delta * share.astype(delta.dtype), b.mean)
    m2 = _add_squares(jnp.stack([a.m2, b.m2]), jnp.stack(roots))
    return Moments(count=count, mean=mean, m2=m2)


def sync_moments(
    moments: Moments,
    axis_name: str,
    *,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Moments of the elements of every device along a named axis, by one collective.

    Args:
      moments: this device's moments; counts may differ between devices, and be zero on some.
      axis_name: the axis of `pmap`, `shard_map` or `vmap`.
      axis_index_groups: merge within these groups of indices only; a partition of the axis.

    Raises:
      ValueError: axis_index_groups is not a partition of the axis.
    """
    zero = jnp.zeros_like(moments.mean)
    shifted = sync_shifted_moments(
        ShiftedMoments(moments.count, zero, moments.mean, moments.m2),
        axis_name,
        axis_index_groups,
    )
    return Moments(shifted.count, shifted.shift + shifted.mean, shifted.m2)


def variance(moments: Moments, *, unbiased: bool = False) -> Float[Array, "*features"]:
    """Variance σ² = m2/n, or m2/(n − 1) when unbiased; 0 where there are too few elements.

    The biased one normalizes a batch and is what Flax, Haiku and Keras average; PyTorch averages
    the unbiased one, as algorithm 2 of Ioffe & Szegedy (2015) does.

    Args:
      moments: of the elements.
      unbiased: divide by n − 1.

    Returns:
      Of the shape and dtype of moments.m2.
    """
    return moments.m2 / jnp.maximum(moments.count.astype(moments.m2.dtype) - int(unbiased), 1)


def shifted_moments(
    x: Float[Array, "..."], axes: tuple[int, ...], where: Bool[Array, "..."] | None
) -> ShiftedMoments:
    """The moments of x over `axes`, which are kept."""
    x = x.astype(accumulator_dtype(x.dtype))
    if jnp.iscomplexobj(x):
        real, imag = (shifted_moments(part, axes, where) for part in _parts(x))
        shift, mean = (jax.lax.complex(*pair) for pair in zip(real[1:3], imag[1:3], strict=True))
        return ShiftedMoments(real.count, shift, mean, real.m2 + imag.m2)
    if where is None:
        shift = _rough_mean(x, axes)
        count = jnp.full_like(shift, math.prod(x.shape[axis] for axis in axes))
    else:
        x = jnp.where(where, x, 0)
        where = jnp.broadcast_to(where, x.shape)
        count = jnp.sum(where, axes, dtype=x.dtype, keepdims=True)
        largest = jnp.max(x, axes, keepdims=True, where=where, initial=-jnp.inf)
        shift = _mean_from(largest, x, axes, where, count)
    shift = jax.lax.stop_gradient(shift)

    # Two ways to write a deviation, so that a compiler which fuses what is used once into the sum
    # that uses it (XLA's on a CPU) does not see one array with two uses and write it to memory.
    deviation = x - shift
    scaled = _SQUARE_SCALE * x - _SQUARE_SCALE * shift
    if where is not None:
        deviation, scaled = jnp.where(where, deviation, 0), jnp.where(where, scaled, 0)
    divisor = jnp.maximum(count, 1)
    mean = jnp.sum(deviation, axes, keepdims=True) / divisor
    m2 = jnp.sum(jnp.square(scaled), axes, keepdims=True)
    m2 = (m2 - jnp.square(_SQUARE_SCALE * jnp.sqrt(divisor) * mean)) / _SQUARE_SCALE**2
    return ShiftedMoments(count, shift, mean, jnp.maximum(m2, 0))


def _rough_mean(x: Array, axes: tuple[int, ...]) -> Array:
    """Mean of a sixteenth of x or a little more, or of all of a small x; as `_mean_from`.

    The part is not cut along an axis that is known to be sharded, and preferably not along the
    first, which usually is when nothing is known: it would have to be sent around. Nor along one
    whose length is a symbol (`jax.export`), which cannot be compared.
    """
    spec = jax.typeof(x).sharding.spec
    known = [axis for axis in axes if isinstance(x.shape[axis], int) and spec[axis] is None]
    free = [axis for axis in known if x.shape[axis] >= _SHARE]
    if free:
        cut = next((axis for axis in free if axis > 0), free[0])
        x = jax.lax.slice_in_dim(x, 0, -(-x.shape[cut] // _SHARE), axis=cut)
        sample = jax.lax.slice_in_dim(x, 0, 1, axis=cut)
    else:
        sample = x
    largest = jnp.max(sample, axes, keepdims=True, initial=-jnp.inf)
    count = math.prod(x.shape[axis] for axis in axes)
    return _mean_from(largest, x, axes, None, jnp.asarray(count, x.dtype))


def _mean_from(
    largest: Array, x: Array, axes: tuple[int, ...], where: Array | None, count: Array
) -> Array:
    """Mean, from differences to an element, so that constant features are exact; 0 of nothing."""
    largest = jnp.where(count > 0, largest, 0)
    below = jnp.sum(x - largest, axes, keepdims=True, where=where)
    return largest + below / jnp.maximum(count, 1)


def sync_shifted_moments(
    moments: ShiftedMoments,
    axis_name: str,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> ShiftedMoments:
    """Merges shifted moments over devices; one collective, whatever the number of groups.

    Every device's numbers of each feature are laid side by side by a sum over rows that are zero
    but for one: the result is known to be the same on every device, which an all-gather's is not.
    """
    index = jax.lax.axis_index(axis_name)
    size = jax.lax.axis_size(axis_name)
    means = zip(_parts(moments.shift), _parts(moments.mean), strict=True)
    packed = jnp.stack([moments.count, moments.m2, *(leaf for pair in means for leaf in pair)])
    table = jax.lax.psum(_one_row(packed, index, size), axis_name)
    if axis_index_groups is not None:
        group_of = _group_of_index(axis_index_groups, size)
        member = (group_of == group_of[index]).reshape((-1,) + (1,) * packed.ndim)
        table = jnp.where(member, table, 0)
    count, m2, *columns = (table[:, i] for i in range(len(packed)))
    total = jnp.sum(count, 0, keepdims=True)
    share = count / jnp.maximum(total, 1)
    references, merged, roots = [], [], []
    for shift, mean in zip(columns[::2], columns[1::2], strict=True):  # of each part of a number
        # The reference of the merged moments: any value near the mean does, if all devices agree.
        # From differences, since the shares add up to 1 only nearly: equal means stay what they
        # are.
        centre = jax.lax.stop_gradient(shift + mean)
        largest = jnp.max(jnp.where(count > 0, centre, -jnp.inf), 0, keepdims=True)
        largest = jnp.where(total > 0, largest, 0)
        below = jnp.where(count > 0, centre - largest, 0)
        reference = largest + jnp.sum(share * below, 0, keepdims=True)
        deviation = (shift - reference) + mean
        merged_mean = jnp.sum(share * deviation, 0, keepdims=True)
        roots.append(jnp.where(count > 0, jnp.sqrt(count) * (deviation - merged_mean), 0))
        references.append(reference[0])
        merged.append(merged_mean[0])
    merged_m2 = _add_squares(m2, jnp.concatenate(roots))
    return ShiftedMoments(total[0], _whole(references), _whole(merged), merged_m2)


def group_psum(
    x: Array, axis_name: str, axis_index_groups: Sequence[Sequence[int]] | None
) -> Array:
    """Sum over the devices of this device's group, by one collective; usable under `vmap` too."""
    if axis_index_groups is None:
        return jax.lax.psum(x, axis_name)
    group_of = _group_of_index(axis_index_groups, jax.lax.axis_size(axis_name))
    group = group_of[jax.lax.axis_index(axis_name)]
    table = jax.lax.psum(_one_row(x, group, len(axis_index_groups)), axis_name)
    return jnp.take(table, group, axis=0)


def squeeze_moments(shifted: ShiftedMoments, axes: tuple[int, ...]) -> Moments:
    """Drops the kept axes and adds the shift to the mean."""
    return Moments(
        count=jnp.squeeze(shifted.count, axes),
        mean=jnp.squeeze(shifted.shift + shifted.mean, axes),
        m2=jnp.squeeze(shifted.m2, axes),
    )


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for integers, half precision and float32, float64 for float64; as complex as x."""
    return promoted(dtype, jnp.float32)


def promoted(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype that all can be cast to, also where JAX is set to cast nothing by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(jnp.dtype(dtype) for dtype in dtypes))


def canonical_axes(feature_axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Feature axes as ascending non-negative integers; ValueError when there is a bad one."""
    given = (feature_axes,) if isinstance(feature_axes, int) else tuple(feature_axes)
    if not given:
        raise ValueError("feature_axes=() is empty: name at least one axis")
    for axis in given:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"feature_axes={feature_axes!r} is out of range for an array of rank {ndim}: "
                f"allowed are {-ndim} to {ndim - 1}"
            )
    axes = tuple(sorted(axis % ndim for axis in given))
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"feature_axes={feature_axes!r} names an axis twice in an array of rank {ndim}: "
            "each axis may be named once"
        )
    return axes


def check_input(
    x: Array, feature_axes: int | Sequence[int], where: Array | None, *, real: bool = False
) -> tuple[Array, Array | None, tuple[int, ...]]:
    """X and where as arrays of one rank, and the canonical feature axes.

    Raises:
      ValueError: one of them is bad, or x is complex where it has to be real.
    """
    x = jnp.asarray(x)
    if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
        raise ValueError(f"x has dtype {x.dtype}: allowed are numbers")
    if real and jnp.iscomplexobj(x):
        raise ValueError(f"x has dtype {x.dtype}: allowed are real numbers; batch_norm takes these")
    axes = canonical_axes(feature_axes, x.ndim)
    if where is not None:
        where = jnp.asarray(where)
        try:
            fits = jnp.broadcast_shapes(where.shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"where has shape {where.shape}: it must broadcast to the shape of x, {x.shape}"
            )
        where = where.astype(bool).reshape((1,) * (x.ndim - where.ndim) + where.shape)
    return x, where, axes


def _parts(x: Array) -> list[Array]:
    """The real numbers that x consists of: itself, or its real and its imaginary part."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _whole(parts: Sequence[Array]) -> Array:
    """The inverse of `_parts`."""
    return parts[0] if len(parts) == 1 else jax.lax.complex(*parts)


def _add_squares(m2: Array, roots: Array) -> Array:
    """Σ m2 + Σ roots² along axis 0, for values whose squares leave the range of float32.

    Both are scaled by a power of two near the largest, exactly, and the sum is scaled back.
    """
    largest = [jnp.max(v, 0, keepdims=True) for v in (m2, jnp.abs(roots))]
    exponent = jnp.frexp(jax.lax.stop_gradient(jnp.maximum(jnp.sqrt(largest[0]), largest[1])))[1]
    unit = jnp.ldexp(jnp.ones_like(largest[1]), exponent)
    total = jnp.sum(m2 / unit / unit, 0) + jnp.sum(jnp.square(roots / unit), 0)
    return total * unit[0] * unit[0]


def _one_row(x: Array, index: Array, size: int) -> Array:
    """Zeros of shape (size, *x.shape) with x at `index`; a NaN in x stays in its row."""
    index = jnp.asarray(index)
    row = jnp.arange(size, dtype=index.dtype).reshape((-1,) + (1,) * x.ndim) == index
    return jnp.where(row, x[None], 0)


def _group_of_index(axis_index_groups: Sequence[Sequence[int]], size: int) -> Array:
    """Group number of each index of the axis, shape=(size,)."""
    members = [index for group in axis_index_groups for index in group]
    if sorted(members) != list(range(size)):
        raise ValueError(
            f"axis_index_groups={axis_index_groups!r} is not a partition of an axis of size "
            f"{size}: name each index from 0 to {size - 1} once"
        )
    group_of = [0] * size
    for number, group in enumerate(axis_index_groups):
        for index in group:
            group_of[index] = number
    return jnp.asarray(group_of)
