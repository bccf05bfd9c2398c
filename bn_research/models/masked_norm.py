"""Norm layers that leave padding out of their statistics."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Bool, Float


def masked_norm(
    norm: Callable[..., Any] | None, where: Bool[Array, "batch"] | None
) -> Callable[..., Any] | None:
    """A factory whose layers are called with the mask of the examples.

    Args:
      norm: a factory of layers whose call takes `mask`, as ours and Flax's do.
      where: False marks padding; None returns norm as it is.
    """
    if norm is None or where is None:
        return norm

    def factory(**options: Any) -> Callable[..., Array]:
        layer = norm(**options)

        def call(x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
            return layer(x, mask=where.reshape(-1, *(1,) * (x.ndim - 1)))

        return call

    return factory
