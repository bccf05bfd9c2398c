"""The deep networks that `experiments.signal_propagation` trains, plain and residual."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from bn_research.claims.judging import Record, choose
from bn_research.lab import settings
from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
from bn_research.lab.settings import Programs, Setting, Training
from bn_research.models.scanned_mlp import forward, initialize
from bn_research.normalization import BatchStats, population_stats, update_batch_stats
from bn_research.training.compiler import compiler_options
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
    networks: Sequence[Deep],
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
    return settings.train(
        runner,
        [Training(setting, seed, config.num_steps) for setting in networks for seed in seeds],
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


@settings.per_structure
def _programs(setting: Deep, sizes: tuple[int, ...], batch_size: int, num_steps: int) -> Programs:
    inputs, width, classes = sizes

    def init(key: Array, setting: Deep) -> dict[str, Any]:
        return initialize(key, inputs, width, setting.depth, classes)

    def advance(state: TrainState, setting: Deep, examples: Batch):
        step = make_train_step(_apply_fn(setting.residual), _optimizer(setting))
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=num_steps)

    sweep = settings.sweep(advance, steps_per_dispatch=num_steps)
    return Programs(settings.creator(init, _optimizer), sweep)


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
