"""The scale of a network's signal, layer by layer, without underflow."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def log10_rms(x: Float[Array, "..."]) -> Float[Array, ""]:
    """log₁₀ of the root mean square of all elements, log₁₀ √⟨x²⟩.

    The elements are divided by the largest first: squares of 1e-20 would underflow in float32.
    An array of zeros gives −∞; NaN or ∞ in x gives NaN or ∞.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(x))
    safe = jnp.where(largest > 0, largest, 1)
    relative = jnp.mean(jnp.square(x / safe))
    return jnp.where(
        largest > 0,
        jnp.log10(safe) + 0.5 * jnp.log10(jnp.where(largest > 0, relative, 1)),
        -jnp.inf,
    )
