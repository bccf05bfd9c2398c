"""The train and eval step: pure, per replica, for any apply function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from bn_research.training.metrics import Metrics, cross_entropy_metrics
from bn_research.training.state import TrainState

# (variables, images, train) -> (logits, new batch_stats)
ApplyFn = Callable[..., tuple[Array, Any]]


class Batch(NamedTuple):
    """Examples of one step."""

    image: Float[Array, "batch height width channels"]
    label: Int[Array, "batch"]
    where: Bool[Array, "batch"] | None = None  # False marks padding


class StepMetrics(NamedTuple):
    """What a train step reports."""

    loss: Array  # shape=(): mean cross-entropy of the batch before the update, in nats
    accuracy: Array  # shape=(): of the batch, training mode, before the update
    diverged: Array  # shape=(), bool: loss or gradient was not finite, the update was not made


def make_train_step(
    apply_fn: ApplyFn, optimizer: optax.GradientTransformation, *, axis_name: str | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """A step of gradient descent on the mean cross-entropy.

    A step whose loss or gradient is not finite is reported as diverged and leaves params,
    opt_state and batch_stats as they were; it counts as a step.

    Args:
      apply_fn: (variables, images, train=bool) -> (logits, batch_stats).
      optimizer: an optax transformation.
      axis_name: axis of devices over which loss and gradient are averaged; None on one device.
        Map the step with `pmap`, or with `shard_map` and `check_vma=False`: with that check on,
        gradients of replicated params arrive summed over the devices already.
    """

    def mean(tree):
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, batch_stats = apply_fn(variables, batch.image, train=True)
            sums = cross_entropy_metrics(logits, batch.label, batch.where)
            # Devices may hold unequal numbers of valid examples; each example weighs the same.
            count = jnp.maximum(mean(sums.count), 1)
            return sums.loss / count, (batch_stats, sums.correct / count)

        (loss, (batch_stats, accuracy)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        loss, accuracy, grads, batch_stats = mean((loss, accuracy, grads, batch_stats))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss) & _all_finite(grads) & _all_finite(params)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            batch_stats=keep(batch_stats, state.batch_stats),
            opt_state=keep(opt_state, state.opt_state),
            key=state.key,
        )
        return new_state, StepMetrics(loss, accuracy, ~finite)

    return train_step


def make_eval_step(apply_fn: ApplyFn) -> Callable[[TrainState, Batch], Metrics]:
    """Metrics of a batch by the state's batch_stats, as sums over its unmasked examples."""

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits, _ = apply_fn(variables, batch.image, train=False)
        return cross_entropy_metrics(logits, batch.label, batch.where)

    return eval_step


def _all_finite(tree: Any) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
