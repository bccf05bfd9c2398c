r"""Folding inference batch normalization into the linear map before or behind it.

With given statistics the transform is affine, feature by feature: BN(x) = s·x + t with
s = scale/√(var + ε) and t = offset − s·mean, so a linear map next to it takes it in:

    BN(W·x + b) = (s·W)·x + (s·(b − mean) + offset)        `fold_after`
    W·BN(x) + b = (W·s)·x + (b + W·t)                      `fold_before`

A nonlinearity between the two forbids it, and so does training: the batch's own statistics are
not known in advance.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bn_research.normalization.batch_stats import BatchStats
from bn_research.normalization.moments import accumulator_dtype, promoted
from bn_research.normalization.normalize import normalize


def fold_after(
    kernel: Float[Array, "*window inputs outputs"],
    bias: Float[Array, "outputs"] | None,
    stats: BatchStats,
    scale: Float[Array, "outputs"] | None = None,
    offset: Float[Array, "outputs"] | None = None,
    *,
    epsilon: float | Float[Array, ""] = 1e-5,
    transpose_kernel: bool = False,
) -> tuple[Float[Array, "*window inputs outputs"], Float[Array, "outputs"]]:
    """Kernel and bias of the linear map that equals `normalize` after a linear map.

    Exact up to rounding for dense layers and convolutions, transposed ones too, of any stride,
    dilation, padding and number of feature groups. Where var + epsilon is 0, the result is
    `offset`, as in `normalize`.

    Args:
      kernel: in Flax's layout, of `Dense`, `Conv` or `ConvTranspose`.
      bias: of the linear map; None is 0.
      stats: running or population statistics of the linear map's result, shape=(outputs,).
      scale: γ; None is 1.
      offset: β, the `bias` of `normalize`; None is 0.
      epsilon: added to the variance; ≥ 0.
      transpose_kernel: of the `ConvTranspose`. True is a kernel of shape (*window, outputs,
        inputs), which cannot be told from the other where the two are equal.

    Returns:
      The new kernel and bias, computed in float32 or wider. The kernel keeps its dtype and the
      bias its own, which is the kernel's where there was none.

    Raises:
      ValueError: a bad shape, dtype or epsilon.
    """
    kernel = _check_kernel(kernel)
    axis = -2 if transpose_kernel else -1
    outputs = kernel.shape[axis]
    bias = _check_bias(bias, kernel, outputs)
    stats, scale, offset = _check_transform(stats, scale, offset, outputs, "outputs", kernel)
    zero = jnp.zeros_like(stats.mean)
    new_kernel = normalize(
        kernel,
        zero,
        stats.var,
        scale,
        feature_axes=axis,
        epsilon=epsilon,
        dtype=kernel.dtype,
    )
    return new_kernel, normalize(bias, *stats, scale, offset, epsilon=epsilon, dtype=bias.dtype)


def fold_before(
    kernel: Float[Array, "*window inputs outputs"],
    bias: Float[Array, "outputs"] | None,
    stats: BatchStats,
    scale: Float[Array, "features"] | None = None,
    offset: Float[Array, "features"] | None = None,
    *,
    epsilon: float | Float[Array, ""] = 1e-5,
    feature_group_count: int = 1,
) -> tuple[Float[Array, "*window inputs outputs"], Float[Array, "outputs"]]:
    """Kernel and bias of the linear map that equals a linear map after `normalize`.

    Exact up to rounding for dense layers and for convolutions WITHOUT zero padding ("VALID").
    With zero padding ("SAME", "CAUSAL") the result is WRONG at the borders: there the original
    sees 0 for BN(x), but the folded map sees 0 for x, which is BN(0). No bias makes up for that,
    since it is the same everywhere. Transposed convolutions are not covered either.

    The original subtracts the mean before it multiplies, the folded map after. So float32 errs
    by about 4e-7·|mean|/√var of the largest output (measured: 64 inputs, ratios up to 1e4).

    Args:
      kernel: in Flax's layout, of `Dense` or `Conv`.
      bias: of the linear map; None is 0.
      stats: running or population statistics of the input, shape=(features,), where features is
        inputs·feature_group_count.
      scale: γ; None is 1.
      offset: β, the `bias` of `normalize`; None is 0.
      epsilon: added to the variance; ≥ 0.
      feature_group_count: of the convolution.

    Returns:
      The new kernel and bias, with dtypes as in `fold_after`.

    Raises:
      ValueError: a bad shape, dtype, epsilon or feature_group_count.
    """
    kernel = _check_kernel(kernel)
    *window, inputs, outputs = kernel.shape
    groups = feature_group_count
    if not isinstance(groups, int) or groups < 1 or outputs % groups:
        raise ValueError(
            f"feature_group_count={groups!r} must be a divisor of the {outputs} outputs of the "
            f"kernel, whose shape is {kernel.shape}"
        )
    bias = _check_bias(bias, kernel, outputs)
    stats, scale, offset = _check_transform(
        stats, scale, offset, inputs * groups, "inputs·groups", kernel
    )
    zero = jnp.zeros_like(stats.mean)
    wide = promoted(accumulator_dtype(kernel.dtype), stats.var.dtype)
    at_zero = normalize(zero, *stats, scale, offset, epsilon=epsilon, dtype=wide)

    def by_group(vector):
        return None if vector is None else vector.reshape(groups, inputs).T

    # The inputs of a group are neighbours, and so are its outputs.
    grouped = kernel.reshape(*window, inputs, groups, outputs // groups)
    new_kernel = normalize(
        grouped,
        by_group(zero),
        by_group(stats.var),
        by_group(scale),
        feature_axes=(-3, -2),
        epsilon=epsilon,
        dtype=kernel.dtype,
    )
    # A sum, not a matrix product, which accelerators round to fewer digits.
    factor = jnp.expand_dims(by_group(at_zero), (*range(len(window)), -1))
    terms = grouped.astype(wide) * factor
    constant = jnp.sum(terms, tuple(range(terms.ndim - 2))).reshape(outputs)
    return new_kernel.reshape(kernel.shape), (bias.astype(wide) + constant).astype(bias.dtype)


def check_folding(
    original_fn: Callable[[Array], Array],
    folded_fn: Callable[[Array], Array],
    x: Float[Array, "..."],
    *,
    tolerance: float = 1e-5,
) -> float:
    """Compares a folded function with its original on a batch of samples; not under `jit`.

    Args:
      original_fn: x -> result, the linear map and `normalize` with given statistics.
      folded_fn: x -> result, the folded linear map.
      x: samples; for a convolution larger than its window, so that borders are seen.
      tolerance: largest relative error allowed. 1e-5 suits float32; see `fold_before`.

    Returns:
      The largest relative error, max|folded − original| / max|original|.

    Raises:
      ValueError: the error is above the tolerance or not a number, or the shapes differ.
    """
    original = np.asarray(original_fn(x), np.float64)
    folded = np.asarray(folded_fn(x), np.float64)
    if folded.shape != original.shape:
        raise ValueError(
            f"folded_fn gives shape {folded.shape}: it must be that of original_fn, "
            f"{original.shape}"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.max(np.abs(folded - original), initial=0.0)
        # No difference is no error, also from an original that is 0 everywhere.
        error = 0.0 if difference == 0 else float(difference / np.max(np.abs(original)))
    if not error <= tolerance:
        raise ValueError(
            f"folded_fn differs from original_fn by a relative error of {error:.3g}: "
            f"allowed is tolerance={tolerance!r}"
        )
    return error


def _check_kernel(kernel) -> Array:
    kernel = jnp.asarray(kernel)
    if kernel.ndim < 2:
        raise ValueError(
            f"kernel has shape {kernel.shape}: it must be (..., inputs, outputs), Flax's layout"
        )
    return _check_floating("kernel", kernel)


def _check_bias(bias, kernel: Array, outputs: int) -> Array:
    if bias is None:
        return jnp.zeros(outputs, kernel.dtype)
    return _check_vector("bias", bias, outputs, "outputs", kernel)


def _check_transform(stats, scale, offset, size: int, of: str, kernel: Array):
    """Statistics, scale and offset as arrays; ValueError unless each has `size` entries."""
    mean, var = (
        _check_vector(f"stats.{name}", value, size, of, kernel)
        for name, value in zip(BatchStats._fields, stats, strict=True)
    )
    scale, offset = (
        None if value is None else _check_vector(name, value, size, of, kernel)
        for name, value in (("scale", scale), ("offset", offset))
    )
    return BatchStats(mean, var), scale, offset


def _check_vector(name: str, value, size: int, of: str, kernel: Array) -> Array:
    value = jnp.asarray(value)
    if value.shape != (size,):
        raise ValueError(
            f"{name} has shape {value.shape}: it must be {(size,)}, the {of} of the kernel, "
            f"whose shape is {kernel.shape}"
        )
    return _check_floating(name, value)


def _check_floating(name: str, value: Array) -> Array:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {value.dtype}: allowed are floating-point types")
    return value
