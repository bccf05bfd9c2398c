"""The deep BN networks that `experiments.signal_propagation` trains: plain and residual.

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

from bn_research.claims.judging import Record, choose
from bn_research.lab.compiler import compiler_options
from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
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
from bn_research.training.sweep import Member, Sweep
from experiments.signal_propagation import Config

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


class Hyper(NamedTuple):
    """What differs between the members of a sweep."""

    rate: Array
    skip: Array  # see `forward`


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


class Setting(NamedTuple):
    """A training run, of networks of one depth."""

    residual: bool
    rate: float
    seed: int


def train_by_depth(config: Config, images: Images, runner: Runner) -> Sequence[Record]:
    """Records of plain and residual networks; each arm and depth has the rate that suits it."""
    trainer, arms, trained = Trainer(config, images, runner), (False, True), []
    for depth in sorted(config.train_depths):
        tuned = trainer.tune(
            depth,
            [Setting(arm, rate, TUNING_SEED) for arm in arms for rate in config.learning_rates],
        )
        tuned.sort(key=lambda record: record["rate"])  # where all are lost, the lowest is taken
        rates = [choose([r for r in tuned if r["residual"] == arm], "loss")["rate"] for arm in arms]
        settings = [Setting(arm, rates[arm], s) for arm in arms for s in range(config.seeds)]
        trained += trainer.train(depth, settings)
    return trained


class Trainer(NamedTuple):
    """What the trainings of a run share."""

    config: Config
    images: Images
    runner: Runner

    def tune(self, depth: int, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Records of runs that are to choose a rate: no test set."""
        return self._records("tune", depth, settings, lambda state, skip: {})

    def train(self, depth: int, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Records with the loss and accuracy on the whole test set, by population statistics.

        That is algorithm 2 of Ioffe & Szegedy (2015).
        """
        return self._records("train", depth, settings, self._scores)

    def _records(self, purpose, depth, settings, score):
        config, train, members, named = self.config, self.images.train, [], {}
        for setting in settings:
            arm = "residual" if setting.residual else "plain"
            name = f"{purpose} {arm} depth={depth} rate={setting.rate:g} seed={setting.seed}"
            hyper = Hyper(np.float32(setting.rate), np.float32(setting.residual))
            members.append(Member(name, setting.seed, hyper, config.num_steps))
            named[name] = setting

        def record(member, state, history):
            return {
                **named[member.name]._asdict(),
                "depth": depth,
                "loss": np.mean(history.loss[-max(1, config.num_steps // 10) :]),
                "diverged": history.diverged,
                **score(state, float(member.hyper.skip)),
            }

        self.runner.describe(f"{purpose}, depth {depth}")
        inputs = int(np.prod(train.image.shape[1:]))
        return self.runner.train(
            _create_program(inputs, config.train_width, depth, self.images.num_classes),
            _sweep(config.batch_size, config.steps_per_dispatch),
            members,
            train,
            record=record,
        )

    def _scores(self, state: TrainState, skip: float) -> dict[str, float]:
        train, test, size = self.images.train, self.images.test, self.config.batch_size
        count = min(_POPULATION_BATCHES, len(train.label) // size)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        stats = population_stats(
            lambda batch: _moments(variables, batch, skip),
            jnp.split(train.image[: count * size], count),
        )
        scores = evaluate(
            lambda state, batch: _eval_step(state, batch, skip),
            state._replace(batch_stats=stats, opt_state=()),
            padded_batches(test, min(_EVAL_BATCH, len(test.label))),
        )
        return {"accuracy": scores["accuracy"], "test_loss": scores["loss"]}


@functools.cache
def _create_program(inputs: int, width: int, depth: int, classes: int):
    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key, hyper):
        return create_train_state(
            lambda key: initialize(key, inputs, width, depth, classes), _optimizer(hyper.rate), key
        )

    return create


@functools.cache
def _sweep(batch_size: int, num_steps: int) -> Sweep:
    def advance(state, hyper, examples):
        step = make_train_step(_apply_fn(hyper.skip), _optimizer(hyper.rate))
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=num_steps)

    # Fixed, so that it need not be measured: its numbers are those of single runs everywhere.
    return Sweep(
        advance,
        steps_per_dispatch=num_steps,
        strategy="devices",
        compiler_options=compiler_options(1),
    )


@functools.partial(jax.jit, compiler_options=compiler_options(0))
def _moments(variables, image, skip):
    return forward(variables, image, skip, train=True)[1]


@functools.partial(jax.jit, compiler_options=compiler_options(0))
def _eval_step(state, batch, skip):
    return make_eval_step(_apply_fn(skip))(state, batch)


def _optimizer(rate: Array):
    return create_optimizer("momentum", rate, momentum=_MOMENTUM)
