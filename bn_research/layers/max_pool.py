"""Max-pooling whose gradient XLA on a CPU runs nearly as fast as the pooling itself.

JAX derives the gradient of a windowed maximum as a select-and-scatter, which XLA on a CPU runs one
window at a time. Here the place of each maximum is noted, and every element asks the windows that
it stands in. Places are numbers: values may be computed again where they are compared, with other
roundings, and then none equals the maximum.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.linen import pooling
from jaxtyping import Array, Float


def max_pool(
    x: Float[Array, "batch height width channels"],
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> Float[Array, "batch out_height out_width channels"]:
    """`flax.linen.max_pool`, and its gradient: to the first maximum of a window, row by row.

    Args:
      x: images, channels last.
      window: height and width.
      strides: down and across.
      padding: "SAME", "VALID" or the rows and columns before and after; they are never the largest.
    """
    if jax.default_backend() != "cpu":
        return pooling.max_pool(x, window, strides, padding)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    return _max_pool(x, window, strides, tuple((low, high) for low, high in padding))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, strides, padding):
    return pooling.max_pool(x, window, strides, padding)


@_max_pool.defjvp
def _max_pool_jvp(window, strides, padding, primals, tangents):
    (x,), (tangent,) = primals, tangents
    here = jnp.arange(x.shape[1] * x.shape[2]).reshape(1, *x.shape[1:3], 1)
    found = _place_of_maximum(jax.lax.stop_gradient(x), here, window, strides, padding)
    views = (_views(v, window, strides, padding) for v in (here, tangent))
    change = sum(jnp.where(place == found, value, 0) for place, value in zip(*views, strict=True))
    return _max_pool(x, window, strides, padding), change


def _place_of_maximum(x, here, window, strides, padding):
    """Of equal ones the first."""

    def larger(a, b):
        (value, place), (other, its_place) = a, b
        first = (value > other) | ((value == other) & (place < its_place))
        return jnp.where(first, value, other), jnp.where(first, place, its_place)

    return jax.lax.reduce_window(
        (x, jnp.broadcast_to(here, x.shape)),
        (jnp.asarray(-jnp.inf, x.dtype), jnp.asarray(jnp.iinfo(here.dtype).max)),
        larger,
        (1, *window, 1),
        (1, *strides, 1),
        [(0, 0), *padding, (0, 0)],
    )[1]


def _views(x, window, strides, padding):
    """For every place in a window, row by row: the elements that stand there, one a window."""
    padded = jnp.pad(x, [(0, 0), *padding, (0, 0)], constant_values=-1)
    rows, columns = (
        [slice(i, n - k + i + 1, stride) for i in range(k)]
        for n, k, stride in zip(padded.shape[1:3], window, strides, strict=True)
    )
    return [padded[:, row, column] for row in rows for column in columns]
