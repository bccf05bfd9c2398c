"""The train and eval step: pure, per replica, for any apply function."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from bn_research.normalization.moments import accumulator_dtype
from bn_research.training.metrics import Metrics, cross_entropy_metrics
from bn_research.training.state import TrainState

# (variables, images, train[, keys][, where]) -> (logits, new batch_stats)
ApplyFn = Callable[..., tuple[Array, Any]]

AccumulatedStatistics = Literal["microbatch", "batch"]


class Batch(NamedTuple):
    """Examples of one step; with accumulation each leaf has a first axis of microbatches."""

    image: Float[Array, "batch height width channels"]
    label: Int[Array, "batch"]
    where: Bool[Array, "batch"] | None = None  # False marks padding


def apply_fn_of(module: Any) -> ApplyFn:
    """That of a Flax module which is called with `train`, and with `keys` where it draws."""

    def apply_fn(variables: Any, image: Array, *, train: bool, **options: Any):
        if not train:
            return module.apply(variables, image, train=False, **options), variables["batch_stats"]
        logits, new = module.apply(variables, image, train=True, mutable=["batch_stats"], **options)
        return logits, new.get("batch_stats", {})

    return apply_fn


class StepMetrics(NamedTuple):
    """What a train step reports."""

    loss: Array  # shape=(): mean cross-entropy of the batch before the update, in nats
    accuracy: Array  # shape=(): of the batch, training mode, before the update
    diverged: Array  # shape=(), bool: loss or gradient was not finite, the update was not made
    observed: Any = ()  # what `observe` of make_train_step returned


def make_train_step(
    apply_fn: ApplyFn,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    accumulated_statistics: AccumulatedStatistics | None = None,
    stochastic: bool = False,
    observe: Callable[[Any, Any, Any], Any] = lambda params, grads, new_params: (),
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """A step of gradient descent on the mean cross-entropy.

    A step whose loss or gradient is not finite is reported as diverged and leaves params,
    opt_state and batch_stats as they were; it counts as a step. Gradient, loss and batch_stats
    are averaged over devices by one collective.

    Every example weighs the same, wherever it lies: loss, gradient and the change of batch_stats
    are means over the examples of all microbatches and devices. Sums run in float32 or wider, and
    cross between devices so: the gradient of half-precision parameters takes twice their bytes, but
    its error does not grow with the number of parts. What no part changes in batch_stats keeps its
    bits; integers move by the mean change, rounded.

    Padding, where the batch's mask is False, reaches nothing, even as NaN: apply_fn sees zeros in
    its place and is given the mask, for whatever looks at more than one example. A part that is
    padding alone weighs nothing. A batch of padding alone has a loss and a gradient of 0.

    With accumulation the batch comes as microbatches, leaves [microbatches, examples, ...], and
    the update is that of the whole batch. What BN then normalizes by has to be said:

      - "microbatch": each microbatch by its own statistics, one after the other, in the memory of
        one. The same numbers as a whole batch whose layers have the microbatch as `group_size`;
        the running statistics move once.
      - "batch": all by the statistics of the whole batch. A layer's statistics need every example
        to have passed the layers below, so the microbatches go together; to save memory the
        backward pass recomputes all but the convolutions and dense products. For layers
        without `group_size`.

    Args:
      apply_fn: (variables, images, train=bool) -> (logits, batch_stats). For batches with a mask it
        takes `where` too, shape=(examples,), which BN layers want as their `mask`, with axes of
        length 1 behind; the networks of `bn_research.models` take it as `where`.
      optimizer: an optax transformation.
      axis_name: axis of devices over which loss and gradient are averaged; None on one device.
        Mapped by `bn_research.training.parallel`.
      accumulated_statistics: None, a batch without microbatches; "microbatch" or "batch".
      stochastic: give apply_fn `keys` in training too, a PRNG key for each example: a function of
        the run's key, the step and the example's place in the batch of all devices.
      observe: (params, gradient of the whole batch, params after the step) -> arrays to report with
        the step; on several devices the same on each.

    Raises:
      ValueError: other accumulated statistics; in the step, a batch with a mask where apply_fn
        takes none.
    """
    if accumulated_statistics not in (None, "microbatch", "batch"):
        raise ValueError(
            f"accumulated_statistics={accumulated_statistics!r} is not allowed: None for a batch "
            "without microbatches, 'microbatch' or 'batch'"
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        if batch.where is not None:
            if not _takes_mask(apply_fn):
                raise ValueError(
                    "batch.where is given, but apply_fn takes no argument `where`, so that padding "
                    "would move batch statistics: let it take one and give it to the BN layers as "
                    "`mask`, or leave padding out of training"
                )
            # A gradient of zero times NaN would be NaN.
            kept = batch.where.reshape(
                batch.where.shape + (1,) * (batch.image.ndim - batch.where.ndim)
            )
            batch = batch._replace(image=jnp.where(kept, batch.image, 0))
        microbatches = batch.label.shape[0] if accumulated_statistics == "microbatch" else 1
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        in_parts = microbatches * devices > 1
        dtypes = {}  # of the new batch_stats: a layer may widen those of half precision

        def sums_and_gradient(batch, keys):
            """Of these examples: sums, the gradient of their loss, and batch_stats.

            Of a part of the batch, batch_stats is their change times the number of examples.
            """

            def loss_fn(params):
                variables = {"params": params, "batch_stats": state.batch_stats}
                options = {"keys": keys} if stochastic else {}
                if batch.where is not None:
                    options["where"] = batch.where
                logits, batch_stats = apply_fn(variables, batch.image, train=True, **options)
                sums = cross_entropy_metrics(logits, batch.label, batch.where)
                return sums.loss, (sums, batch_stats)

            if accumulated_statistics == "batch":
                loss_fn = jax.checkpoint(loss_fn, policy=_is_product)
            grads, (sums, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
            grads = jax.tree.map(lambda leaf: leaf.astype(accumulator_dtype(leaf.dtype)), grads)
            dtypes["batch_stats"] = jax.tree.map(lambda leaf: leaf.dtype, batch_stats)
            if in_parts:
                batch_stats = jax.tree.map(
                    lambda new, old: sums.count * _change(new, old), batch_stats, state.batch_stats
                )
                if batch.where is not None:  # layers may make NaN of no example at all
                    grads, batch_stats = jax.tree.map(
                        lambda leaf: jnp.where(sums.count > 0, leaf, 0), (grads, batch_stats)
                    )
            return sums, grads, batch_stats

        keys = _example_keys(state, batch.label.shape, axis_name) if stochastic else None
        if accumulated_statistics == "microbatch":
            first = jax.tree.map(lambda leaf: leaf[0], (batch, keys))
            zero = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                jax.eval_shape(sums_and_gradient, *first),
            )

            def accumulate(total, microbatch):
                return jax.tree.map(jnp.add, total, sums_and_gradient(*microbatch)), None

            (sums, grads, batch_stats), _ = jax.lax.scan(accumulate, zero, (batch, keys))
        else:
            if accumulated_statistics == "batch":
                # Examples first, the axis that is cut over devices, so that it stays cut.
                batch, keys = jax.tree.map(
                    lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), (batch, keys)
                )
            sums, grads, batch_stats = sums_and_gradient(batch, keys)

        if axis_name is not None:
            sums, grads, batch_stats = jax.lax.psum((sums, grads, batch_stats), axis_name)
        # Parts may hold unequal numbers of valid examples; each example weighs the same.
        examples = jnp.maximum(sums.count, 1)
        loss, accuracy = sums.loss / examples, sums.correct / examples
        grads = jax.tree.map(
            lambda leaf, param: (leaf / examples).astype(param.dtype), grads, state.params
        )
        if in_parts:
            batch_stats = jax.tree.map(
                lambda old, change, dtype: _moved(old, change / examples, dtype),
                *(state.batch_stats, batch_stats, dtypes["batch_stats"]),
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss) & _all_finite(grads) & _all_finite(params)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o.astype(n.dtype)), new, old)

        params = keep(params, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=keep(batch_stats, state.batch_stats),
            opt_state=keep(opt_state, state.opt_state),
            key=state.key,
        )
        observed = observe(state.params, grads, params)
        return new_state, StepMetrics(loss, accuracy, ~finite, observed)

    return train_step


def make_eval_step(
    apply_fn: ApplyFn, *, axis_name: str | None = None
) -> Callable[[TrainState, Batch], Metrics]:
    """Metrics of a batch by the state's batch_stats, as sums over its unmasked examples.

    Args:
      apply_fn: (variables, images, train=bool) -> (logits, batch_stats); given the batch's mask
        where it takes `where`.
      axis_name: axis of devices over which the sums run; None on one device.
    """

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        masked = batch.where is not None and _takes_mask(apply_fn)
        options = {"where": batch.where} if masked else {}
        logits, _ = apply_fn(variables, batch.image, train=False, **options)
        metrics = cross_entropy_metrics(logits, batch.label, batch.where)
        return metrics if axis_name is None else jax.lax.psum(metrics, axis_name)

    return eval_step


def _takes_mask(apply_fn: ApplyFn) -> bool:
    return "where" in inspect.signature(apply_fn).parameters


def _change(new: Array, old: Array) -> Array:
    """The change from old, in float32 or wider; new itself where old is not finite."""
    if not jnp.issubdtype(old.dtype, jnp.inexact):
        return (new.astype(int) - old.astype(int)).astype(jnp.float32)
    wide = accumulator_dtype(old.dtype)
    return new.astype(wide) - jnp.where(jnp.isfinite(old), old, 0).astype(wide)


def _moved(old: Array, change: Array, dtype: Any) -> Array:
    """Undoes `_change`, in the dtype of the new; where nothing changes, the bits of old."""
    if not jnp.issubdtype(old.dtype, jnp.inexact):
        return (old.astype(int) + jnp.round(change).astype(int)).astype(dtype)
    moved = jnp.where(jnp.isfinite(old), old, 0).astype(change.dtype) + change
    return jnp.where(change == 0, old.astype(dtype), moved.astype(dtype))


def _example_keys(state: TrainState, shape: tuple[int, ...], axis_name: str | None) -> Array:
    """A key for each example of this device, by its place in the batch of all devices."""
    *microbatches, examples = shape
    index: int | Array = 0
    size = 1
    if axis_name is not None:
        index, size = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    place = index * examples + jnp.arange(examples)
    if microbatches:
        place = jnp.arange(microbatches[0])[:, None] * (size * examples) + place
    # Epochs, which are folded into the same key for the order of the examples, stay below this.
    key = jax.random.fold_in(jax.random.fold_in(state.key, 2**32 - 1), state.step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, place.ravel()).reshape(shape)


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    """What the backward pass keeps rather than recomputes."""
    # The statistics of `batch_norm` are a custom_jvp_call by then: few numbers, one collective.
    return primitive.name in ("conv2d", "conv_general_dilated", "dot_general", "custom_jvp_call")


def _all_finite(tree: Any) -> Array:
    """Whether every number is finite, one flag for each array.

    A product counts the flags. XLA turns their `all` into a chain of `and`s, which its compiler for
    CPUs repeats beside each parameter that waits for it.
    """
    flags = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
    flags = flags.astype(jnp.float32)
    return flags @ flags == len(flags)
