"""Max-pooling whose gradient XLA on a CPU runs as fast as the pooling itself.

JAX derives the gradient of a windowed maximum as a select-and-scatter, which XLA on a CPU runs one
window at a time. Here the place of each maximum is noted, and every element asks the windows that
it stands in.
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
    y = _max_pool(x, window, strides, padding)
    taken, change = jnp.zeros(y.shape, bool), jnp.zeros_like(y)
    views = (
        _views(array, fill, window, strides, padding)
        for array, fill in ((x, -jnp.inf), (tangent, 0))
    )
    for value, its_change in zip(*views, strict=True):
        first = (value == y) & ~taken
        taken |= first
        change += jnp.where(first, its_change, 0)
    return y, change


def _views(x, fill, window, strides, padding):
    """For every place in a window, row by row: the elements that stand there, one a window."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    padded = jax.lax.pad(x, jnp.asarray(fill, x.dtype), config)
    rows, columns = (
        [slice(i, n - k + i + 1, stride) for i in range(k)]
        for n, k, stride in zip(padded.shape[1:3], window, strides, strict=True)
    )
    return [padded[:, row, column] for row in rows for column in columns]
