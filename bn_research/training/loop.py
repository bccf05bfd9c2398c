"""Many steps per dispatch over a data set that lives on the device."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from bn_research.training.checkpoint import Checkpointer
from bn_research.training.metrics import Metrics
from bn_research.training.preemption import Stopped
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, StepMetrics


def epoch_order(key: PRNGKeyArray, epoch: Int[Array, ""], num_examples: int) -> Int[Array, "n"]:
    """The order of the examples in an epoch: a function of key and epoch alone."""
    examples = jnp.arange(num_examples, dtype=jnp.int32)  # with float64 enabled too
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)


def epoch_order_of_groups(
    key: PRNGKeyArray,
    epoch: Int[Array, ""],
    num_examples: int,
    *,
    group_size: int,
    regrouped: bool | Bool[Array, ""] = True,
) -> Int[Array, "used"]:
    """The order of the examples in an epoch, by groups; as many as fill whole groups.

    Args:
      key: of the run.
      epoch: counted from 0.
      num_examples: in the training set.
      group_size: examples that follow each other.
      regrouped: True draws the groups anew in each epoch: `epoch_order`. False draws them once, and
        each epoch orders the groups: an example always meets the same others, and the remainder
        that fills no group is never seen. May be traced.
    """
    groups = num_examples // group_size
    examples = epoch_order(key, jnp.where(regrouped, epoch, 0), num_examples)
    rows = examples[: groups * group_size].reshape(groups, group_size)
    # A key of its own: epochs, which are folded into the run's, are small numbers.
    order = epoch_order(jax.random.fold_in(key, 2**31), epoch, groups)
    return jnp.where(regrouped, rows, rows[order]).ravel()


def batch_at(state: TrainState, examples: Batch, batch_size: int, *, ahead: int = 0) -> Batch:
    """The batch that `run_steps` takes at this state, or one further on in its epoch.

    Args:
      state: before the step.
      examples: the training set.
      batch_size: examples of a step.
      ahead: batches further on in this epoch's order, which after its last begins anew; two that
        are fewer than an epoch apart share no example.
    """
    num_examples = examples.label.shape[0]
    steps_per_epoch = num_examples // batch_size
    epoch, position = jnp.divmod(state.step, steps_per_epoch)
    order = epoch_order(state.key, epoch, num_examples)
    start = (position + ahead) % steps_per_epoch * batch_size
    rows = jax.lax.dynamic_slice_in_dim(order, start, batch_size)
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), examples)


def run_steps(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
    state: TrainState,
    examples: Batch,
    *,
    batch_size: int,
    num_steps: int,
    order_of_epoch: Callable[[PRNGKeyArray, Array, int], Int[Array, "used"]] = epoch_order,
) -> tuple[TrainState, StepMetrics]:
    """Takes num_steps steps as one scanned program; jit it, donating the state.

    Examples are shuffled anew in each epoch, on the device; the remainder that does not fill a
    batch is left for another epoch's order. Batches depend on the state's key and step alone, so
    a run cut into dispatches anywhere, or resumed, sees the same batches.

    Args:
      train_step: (state, batch) -> new state and metrics.
      state: before the first step.
      examples: the training set.
      batch_size: examples of a step.
      num_steps: of the program.
      order_of_epoch: (key of the run, epoch, number of examples) -> those of an epoch in order, at
        least as many as whole batches need.

    Returns:
      The new state, and metrics of each step, shape=(num_steps,).

    Raises:
      ValueError: a batch size that is not between 1 and the number of examples.
    """
    num_examples = examples.label.shape[0]
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size={batch_size} is not allowed: the training set has {num_examples} "
            f"examples, so it must lie between 1 and {num_examples}"
        )
    steps_per_epoch = num_examples // batch_size

    def step(carry, index):
        state, order = carry
        epoch, position = jnp.divmod(state.step, steps_per_epoch)
        order = jax.lax.cond(
            (position == 0) | (index == 0),
            lambda: order_of_epoch(state.key, epoch, num_examples),
            lambda: order,
        )
        rows = jax.lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
        batch = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), examples)
        state, metrics = train_step(state, batch)
        return (state, order), metrics

    shape = jax.eval_shape(lambda: order_of_epoch(state.key, state.step, num_examples))
    order = jnp.zeros(shape.shape, shape.dtype)  # drawn by the first step
    (state, _), metrics = jax.lax.scan(step, (state, order), jnp.arange(num_steps))
    return state, metrics


def padded_batches(examples: Batch, batch_size: int) -> Iterator[Batch]:
    """Every example once, in order; the last batch is padded and masked to the same shape."""
    count = len(examples.label)
    where = jnp.ones(count, bool) if examples.where is None else examples.where
    for start in range(0, count, batch_size):
        rows = slice(start, start + batch_size)
        batch = Batch(examples.image[rows], examples.label[rows], where[rows])
        missing = batch_size - len(batch.label)
        yield jax.tree.map(
            lambda leaf, n=missing: jnp.pad(leaf, [(0, n)] + [(0, 0)] * (leaf.ndim - 1)), batch
        )


def evaluate(
    eval_step: Callable[[TrainState, Batch], Metrics], state: TrainState, batches: Iterable[Batch]
) -> dict[str, float]:
    """Mean loss and accuracy over a whole set, as sum over count.

    Args:
      eval_step: (state, batch) -> Metrics; jit it.
      state: its params and batch_stats are used.
      batches: of the whole set, such as `padded_batches`; masked examples are left out.

    Raises:
      ValueError: no batch, or every example masked.
    """
    total = None
    for batch in batches:
        metrics = eval_step(state, batch)
        total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
    if total is None or not total.count:
        raise ValueError("batches is empty: evaluation needs at least one example")
    return {
        "loss": float(total.loss / total.count),
        "accuracy": float(total.correct / total.count),
        "count": int(total.count),
    }


def streamed(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
    open_stream: Callable[[int], Iterator[Batch]],
    *,
    num_steps: int,
) -> Callable[[TrainState], tuple[TrainState, StepMetrics]]:
    """Steps over batches that stream in from outside, for `train`.

    The position of the stream is the state's step, so a checkpoint that holds the state holds it.

    Args:
      train_step: a compiled step.
      open_stream: step -> the batches of that step and those after it.
      num_steps: steps of one call, dispatched without waiting for each other's results.

    Returns:
      state -> new state, and metrics of the call, shape=(1,): mean loss and accuracy of its steps,
      number of steps that diverged; what was observed is that of each step, shape=(num_steps, ...).
    """
    batches: Iterator[Batch] | None = None

    def advance(state: TrainState) -> tuple[TrainState, StepMetrics]:
        nonlocal batches
        if batches is None:
            batches = open_stream(int(state.step))
        steps = []
        for _ in range(num_steps):
            state, metrics = train_step(state, next(batches))
            steps.append(metrics)
        loss, accuracy, diverged, observed = jax.tree.map(lambda *values: np.stack(values), *steps)
        return state, StepMetrics(
            np.mean(loss, keepdims=True),
            np.mean(accuracy, keepdims=True),
            np.sum(diverged)[None],
            observed,
        )

    return advance


def every(seconds: float) -> Callable[[], bool]:
    """A `save_when` that says yes once in so many seconds, first when they have gone by."""
    last = time.monotonic()

    def is_due() -> bool:
        nonlocal last
        now = time.monotonic()
        due = now - last >= seconds
        last = now if due else last
        return due

    return is_due


class History(NamedTuple):
    """What a training run leaves besides its state."""

    loss: np.ndarray  # float32: losses that each dispatch reported, of batches before their update
    diverged: int  # number of steps that were not finite and so not taken
    observed: Any = ()  # of a sweep: what was observed, leaves [dispatches, ...]


def train(
    advance: Callable[[TrainState], tuple[TrainState, StepMetrics]],
    create_state: Callable[[], TrainState],
    *,
    name: str,
    num_steps: int,
    steps_per_dispatch: int,
    losses_per_dispatch: int | None = None,
    saver: Checkpointer | None = None,
    save_when: Callable[[], bool] = lambda: True,
    stop_when: Callable[[np.ndarray], bool] = lambda loss: False,
    on_metrics: Callable[[int, StepMetrics], None] = lambda steps, metrics: None,
    on_dispatch: Callable[[TrainState, int], None] = lambda state, steps: None,
    preempted: Callable[[int], bool] = lambda step: False,
) -> tuple[TrainState, History]:
    """Trains for num_steps steps, or until stopped; goes on from a checkpoint of the same name.

    The bits of the result depend neither on when it was saved nor on where it was interrupted.
    A step that is not finite is not taken (see `make_train_step`) and is counted; the run goes on,
    and ends with the dispatch in which that happens again.

    Args:
      advance: takes steps_per_dispatch steps.
      create_state: the state before the first step.
      name: of this run, written into its checkpoints.
      num_steps: a multiple of steps_per_dispatch.
      steps_per_dispatch: steps that advance takes.
      losses_per_dispatch: losses that advance reports; None is one for each step.
      saver: keeps checkpoints; None keeps none.
      save_when: asked after each dispatch whether to save.
      stop_when: asked after each dispatch, with the losses so far, whether to stop early.
      on_metrics: given the number of steps before each dispatch and its metrics, before the state
        is saved; steps that a run takes again after it was interrupted are given again.
      on_dispatch: given the state and the number of steps after each dispatch, before the state is
        saved, and first of any restored.
      preempted: asked after each dispatch, with the steps so far, whether to save and leave.

    Raises:
      ValueError: num_steps is not a positive multiple of steps_per_dispatch.
      Stopped: preempted; the state is saved.
    """
    if num_steps < 1 or num_steps % steps_per_dispatch:
        raise ValueError(
            f"num_steps={num_steps} is not allowed: it must be a positive multiple of "
            f"steps_per_dispatch={steps_per_dispatch}"
        )
    per_dispatch = steps_per_dispatch if losses_per_dispatch is None else losses_per_dispatch
    # A fixed shape, so that a checkpoint of any step has the same structure.
    loss = np.full(num_steps // steps_per_dispatch * per_dispatch, np.nan, np.float32)
    diverged, steps, state = 0, 0, create_state()
    newest = saver.newest() if saver is not None else None
    number = newest[0] if newest is not None else 0
    if saver is not None and newest is not None and newest[1]["name"] == name:
        saved = saver.restore(number, {"state": state, "loss": loss})
        state, loss = saved["state"], np.array(saved["loss"])
        steps, diverged = newest[1]["steps"], newest[1]["diverged"]
        on_dispatch(state, steps)

    def losses() -> np.ndarray:
        return loss[: steps // steps_per_dispatch * per_dispatch]

    while steps < num_steps and diverged < 2 and not (steps and stop_when(losses())):
        state, metrics = advance(state)
        steps += steps_per_dispatch
        losses()[-per_dispatch:] = metrics.loss
        diverged += int(np.sum(metrics.diverged))
        on_metrics(steps - steps_per_dispatch, metrics)
        on_dispatch(state, steps_per_dispatch)
        leave = preempted(steps)
        if saver is not None and (leave or save_when()):
            number += 1
            note = {"name": name, "steps": steps, "diverged": diverged}
            saver.save(number, {"state": state, "loss": loss}, note, wait=leave)
        if leave:
            raise Stopped(steps)
    if saver is not None:
        saver.wait()
    return state, History(losses(), diverged)
