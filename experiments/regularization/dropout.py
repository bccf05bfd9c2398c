r"""Does BN reduce the need for dropout, and what does dropout do to BN? Part of `regularization`.

Two by two: with and without BN, with and without dropout, each cell at the learning rate, and the
two with dropout at the dropout rate, that give the best accuracy on a validation set; the grids are
the same for all. Ioffe & Szegedy (2015, section 3.4) could leave dropout out of their BN networks.
The standard network is the one of four, in trials of one or two seeds of no verdict, where dropout
gained most without BN: a need that BN could reduce. On the others it gained about as much with BN,
or more.

Variance shift (Li et al. 2018, arXiv 1801.05134, "Understanding the disharmony between dropout and
batch normalization by variance shift"): the population statistics of a BN layer are those of
training passes, with dropout on; in inference it is off and the layer's input has another variance.
Where dropout stands right before BN, z → z·mask/(1 − p),

    Var_train = (Var z + p·(E z)²)/(1 − p)    so that    Var/Var_train ≤ 1 − p.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_research.lab.runner import Runner
from bn_research.models.cnn import DROPOUT_PLACEMENTS, hidden_layers
from bn_research.models.spec import num_logits
from bn_research.normalization import BatchStats, batch_moments, population_stats
from bn_research.training.compiler import compiler_options
from bn_research.training.state import TrainState
from experiments.regularization.arms import Setting, make_model
from experiments.regularization.data import Data
from experiments.regularization.dropout_figures import draw
from experiments.regularization.dropout_verdicts import CELLS, CLAIMS, Cell, judge
from experiments.regularization.training import Run, Trainer, choose, trainer_of

__all__ = ["CLAIMS", "check", "draw", "judge", "measure", "total_steps"]

_WHOLE = {  # fields that hold whole numbers: the least allowed
    "dropout_examples": 2,
    "dropout_batch_size": 2,
    "dropout_steps": 1,
    "dropout_steps_per_dispatch": 1,
    "dropout_tuning_seeds": 1,
    "dropout_seeds": 1,
}
_KEY = 30_000  # of the dropout under which pre-activations are measured


def check(config: Any) -> None:
    """ValueError, in one line, unless every field named dropout_… can be used."""
    for name, least in _WHOLE.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} is not allowed: a whole number from {least} up")
    if config.dropout_batch_size > config.dropout_examples:
        raise ValueError(
            f"dropout_batch_size={config.dropout_batch_size} is not allowed: at most the "
            f"{config.dropout_examples} of dropout_examples"
        )
    if config.dropout_steps % config.dropout_steps_per_dispatch:
        raise ValueError(
            f"dropout_steps={config.dropout_steps} is not allowed: it must be a multiple of "
            f"dropout_steps_per_dispatch={config.dropout_steps_per_dispatch}"
        )
    for name, high in (("dropout_rates", 1.0), ("dropout_learning_rates", math.inf)):
        values = getattr(config, name)
        sound = all(isinstance(value, int | float) and 0 < value < high for value in values)
        if not values or not sound or len(set(values)) < len(values):
            raise ValueError(
                f"{name}={values!r} is not allowed: one or more, all different, between 0 and "
                f"{high:g}"
            )
    rate = config.dropout_shift_rate
    if not isinstance(rate, int | float) or not 0 < rate < 1:
        raise ValueError(f"dropout_shift_rate={rate!r} is not allowed: it must be between 0 and 1")
    if config.dropout_placement not in DROPOUT_PLACEMENTS:
        raise ValueError(
            f"dropout_placement={config.dropout_placement!r} is unknown: allowed are "
            f"{', '.join(DROPOUT_PLACEMENTS)}"
        )
    num_logits(config.dropout_network)
    if len(hidden_layers(config.dropout_network)) < 2:
        raise ValueError(
            f"dropout_network={config.dropout_network!r} is not allowed: it needs two hidden "
            "layers, so that a BN layer has dropout after an activation below it"
        )


def total_steps(config: Any) -> int:
    """Of all trainings."""
    cells = 2 * (1 + len(config.dropout_rates)) * len(config.dropout_learning_rates)
    runs = cells * config.dropout_tuning_seeds + len(CELLS) * config.dropout_seeds
    runs += len(DROPOUT_PLACEMENTS) * config.seeds
    return runs * config.dropout_steps


def measure(config: Any, data: Data, runner: Runner) -> dict[str, list[dict[str, Any]]]:
    """Records of the trainings, by kind: tuning, cells, shift; each once in a workdir's life.

    Args:
      config: of the run.
      data: of its training set, the first config.dropout_examples are used.
      runner: of the run.
    """
    trainer = trainer_of("dropout", config, data, runner)

    def measure_shift(setting: Setting, state: TrainState) -> Mapping[str, Any]:
        return variance_shift(trainer, setting, state)

    tuning = trainer.train(_tuning_runs(config))
    chosen = {cell: best(tuning, cell) for cell in CELLS}
    cells = trainer.train(
        [
            Run(cell.name, setting, seed)
            for cell, setting in chosen.items()
            for seed in range(config.dropout_seeds)
        ],
        measure=measure_shift,
    )
    bn = chosen[Cell(norm="batch", dropout=False)]
    shift = trainer.train(
        [
            Run(placement, _shifted(config, bn, placement), seed)
            for placement in DROPOUT_PLACEMENTS
            for seed in range(config.seeds)
        ],
        measure=measure_shift,
    )
    return {"tuning": tuning, "cells": cells, "shift": shift}


def _tuning_runs(config: Any) -> list[Run]:
    """Every learning rate and dropout rate, on seeds that enter no verdict."""
    first = max(config.seeds, config.dropout_seeds)
    return [
        Run(
            Cell(norm, dropout > 0).name,
            Setting(
                config.dropout_network,
                norm,
                batch_size=config.dropout_batch_size,
                dropout_placement=config.dropout_placement,
                rate=rate,
                dropout=dropout,
            ),
            seed,
        )
        for norm in ("none", "batch")
        for dropout in (0.0, *config.dropout_rates)
        for rate in config.dropout_learning_rates
        for seed in range(first, first + config.dropout_tuning_seeds)
    ]


def _shifted(config: Any, bn: Setting, placement: str) -> Setting:
    return bn._replace(dropout_placement=placement, dropout=config.dropout_shift_rate)


def best(tuning: list[dict[str, Any]], cell: Cell) -> Setting:
    """The setting of a cell with the highest accuracy on the validation set, mean over seeds."""
    records = [
        {**record, "error": 1 - record["validation_accuracy"]}
        for record in tuning
        if cell.holds(record)
    ]
    found = choose(records, "error")
    return Setting(**{field: found[field] for field in Setting._fields})


def variance_shift(trainer: Trainer, setting: Setting, state: TrainState) -> dict[str, Any]:
    """What dropout in training does to a trained network's population statistics.

    Args:
      trainer: of the network.
      setting: of its training.
      state: with population statistics taken with dropout on.

    Returns:
      Nothing without BN or dropout. Else a list over BN layers of medians over units, `ratio`:
      variance of the layer's input in inference over that of the population statistics; for dropout
      right before BN, from the moments of what it drops in training, `closed_form` of the ratio and
      `population_over_closed_form`; and `off_accuracy` and `off_loss` on the test set by population
      statistics taken anew with dropout off.
    """
    if setting.norm == "none" or not setting.dropout:
        return {}
    inference = pre_activation_stats(trainer.data, setting, state, train=False)
    training = None
    if setting.dropout_placement == "before":
        training = pre_activation_stats(trainer.data, setting, state, train=True)
    found: dict[str, Any] = {"ratio": [], "closed_form": [], "population_over_closed_form": []}
    for layer in sorted(state.batch_stats, key=_number):
        sown = f"pre_activation_{_number(layer)}"
        population = np.asarray(state.batch_stats[layer]["var"], np.float64)
        variance = np.asarray(inference[sown].var, np.float64)
        found["ratio"].append(float(np.median(variance / population)))
        if training is not None:
            mean, var = (np.asarray(leaf, np.float64) for leaf in training[sown])
            dropped = dropped_variance(mean, var, setting.dropout)
            found["closed_form"].append(float(np.median(var / dropped)))
            found["population_over_closed_form"].append(float(np.median(population / dropped)))
    off = trainer.evaluate(setting, trainer.with_population_stats(setting, state, dropout=0.0))
    return {**found, "off_accuracy": off["test_accuracy"], "off_loss": off["test_loss"]}


def dropped_variance(mean: Any, var: Any, rate: float) -> Any:
    """Variance of z·mask/(1 − rate), mask ~ B(1, 1 − rate): (Var z + rate·(E z)²)/(1 − rate)."""
    return (var + rate * mean**2) / (1 - rate)


def pre_activation_stats(
    data: Data, setting: Setting, state: TrainState, *, train: bool
) -> dict[str, BatchStats]:
    """Mean and unbiased variance of each pre-activation's units over the training set, as sown.

    Args:
      data: its training set, as far as it fills whole batches.
      setting: of the network.
      state: of it.
      train: pass in training mode, with dropout and the statistics of batches; or in inference.
    """
    size = setting.batch_size
    count = len(data.train.image) // size
    images = jnp.split(data.train.image[: count * size], count)
    keys = jax.random.split(jax.random.key(_KEY), (count, size))
    if not train:  # one program for every placement
        setting = setting._replace(dropout_placement="none")
    program = _pre_activation_program(setting.static, train)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    rate = np.float32(setting.dropout)
    return population_stats(
        lambda batch: program(variables, *batch, rate),
        zip(images, keys, strict=True),
        method="merged",
    )


@functools.cache
def _pre_activation_program(static: tuple[Any, ...], train: bool) -> Callable[..., Any]:
    setting = Setting(*static)

    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def moments(variables, image, keys, dropout):
        model = make_model(setting, dropout=dropout)
        options = {"keys": keys} if train else {}
        mutable = ["intermediates", "batch_stats"] if train else ["intermediates"]
        _, new = model.apply(variables, image, train=train, mutable=mutable, **options)
        return {name: batch_moments(x) for name, (x,) in new["intermediates"].items()}

    return moments


def _number(layer: str) -> int:
    return int(layer.removeprefix("batch_norm"))
