"""Training with several moving averages at once, and the statistics measured at its end.

The averages do not influence training, so one run carries those of every momentum. Batches depend
on key and step alone, so a run of fewer steps with the same seed is the longer one's snapshot.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bn_research.lab.compiler import compiler_options
from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
from bn_research.layers.linen import (
    MOMENTS,
    update_from_batch_moments,
)
from bn_research.training.loop import run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import make_train_step
from bn_research.training.sweep import Member, Sweep
from experiments.population_stats.measurements import Measurement, make_model

_OPTIMIZER = "momentum"  # SGD with momentum 0.9


class Setting(NamedTuple):
    """A training run, to the step at which its statistics are measured."""

    batch_size: int
    rate: float
    step: int  # number of steps
    seed: int
    level: str = ""  # of the rate: low or high
    decay: bool = False  # by a cosine to 0 at the last step; else the rate is constant


class Hyper(NamedTuple):
    """What differs between the members of a sweep."""

    rate: Array  # shape=(), dtype=float32
    decay_steps: Array  # shape=(), dtype=float32: of the cosine; 0 keeps the rate constant


def learning_rate(hyper: Hyper, count: Int[Array, ""]) -> Float[Array, ""]:
    """Rate of an update: η, or η·(1 + cos(π·count/decay_steps))/2."""
    progress = jnp.clip(count / jnp.maximum(hyper.decay_steps, 1), 0, 1)
    cosine = (1 + jnp.cos(jnp.pi * progress)) / 2
    return hyper.rate * jnp.where(hyper.decay_steps > 0, cosine, 1.0)


class Trainer:
    """Trains settings on a data set, each once in the life of a workdir.

    Args:
      config: of the run.
      images: the data set.
      runner: of the experiment.
    """

    def __init__(self, config: Any, images: Images, runner: Runner):
        """Places the test set on the devices."""
        self._config, self._images, self._runner = config, images, runner
        self._measurement = Measurement(config, images)

    def tune(self, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Records of runs that are to choose a rate: the training loss at their end alone."""
        return self._records("tune", settings, lambda setting, state: {})

    def train(self, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Records with the distance of each kind of statistics, and the test set by each."""
        return self._records("train", settings, self._measure)

    def _measure(self, setting: Setting, state: TrainState) -> dict[str, Any]:
        return self._measurement(
            state,
            batch_size=setting.batch_size,
            seed=setting.seed,
            late=setting.step == max(self._config.snapshots),
        )

    def _records(self, purpose, settings, measure):
        """Records of one sweep: of one batch size."""
        config, size = self._config, settings[0].batch_size
        named = {f"{purpose} {_name(setting)}": setting for setting in settings}

        def record(member, state, history):
            setting = named[member.name]
            last = history.loss[-max(1, setting.step // 10) :]
            return {
                **setting._asdict(),
                "loss": np.mean(last),
                "diverged": history.diverged,
                **measure(setting, state),
            }

        def hyper(setting):
            decay_steps = setting.step if setting.decay else 0
            return Hyper(np.float32(setting.rate), np.float32(decay_steps))

        self._runner.describe(f"{purpose}, batch {size}")
        shape = (1, *self._images.train.image.shape[1:])
        return self._runner.train(
            _create_program(config.network, len(config.momenta), shape),
            _sweep(config.network, config.momenta, size, config.steps_per_dispatch),
            [Member(name, s.seed, hyper(s), s.step) for name, s in named.items()],
            self._images.train,
            record=record,
        )


class Rates(NamedTuple):
    """Of a batch size, by the rule of `choose_rates`."""

    best: float
    low: float
    high: float


def trains(record: Mapping[str, Any], num_classes: int) -> bool:
    """Whether no step was non-finite and the loss at the end is below half of ln C."""
    loss = record["loss"]
    return not record["diverged"] and loss is not None and loss < math.log(num_classes) / 2


def choose_rates(records: Sequence[Mapping[str, Any]], num_classes: int) -> Rates:
    """Best: of the lowest training loss at the end. Low: a tenth of it. High: the next above it.

    Where the next rate of the grid does not train (see `trains`), or there is none, high is the
    best; where no run is without non-finite steps, the best is the lowest of the grid.

    Args:
      records: of tuning, one for each rate.
      num_classes: C, of the data set.
    """
    grid = sorted(records, key=lambda record: record["rate"])
    sound = [r for r in grid if r["loss"] is not None and not r["diverged"]]
    best = min(sound, key=lambda record: record["loss"])["rate"] if sound else grid[0]["rate"]
    above = [r for r in grid if r["rate"] > best][:1]
    high = above[0]["rate"] if above and trains(above[0], num_classes) else best
    return Rates(best, best / 10, high)


def _name(setting: Setting) -> str:
    schedule = "cosine" if setting.decay else "constant"
    return (
        f"batch={setting.batch_size} {setting.level} rate={setting.rate:g} {schedule} "
        f"step={setting.step} seed={setting.seed}"
    )


@functools.cache
def _create_program(network: str, averages: int, shape: tuple[int, ...]):
    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key, hyper):
        def init(key):
            variables = make_model(network).init(key, jnp.zeros(shape), train=False)
            return {**variables, "batch_stats": (variables["batch_stats"],) * averages}

        return create_train_state(init, _optimizer(hyper), key)

    return create


@functools.cache
def _sweep(network: str, momenta: tuple[float, ...], batch_size: int, num_steps: int) -> Sweep:
    model = make_model(network)

    def apply_fn(variables, image, *, train):
        assert train  # inference takes the statistics that it is to be judged by
        averages = variables["batch_stats"]
        one = {"params": variables["params"], "batch_stats": averages[0]}
        logits, new = model.apply(one, image, train=True, mutable=[MOMENTS])
        return logits, tuple(
            update_from_batch_moments(stats, new[MOMENTS], momentum=momentum)
            for stats, momentum in zip(averages, momenta, strict=True)
        )

    def advance(state, hyper, examples):
        step = make_train_step(apply_fn, _optimizer(hyper))
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=num_steps)

    return Sweep(
        advance,
        steps_per_dispatch=num_steps,
        strategy="devices",
        compiler_options=compiler_options(1),
    )


def _optimizer(hyper: Hyper):
    return create_optimizer(_OPTIMIZER, functools.partial(learning_rate, hyper))
