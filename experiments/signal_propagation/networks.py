"""The deep BN networks that `experiments.signal_propagation` trains: plain and residual.

Both arms have the same parameters: a dense layer to the width, `depth` times BN, ReLU and a dense
layer, and BN, ReLU and a dense head. The residual arm adds the input of each of the `depth` to its
output (pre-activation, He et al., 2016), the plain arm does not. The layers are scanned, so that a
network of 80 compiles as fast as one of 5.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bn_research.claims.judging import Record, choose
from bn_research.lab.compiler import compiler_options
from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
from bn_research.lab.settings import (
    Programs,
    Setting,
    Training,
    creator,
    per_structure,
    sweep,
    train,
)
from bn_research.models.initializers import kernel_initializer
from bn_research.normalization import (
    BatchStats,
    batch_norm,
    normalize,
    population_stats,
    update_batch_stats,
)
from bn_research.training.loop import History, evaluate, padded_batches, run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, make_eval_step, make_train_step
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

    A layer's input times skip is added to its output: 1 is residual, 0 is plain. It is traced, so
    that one program serves both arms. Training normalizes by the batch, else `batch_stats` do.
    """
    params, stats = variables["params"], variables["batch_stats"]

    def normalized(x, scale, bias, stats):
        if train:
            y, moments = batch_norm(x, scale, bias)
        else:
            y, moments = normalize(x, *stats, scale, bias), None
        return jax.nn.relu(y), moments

    def block(x, layer):
        kernel, norm = layer
        y, moments = normalized(x, *norm)
        return skip * x + y @ kernel, moments

    below, top = (
        jax.tree.map(operator.itemgetter(part), (params.scale, params.bias, stats))
        for part in (slice(-1), -1)
    )
    x = image.reshape(len(image), -1) @ params.first
    x, moments = jax.lax.scan(block, x, (params.hidden, below))
    y, last = normalized(x, *top)
    moments = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), moments, last)
    return y @ params.head, moments


class Deep(Setting, traced="residual rate"):
    """A network and the rate that it is trained at."""

    residual: bool
    rate: float
    depth: int


def train_by_depth(config: Config, images: Images, runner: Runner) -> Sequence[Record]:
    """Records of plain and residual networks; each arm and depth has the rate that suits it."""
    arms, trained = (False, True), []
    for depth in sorted(config.train_depths):
        grid = [Deep(arm, rate, depth) for arm in arms for rate in config.learning_rates]
        tuned = train_all("tune", grid, [TUNING_SEED], config, images, runner)
        tuned.sort(key=lambda record: record["rate"])  # where all are lost, the lowest is taken
        best = [choose([r for r in tuned if r["residual"] == arm], "loss") for arm in arms]
        chosen = [Deep(record["residual"], record["rate"], depth) for record in best]
        trained += train_all("train", chosen, range(config.seeds), config, images, runner)
    return trained


def train_all(
    purpose: Literal["tune", "train"],
    settings: Sequence[Deep],
    seeds: Sequence[int],
    config: Config,
    images: Images,
    runner: Runner,
) -> list[dict[str, Any]]:
    """Records of every setting with every seed; what only tunes does not see the test set."""

    def record(training: Training, state: TrainState, history: History) -> dict[str, Any]:
        setting = training.setting
        return {
            "residual": setting.residual,
            "rate": setting.rate,
            "seed": training.seed,
            "depth": setting.depth,
            "loss": np.mean(history.loss[-max(1, config.num_steps // 10) :]),
            "diverged": history.diverged,
            **(_scores(setting, state, config, images) if purpose == "train" else {}),
        }

    def name(training: Training) -> str:
        residual, rate, depth = vars(training.setting).values()
        arm = "residual" if residual else "plain"
        return f"{purpose} {arm} depth={depth} rate={rate:g} seed={training.seed}"

    sizes = int(np.prod(images.train.image.shape[1:])), config.train_width, images.num_classes
    return train(
        runner,
        [Training(setting, seed, config.num_steps) for setting in settings for seed in seeds],
        lambda setting: _programs(setting, sizes, config.batch_size, config.steps_per_dispatch),
        images.train,
        record=record,
        name=name,
        describe=lambda training: f"{purpose}, depth {training.setting.depth}",
    )


def _scores(setting: Deep, state: TrainState, config: Config, images: Images) -> dict[str, float]:
    """Of the whole test set, by population statistics (algorithm 2 of Ioffe & Szegedy, 2015)."""
    skip, (train, test) = float(setting.residual), images[:2]
    count = min(_POPULATION_BATCHES, len(train.label) // config.batch_size)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    stats = population_stats(
        lambda batch: _moments(variables, batch, skip),
        jnp.split(train.image[: count * config.batch_size], count),
    )
    found = evaluate(
        lambda state, batch: _eval_step(state, batch, skip),
        state._replace(batch_stats=stats, opt_state=()),
        padded_batches(test, min(_EVAL_BATCH, len(test.label))),
    )
    return {"accuracy": found["accuracy"], "test_loss": found["loss"]}


@per_structure
def _programs(
    setting: Deep, sizes: tuple[int, int, int], batch_size: int, num_steps: int
) -> Programs:
    inputs, width, classes = sizes

    def init(key: Array, setting: Deep) -> dict[str, Any]:
        return initialize(key, inputs, width, setting.depth, classes)

    def advance(state: TrainState, setting: Deep, examples: Batch):
        step = make_train_step(_apply_fn(setting.residual), _optimizer(setting))
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=num_steps)

    return Programs(creator(init, _optimizer), sweep(advance, steps_per_dispatch=num_steps))


def _optimizer(setting: Deep) -> optax.GradientTransformation:
    return create_optimizer("momentum", setting.rate, momentum=_MOMENTUM)


def _apply_fn(skip: float | Array) -> Callable[..., tuple[Array, BatchStats]]:
    def apply_fn(variables, image, *, train):
        logits, moments = forward(variables, image, skip, train=train)
        stats = variables["batch_stats"]
        if train:
            update = functools.partial(update_batch_stats, momentum=_STATS_MOMENTUM)
            stats = jax.vmap(update)(stats, moments)
        return logits, stats

    return apply_fn


@functools.partial(jax.jit, compiler_options=compiler_options(0))
def _moments(variables, image, skip):
    return forward(variables, image, skip, train=True)[1]


@functools.partial(jax.jit, compiler_options=compiler_options(0))
def _eval_step(state, batch, skip):
    return make_eval_step(_apply_fn(skip))(state, batch)
