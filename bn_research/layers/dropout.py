"""Dropout whose mask of an example does not depend on the rest of the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def dropout(
    x: Float[Array, "batch ..."], keys: Key[Array, "batch"], *, rate: float | Float[Array, ""]
) -> Float[Array, "batch ..."]:
    """Dropout (Srivastava et al., 2014), inverted: y = x·mask/(1 − rate), mask ~ B(1, 1 − rate).

    The mask of example i is a function of keys[i] and of the example's shape alone, so a batch gets
    the same masks on one device as in parts on many. Evaluation needs no dropout and no scaling.

    Args:
      x: activations; a dropped one, be it NaN, gives 0 and no gradient.
      keys: typed PRNG keys, one for each example.
      rate: probability that an element is dropped, in [0, 1); 0 gives x as it is. A traced one is
        not checked, so that one program serves many rates.

    Raises:
      ValueError: an integer x, a rate outside [0, 1), keys that are not typed or not one for each
        example, or keys of a generator that under `vmap` draws by the first key alone (rbg).
    """
    check_rate("rate", rate)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}: allowed are floating-point dtypes")
    if not jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(f"keys has dtype {keys.dtype}: allowed are typed keys, of jax.random.key")
    if keys.shape != x.shape[:1]:
        raise ValueError(f"keys has shape {keys.shape}: one for each example is {x.shape[:1]}")
    if "rbg" in str(jax.random.key_impl(keys)):
        raise ValueError(
            f"keys are of the generator {jax.random.key_impl(keys)}, which draws a batch by its "
            'first key: use keys of jax.random.key(seed, impl="threefry2x32")'
        )
    if never_drops(rate):
        return x
    kept = jnp.float32(1 - rate)  # drawn in float32 with 64-bit types enabled too: the same masks
    mask = jax.vmap(lambda key: jax.random.bernoulli(key, kept, x.shape[1:]))(keys)
    return jnp.where(mask, x / jnp.asarray(1 - rate, x.dtype), 0)


def never_drops(rate: float | Float[Array, ""]) -> bool:
    """Whether the rate is known to be 0; a traced one is not known."""
    return not isinstance(rate, jax.core.Tracer) and bool(rate == 0)


def check_rate(name: str, rate: float | Float[Array, ""]) -> None:
    """ValueError unless rate is in [0, 1); a traced one is not looked at."""
    if not isinstance(rate, jax.core.Tracer) and not 0 <= rate < 1:
        raise ValueError(f"{name}={rate!r} is not allowed: it must be in [0, 1)")
