"""The scale of a network's signal, layer by layer, without underflow."""

import jax.numpy as jnp
from jaxtyping import Array, Float


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
