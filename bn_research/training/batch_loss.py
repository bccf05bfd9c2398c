"""The loss of one batch as a function of the parameters, for probes of its surface.

With batch normalization there are two such functions: of training, where the statistics of the
batch move with the parameters and are differentiated through, and of a network whose statistics are
frozen, where batch normalization is a fixed affine map. At the parameters where they were frozen
both have the same value, and different gradients and Hessians. Gradient descent on the batch is
governed by the first.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from bn_research.training.metrics import cross_entropy_metrics
from bn_research.training.step import ApplyFn, Batch

LossFn = Callable[[Any], Float[Array, ""]]


def batch_loss(apply_fn: ApplyFn, batch: Batch, stats: Any = None) -> LossFn:
    """Params → mean cross-entropy of a batch, normalized by its own statistics or those given."""

    def loss_fn(params: Any) -> Float[Array, ""]:
        variables = {"params": params, "batch_stats": stats or {}}
        logits, _ = apply_fn(variables, batch.image, train=stats is None)
        return cross_entropy_metrics(logits, batch.label).loss / len(batch.label)

    return loss_fn


def frozen_loss(apply_fn: ApplyFn, params: Any, batch: Batch) -> LossFn:
    """The same with the statistics that the batch has at `params`, whatever it is given.

    The running statistics that `apply_fn` gives must be those of the batch alone, as those of a
    `BatchNorm` with momentum 0 are.
    """
    _, stats = apply_fn({"params": params, "batch_stats": {}}, batch.image, train=True)
    return batch_loss(apply_fn, batch, stats)
