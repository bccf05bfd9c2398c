"""Weight initializers by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NAMES = ("uniform", "he", "lecun", "glorot", "orthogonal")


def kernel_initializer(name: str, *, a: float | Float[Array, ""] = 1e-3) -> Callable[..., Array]:
    """Initializer of convolution and dense kernels.

    Args:
      name: "uniform", U(−a, a); "he", "lecun" or "glorot", normal with variance 2/fan_in,
        1/fan_in or 2/(fan_in + fan_out); "orthogonal".
      a: half-width of "uniform"; may be traced, so that one program serves every a.

    Raises:
      ValueError: an unknown name, or a ≤ 0.
    """
    if name == "uniform":
        if not isinstance(a, jax.core.Tracer) and not a > 0:
            raise ValueError(f"a={a!r} is not allowed: U(−a, a) needs a > 0")

        def uniform(key, shape, dtype=jnp.float32, out_sharding=None):
            unit = jax.random.uniform(key, shape, dtype, -1.0, 1.0, out_sharding=out_sharding)
            return (a * unit).astype(dtype)

        return uniform
    schemes: dict[str, Callable[..., Callable[..., Array]]] = {
        "he": jax.nn.initializers.he_normal,
        "lecun": jax.nn.initializers.lecun_normal,
        "glorot": jax.nn.initializers.glorot_normal,
        "orthogonal": jax.nn.initializers.orthogonal,
    }
    if name not in schemes:
        raise ValueError(f"initializer={name!r} is unknown: allowed are {', '.join(NAMES)}")
    return schemes[name]()
