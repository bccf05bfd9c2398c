"""Training of deep BN networks for `experiments.signal_propagation`: plain and residual.

Both arms have the same parameters: a dense layer to the width, `depth` times BN, ReLU and a dense
layer, and BN, ReLU and a dense head. The residual arm adds the input of each of the `depth` to its
output (pre-activation, He et al., 2016), the plain arm does not. The layers are scanned, so that a
network of 80 compiles as fast as one of 5.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bn_research.models.initializers import kernel_initializer
from bn_research.normalization import (
    BatchStats,
    Moments,
    batch_norm,
    normalize,
    population_stats,
    update_batch_stats,
)
from bn_research.training.loop import evaluate, padded_batches, run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import make_eval_step, make_train_step
from experiments.arms import Images, compiler_options

ARMS = ("plain", "residual")
TUNING_SEED = 10_000  # apart from every seed of a run
_EVAL_BATCH = 256
_POPULATION_BATCHES = 16
_MOMENTUM = 0.9  # of SGD
_STATS_MOMENTUM = 0.9  # of the running statistics, which only training sees


class Params(NamedTuple):
    """Parameters of a network; the first axis of BN's counts the layers, one more than hidden."""

    first: Array  # shape=(inputs, width)
    hidden: Array  # shape=(depth, width, width)
    scale: Array  # shape=(depth + 1, width)
    bias: Array  # shape=(depth + 1, width)
    head: Array  # shape=(width, classes)


class _Layer(NamedTuple):
    """What a scanned layer is given."""

    kernel: Array
    scale: Array
    bias: Array
    stats: BatchStats


def initialize(key: Array, inputs: int, width: int, depth: int, classes: int) -> dict[str, Any]:
    """Variables before training: He-normal kernels, the head LeCun-normal, scale 1 and bias 0."""
    keys = jax.random.split(key, 3)
    he, lecun = kernel_initializer("he"), kernel_initializer("lecun")
    hidden = jax.vmap(lambda key: he(key, (width, width)))(jax.random.split(keys[1], depth))
    ones, zeros = jnp.ones((depth + 1, width)), jnp.zeros((depth + 1, width))
    params = Params(
        lecun(keys[0], (inputs, width)), hidden, ones, zeros, lecun(keys[2], (width, classes))
    )
    return {"params": params, "batch_stats": BatchStats(zeros, ones)}


def forward(
    variables: dict[str, Any],
    image: Float[Array, "batch ..."],
    skip: float | Float[Array, ""],
    *,
    train: bool,
) -> tuple[Float[Array, "batch classes"], Any]:
    """Logits, and the moments of every BN layer ([depth + 1, ...]) where `train`, else None.

    Args:
      variables: as `initialize` gives them.
      image: inputs, flattened here.
      skip: times the input of a layer, added to its output: 1 is residual, 0 is plain. Traced, so
        that one program serves both arms.
      train: normalize by the batch, else by `batch_stats`.
    """
    params, stats = variables["params"], variables["batch_stats"]

    def normalized(x, layer: _Layer):
        if train:
            y, moments = batch_norm(x, layer.scale, layer.bias)
        else:
            y, moments = normalize(x, *layer.stats, layer.scale, layer.bias), None
        return jax.nn.relu(y), moments

    def block(x, layer: _Layer):
        y, moments = normalized(x, layer)
        return skip * x + y @ layer.kernel, moments

    layers = jax.tree.map(lambda leaf: leaf[:-1], (params.scale, params.bias, stats))
    x = image.reshape(len(image), -1) @ params.first
    x, below = jax.lax.scan(block, x, _Layer(params.hidden, *layers))
    top = jax.tree.map(lambda leaf: leaf[-1], (params.scale, params.bias, stats))
    y, last = normalized(x, _Layer(params.head, *top))
    moments = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), below, last)
    return y @ params.head, moments


def _apply_fn(skip: Array):
    def apply_fn(variables, image, *, train):
        logits, moments = forward(variables, image, skip, train=train)
        stats = variables["batch_stats"]
        return logits, _updated(stats, moments) if train else stats

    return apply_fn


def _updated(stats: BatchStats, moments: Moments) -> BatchStats:
    update = functools.partial(update_batch_stats, momentum=_STATS_MOMENTUM)
    return jax.vmap(update)(stats, moments)


def measure(
    images: Images,
    *,
    residual: bool,
    width: int,
    depth: int,
    rate: float,
    seed: int,
    batch_size: int,
    num_steps: int,
    test: bool,
) -> dict[str, Any]:
    """Record of a training run by momentum SGD.

    Args:
      images: the data set.
      residual: the arm.
      width: units of a layer.
      depth: dense layers between two BN layers.
      rate: learning rate.
      seed: of weights and order of the examples.
      batch_size: examples a step.
      num_steps: steps.
      test: evaluate on the test set, by population statistics (algorithm 2 of Ioffe & Szegedy,
        2015); a run that is to choose a rate does not.
    """
    inputs = int(np.prod(images.train.image.shape[1:]))
    create = _create_program(inputs, width, depth, images.num_classes)
    advance = _advance_program(batch_size, num_steps)
    state = create(jax.random.key(seed), rate)
    state, metrics = advance(state, images.train, rate, float(residual))
    loss, accuracy = (np.asarray(value, np.float64) for value in (metrics.loss, metrics.accuracy))
    tail = max(1, num_steps // 10)
    record = {
        "residual": residual,
        "depth": depth,
        "rate": rate,
        "seed": seed,
        "loss": np.mean(loss[-tail:]),
        "train_accuracy": np.mean(accuracy[-tail:]),
        "diverged": int(np.sum(metrics.diverged)),
    }
    return {**record, **(_scores(images, state, float(residual), batch_size) if test else {})}


def _scores(images: Images, state: TrainState, skip: float, batch_size: int) -> dict[str, float]:
    count = min(_POPULATION_BATCHES, len(images.train.label) // batch_size)
    batches = jnp.split(images.train.image[: count * batch_size], count)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    stats = population_stats(lambda batch: _moments(variables, batch, skip), batches)
    scores = evaluate(
        lambda state, batch: _eval_step(state, batch, skip),
        state._replace(batch_stats=stats, opt_state=()),
        padded_batches(images.test, min(_EVAL_BATCH, len(images.test.label))),
    )
    return {"accuracy": scores["accuracy"], "test_loss": scores["loss"]}


def choose_rate(records: Sequence[dict[str, Any]]) -> float:
    """The rate whose run has the lowest loss at the end; of runs that diverged, the lowest rate.

    Args:
      records: of one arm and depth, one for each rate.
    """
    sound = [r for r in records if r["loss"] is not None and not r["diverged"]]
    if not sound:
        return min(record["rate"] for record in records)
    return min(sound, key=lambda record: record["loss"])["rate"]


@functools.cache
def _create_program(inputs: int, width: int, depth: int, classes: int):
    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key, rate):
        return create_train_state(
            lambda key: initialize(key, inputs, width, depth, classes), _optimizer(rate), key
        )

    return create


@functools.cache
def _advance_program(batch_size: int, num_steps: int):
    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options(1))
    def advance(state, examples, rate, skip):
        step = make_train_step(_apply_fn(skip), _optimizer(rate))
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=num_steps)

    return advance


@functools.partial(jax.jit, compiler_options=compiler_options(0))
def _moments(variables, image, skip):
    return forward(variables, image, skip, train=True)[1]


@functools.partial(jax.jit, compiler_options=compiler_options(0))
def _eval_step(state, batch, skip):
    return make_eval_step(_apply_fn(skip))(state, batch)


def _optimizer(rate: Array):
    return create_optimizer("momentum", rate, momentum=_MOMENTUM)
