"""Training with several moving averages at once, and the statistics measured at its end.

The averages do not influence training, so one run carries those of every momentum. Batches depend
on key and step alone, so a run of fewer steps with the same seed is the longer one's snapshot.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from bn_research.claims.judging import choose
from bn_research.lab import settings
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, check_network, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.settings import Programs, Setting, Training, per_structure
from bn_research.lab.workdir import Ledger
from bn_research.layers.linen import MOMENTS, update_from_batch_moments
from bn_research.training.cores import use_cpu_cores
from bn_research.training.lanes import CreateFn
from bn_research.training.loop import History, run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, make_train_step
from experiments.population_stats import Config
from experiments.population_stats.statistics import Measurement, make_model

LEVELS = ("low", "high")  # of the rate


class Run(Setting, traced="rate step decay", unseen="seed level"):
    """A training, to the step at which its statistics are measured."""

    batch_size: int
    rate: float
    step: int  # number of steps
    seed: int = 0
    level: str = ""  # of the rate: low or high
    decay: bool = False  # by a cosine to 0 at the last step; else the rate is constant

    @property
    def name(self) -> str:
        """In the ledger."""
        rate = f"{self.level} rate={self.rate:g} {'cosine' if self.decay else 'constant'}"
        return f"batch={self.batch_size} {rate} step={self.step} seed={self.seed}"


class Rates(NamedTuple):
    """Of a batch size, by the rule of `choose_rates`."""

    best: float
    low: float
    high: float


class Records(NamedTuple):
    """What the run measured."""

    runs: list[dict[str, Any]]  # all trainings but those of tuning
    rates: dict[int, Rates]  # of each batch size
    num_classes: int


def prepare(config: Config) -> Images:
    """The images; each core becomes a device, for the sweeps."""
    use_cpu_cores()
    images = images_of(config, scale="standardized", limit=config.examples)
    check_network(config.network, images, config.dataset)
    at_most(config, len(images.train.label), "the training set", "batch_sizes")
    return images


def measure(config: Config, images: Images, path: Path) -> Records:
    """Tunes the rates of each batch size and trains with them, as far as the workdir lacks it."""
    steps = len(LEVELS) * sum(config.snapshots) + max(config.snapshots)
    tuning = config.tuning_steps * len(config.learning_rates)
    total = len(config.batch_sizes) * (config.seeds * steps + tuning)
    ledger, found, rates = Ledger(path / "metrics.jsonl"), [], {}
    with Runner(path, ledger, total_steps=total, strategy="devices") as runner:
        given = config, images, runner, Measurement(config, images)
        for size in sorted(config.batch_sizes):
            trial = Run(size, 0.0, config.tuning_steps, config.seeds)
            trials = [trial.replace(rate=rate) for rate in config.learning_rates]
            rates[size] = choose_rates(trained("tune", trials, *given), images.num_classes)
            found += trained("train", trainings(config, size, rates[size]), *given)
    return Records(found, rates, images.num_classes)


def trainings(config: Config, batch_size: int, rates: Rates) -> list[Run]:
    """Trainings of a batch size, the longest first: the control with decay, and the grid."""
    last, seeds = max(config.snapshots), range(config.seeds)
    constant = itertools.product(sorted(config.snapshots, reverse=True), LEVELS, seeds)
    return [Run(batch_size, rates.high, last, seed, "high", decay=True) for seed in seeds] + [
        Run(batch_size, getattr(rates, level), step, seed, level) for step, level, seed in constant
    ]


def trains(record: Mapping[str, Any], num_classes: int) -> bool:
    """Whether no step was non-finite and the loss at the end is below half of ln C."""
    loss = record["loss"]
    return not record["diverged"] and loss is not None and loss < math.log(num_classes) / 2


def choose_rates(records: Sequence[Mapping[str, Any]], num_classes: int) -> Rates:
    """Best: of the lowest training loss at the end. Low: a tenth of it. High: the next above it.

    Where the next rate of the grid does not train (see `trains`), or there is none, high is the
    best; where no run is without non-finite steps, the best is the lowest of the grid.
    """
    grid = sorted(records, key=lambda record: record["rate"])
    best = choose(grid, "loss")["rate"]
    above = [record for record in grid if record["rate"] > best][:1]
    high = above[0]["rate"] if above and trains(above[0], num_classes) else best
    return Rates(best, best / 10, high)


def trained(
    purpose: str,
    runs: Sequence[Run],
    config: Config,
    images: Images,
    runner: Runner,
    measurement: Callable[..., Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Records of runs: the training loss at their end, and what the measurement says of the state.

    Tuning is to choose a rate and is not measured.
    """

    def record(training: Training, state: TrainState, history: History) -> dict[str, Any]:
        run: Run = training.setting
        loss = np.mean(history.loss[-max(1, run.step // 10) :])
        found = {**run.as_record(), "loss": loss, "diverged": history.diverged}
        if purpose == "tune":
            return found
        late = run.step == max(config.snapshots)
        return {**found, **measurement(state, batch_size=run.batch_size, seed=run.seed, late=late)}

    shape = (1, *images.train.image.shape[1:])
    return settings.train(
        runner,
        [Training(run, run.seed, run.step) for run in runs],
        lambda run: _programs(run, config, shape),
        images.train,
        record=record,
        name=lambda training: f"{purpose} {training.setting.name}",
        describe=lambda training: f"{purpose}, batch {training.setting.batch_size}",
    )


def learning_rate(run: Run, count: Int[Array, ""]) -> Float[Array, ""]:
    """Rate of an update: η, or with decay η·(1 + cos(π·count/step))/2."""
    cosine = (1 + jnp.cos(jnp.pi * jnp.clip(count / run.step, 0, 1))) / 2
    return run.rate * jnp.where(run.decay, cosine, 1.0)


def _optimizer(run: Run) -> optax.GradientTransformation:
    return create_optimizer("momentum", functools.partial(learning_rate, run))


@functools.cache
def _create(config: Config, shape: tuple[int, ...]) -> CreateFn:
    def init(key: Array, run: Run) -> Any:
        variables = make_model(config.network).init(key, jnp.zeros(shape), train=False)
        return {**variables, "batch_stats": (variables["batch_stats"],) * len(config.momenta)}

    return settings.creator(init, _optimizer)


@per_structure
def _programs(run: Run, config: Config, shape: tuple[int, ...]) -> Programs:
    model, size, steps = make_model(config.network), run.batch_size, config.steps_per_dispatch

    def apply_fn(variables, image, *, train):
        assert train  # inference takes the statistics that it is to be judged by
        averages = variables["batch_stats"]
        one = {"params": variables["params"], "batch_stats": averages[0]}
        logits, new = model.apply(one, image, train=True, mutable=[MOMENTS])
        return logits, tuple(
            update_from_batch_moments(stats, new[MOMENTS], momentum=momentum)
            for stats, momentum in zip(averages, config.momenta, strict=True)
        )

    def advance(state: TrainState, run: Run, examples: Batch):
        step = make_train_step(apply_fn, _optimizer(run))
        return run_steps(step, state, examples, batch_size=size, num_steps=steps)

    return Programs(_create(config, shape), settings.sweep(advance, steps_per_dispatch=steps))
