r"""Normalizing by given statistics, and what every normalization here does with its arguments."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from numpy.typing import DTypeLike

from bn_research.normalization.moments import accumulator_dtype, check_input, promoted


def normalize(
    x: Float[Array, "..."],
    mean: Float[Array, "*features"],
    var: Float[Array, "*features"],
    scale: Float[Array, "*features"] | None = None,
    bias: Float[Array, "*features"] | None = None,
    *,
    feature_axes: int | Sequence[int] = -1,
    epsilon: float | Float[Array, ""] = 1e-5,
    where: Bool[Array, "..."] | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Normalizes by given statistics: y = scale·(x − mean)/√(var + epsilon) + bias.

    This is inference (mean and var are then running or population statistics). Where
    var + epsilon is 0, the result is `bias`.

    Args:
      x: array; integers and bool are taken as float32, complex numbers may have a complex mean.
      mean: means, shape of the feature axes in ascending order.
      var: variances, shape as mean.
      scale: γ, shape as mean; None is 1.
      bias: β, shape as mean; None is 0.
      feature_axes: axes of x that mean and var belong to.
      epsilon: added to the variance; ≥ 0.
      where: mask, broadcastable to x. Masked elements come out as `bias`, as from `batch_norm`, and
        receive no gradient, even when they hold NaN.
      dtype: dtype of the result; None promotes the dtypes of x, scale and bias.

    Raises:
      ValueError: a bad axis, shape, dtype, epsilon or mask.
    """
    x, where, axes = check_input(x, feature_axes, where)
    check_epsilon(epsilon)
    kept = tuple(n if axis in axes else 1 for axis, n in enumerate(x.shape))
    mean, var = per_feature("mean", mean, x, axes), per_feature("var", var, x, axes)
    result = result_dtype(x, scale, bias, dtype)
    scale, bias = scale_and_bias(scale, bias, x, axes)
    wide = promoted(accumulator_dtype(x.dtype), mean.dtype)
    real = promoted(jnp.finfo(wide).dtype, var.dtype)
    wide = promoted(wide, real)
    rstd = rsqrt_or_zero(var.astype(real) + jnp.asarray(epsilon, real)).reshape(kept)
    x_hat = (x.astype(wide) - mean.astype(wide).reshape(kept)) * rstd
    if where is not None:
        x_hat = jnp.where(where, x_hat, 0)
    return scale_and_shift(x_hat, scale, bias, kept, result)


def rsqrt_or_zero(v: Array) -> Array:
    """1/√v, and 0 for v = 0: a feature without spread is not divided by it."""
    return jax.lax.rsqrt(jnp.where(v == 0, jnp.inf, v))


def scale_and_shift(
    x_hat: Array, scale: Array | None, bias: Array | None, kept, dtype: jnp.dtype
) -> Array:
    """scale·x_hat + bias in `dtype`; vectors are reshaped to `kept`, the shape that broadcasts."""
    y = x_hat
    for value, combine in ((scale, jnp.multiply), (bias, jnp.add)):
        if value is not None:
            wide = promoted(y.dtype, value.dtype)
            y = combine(y.astype(wide), value.astype(wide).reshape(kept))
    return y.astype(dtype)


def result_dtype(x, scale, bias, dtype: DTypeLike | None) -> jnp.dtype:
    """The given dtype, or that which x, scale and bias promote to."""
    if dtype is not None:
        return jnp.dtype(dtype)
    found = promoted(*(jnp.asarray(v).dtype for v in (x, scale, bias) if v is not None))
    return found if jnp.issubdtype(found, jnp.inexact) else promoted(found, jnp.float32)


def scale_and_bias(scale, bias, x: Array, axes: tuple[int, ...]) -> Iterator[Array | None]:
    """Scale and bias as arrays of the feature axes' shape, or None; ValueError otherwise."""
    return (
        None if value is None else per_feature(name, value, x, axes)
        for name, value in (("scale", scale), ("bias", bias))
    )


def per_feature(name: str, value, x: Array, axes: tuple[int, ...]) -> Array:
    """An array of the feature axes' shape; ValueError, naming it, when it has another."""
    value = jnp.asarray(value)
    expected = tuple(x.shape[axis] for axis in axes)
    if value.shape != expected:
        raise ValueError(
            f"{name} has shape {value.shape}: it must be {expected}, the feature axes of x, "
            f"whose shape is {x.shape}"
        )
    return value


def check_epsilon(epsilon) -> None:
    """ValueError unless epsilon ≥ 0 (a traced one is not looked at)."""
    if isinstance(epsilon, jax.core.Tracer):
        return
    if not epsilon >= 0:
        raise ValueError(f"epsilon={epsilon!r} is not allowed: it must be ≥ 0")
