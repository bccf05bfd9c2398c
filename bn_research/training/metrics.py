"""Metrics as sums over examples, so that a set of any size is averaged exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


class Metrics(NamedTuple):
    """Sums over examples; add them leaf by leaf, then divide by the count."""

    loss: Array  # shape=(), float32: sum of cross-entropies, in nats
    correct: Array  # shape=(), float32: number of examples classified rightly
    count: Array  # type: ignore[assignment]  # shape=(), float32: number of examples


def cross_entropy_metrics(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, "batch"],
    where: Bool[Array, "batch"] | None = None,
) -> Metrics:
    """Metrics of a batch; examples where the mask is False count as if they were not there.

    What stands in their place reaches neither values nor gradients, NaN included.
    """
    if where is not None:  # a gradient of zero times NaN would be NaN; the values stay as they are
        logits = jnp.where(where[:, None], logits, jax.lax.stop_gradient(logits))
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = jnp.argmax(logits, axis=-1) == labels
    if where is None:
        where = jnp.ones(labels.shape, bool)
    return Metrics(
        loss=jnp.sum(jnp.where(where, loss, 0)),
        correct=jnp.sum(where & correct, dtype=jnp.float32),
        count=jnp.sum(where, dtype=jnp.float32),
    )
