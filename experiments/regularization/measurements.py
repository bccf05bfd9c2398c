"""What is trained: groups, noise and dropout; and what is measured of the trained networks."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bn_research.claims.judging import choose
from bn_research.lab.fields import at_most
from bn_research.lab.images import check_network, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.normalization import batch_moments, population_stats
from bn_research.training.compiler import compiler_options
from bn_research.training.cores import use_cpu_cores
from bn_research.training.state import TrainState
from bn_research.training.step import Batch
from experiments.regularization import Config, verdicts
from experiments.regularization.training import Data, Network, Trainer, apply_training, make_model
from experiments.regularization.verdicts import CELLS, PLAIN, Records, ladder_arm, of_cell

_SHIFT_KEY = 30_000  # of the dropout under which pre-activations are measured
_DOSE_KEY = 40_000  # of the order and the draws of passes
_PASSES = 8


def prepare(config: Config) -> Data:
    """The three sets; each core becomes a device, for the sweeps."""
    use_cpu_cores()
    images = images_of(config, scale="standardized")
    train, whole = config.train_examples, len(images.train.label)
    at_most(config, whole, f"those of {config.dataset}", "train_examples")
    at_most(config, whole - train, f"the others of {config.dataset}", "validation_examples")
    at_most(config, len(images.test.label), f"those of {config.dataset}", "test_examples")
    for network in (config.groups_network, config.dropout_network):
        check_network(network, images, config.dataset)
    return Data(
        _cut(images.train, 0, train),
        _cut(images.train, train, train + config.validation_examples),
        _cut(images.test, 0, config.test_examples),
    )


def _cut(examples: Batch, start: int, stop: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[start:stop], examples)


def total_steps(config: Config) -> int:
    """Of all trainings."""
    groups = len(_rates_of_groups(config)) * config.groups_tuning_seeds
    groups += len(_arms(config, 1.0, 1.0)) * config.groups_seeds
    if config.groups_slower:
        groups += len(config.groups_sizes) * config.seeds
    dropout = len(_rates_of_dropout(config)) * config.dropout_tuning_seeds
    dropout += len(CELLS) * config.dropout_seeds + len(verdicts.PLACED) * config.seeds
    return groups * config.groups_steps + dropout * config.dropout_steps


def _tuning_seeds(config: Config, part: str) -> range:
    """Those after the seeds of verdicts."""
    first = max(config.seeds, getattr(config, f"{part}_seeds"))
    return range(first, first + getattr(config, f"{part}_tuning_seeds"))


def measure(config: Config, data: Data, path: Path) -> Records:
    """Records of the trainings, by what they are for."""
    ledger = Ledger(path / "metrics.jsonl")
    with Runner(path, ledger, total_steps=total_steps(config), strategy="devices") as runner:
        return {**measure_groups(config, data, runner), **measure_dropout(config, data, runner)}


def _trainer(part: str, config: Config, data: Data, runner: Runner) -> Trainer:
    """By the config's fields that begin with the part's name."""
    return Trainer(
        runner,
        data._replace(train=_cut(data.train, 0, getattr(config, f"{part}_examples"))),
        num_steps=getattr(config, f"{part}_steps"),
        steps_per_dispatch=getattr(config, f"{part}_steps_per_dispatch"),
        compiler_level=config.compiler_level,
    )


def most_accurate(tuning: Sequence[Mapping[str, Any]]) -> Network:
    """The network with the highest accuracy on the validation set, mean over its seeds."""
    fields = [*Network.__dataclass_fields__]
    found = choose(tuning, lambda run: 1 - run["validation_accuracy"], fields=fields)
    return Network(**{field: found[field] for field in fields})


def measure_groups(config: Config, data: Data, runner: Runner) -> Records:
    """Every arm, at rates that are chosen first, and the ladder at a lower one."""
    trainer = _trainer("groups", config, data, runner)
    train = functools.partial(trainer.train, measure=functools.partial(dose, trainer))
    tuning = train(_rates_of_groups(config), _tuning_seeds(config, "groups"))
    rate, plain_rate = (
        most_accurate([run for run in tuning if run["norm"] == norm]).rate
        for norm in ("batch", "none")
    )
    groups = train(_arms(config, rate, plain_rate).items(), range(config.groups_seeds))
    ladder = _ladder(config, rate / config.groups_slower) if config.groups_slower else {}
    slower = train(ladder.items(), range(config.seeds))
    return {"groups_tuning": tuning, "groups": groups, "groups_slower": slower}


def _rates_of_groups(config: Config) -> list[tuple[str, Network]]:
    """Every rate, with statistics of the whole batch and without BN."""
    batch = config.groups_sizes[-1]
    arms = (ladder_arm(batch), "batch", batch), (PLAIN, "none", config.groups_size)
    rates = config.groups_rates
    return [(arm, _network(config, norm, m, rate)) for arm, norm, m in arms for rate in rates]


def _arms(config: Config, rate: float, plain_rate: float) -> dict[str, Network]:
    size = config.groups_size
    # Without BN the group decides the order of the examples alone, and only where it is frozen:
    # given all the same, so that both are one program.
    plain = _network(config, "none", size, plain_rate)
    return {
        **_ladder(config, rate),
        verdicts.FROZEN: _network(config, "batch", size, rate).replace(regrouped=False),
        verdicts.POPULATION: _network(config, "population", 0, rate),
        **{noise: _network(config, noise, size, rate) for noise in verdicts.INJECTED},
        PLAIN: plain,
        verdicts.PLAIN_FROZEN: plain.replace(regrouped=False),
    }


def _ladder(config: Config, rate: float) -> dict[str, Network]:
    """BN by groups of every size."""
    return {ladder_arm(m): _network(config, "batch", m, rate) for m in config.groups_sizes}


def _network(config: Config, norm: str, group_size: int, rate: float) -> Network:
    spec, batch_size = config.groups_network, config.groups_sizes[-1]
    return Network(spec, norm, group_size=group_size, batch_size=batch_size, rate=rate)


def dose(trainer: Trainer, network: Network, state: TrainState) -> dict[str, float]:
    """How much noise reaches the logits, over the training set, as far as it fills batches.

    The same examples pass the network in training mode several times, in groups of other company or
    with other draws. With z the logits of an example, less their mean over the classes, which
    softmax does not see,

        dose = E[Var(z | example)] / Var(E[z | example]),

    the variances over passes and over examples, summed over classes: the power of the noise in
    units of the signal's.
    """
    image = trainer.data.train.image
    used = len(image) // network.batch_size * network.batch_size
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    program = _dose_program(trainer.compiler_level)
    return {"dose": float(program(network.traced, variables, image[:used]))}


@functools.cache
def _dose_program(compiler_level: int):
    @functools.partial(jax.jit, compiler_options=compiler_options(compiler_level))
    def program(network: Network, variables: Any, image: Array) -> Array:
        size = network.batch_size
        batches = len(image) // size

        def one_pass(key):
            order_key, noise_key = jax.random.split(key)
            order = jax.random.permutation(order_key, len(image))
            keys = jax.random.split(noise_key, (batches, size))
            shuffled = image[order].reshape(batches, size, *image.shape[1:])
            found = jax.lax.map(
                lambda batch: apply_training(network, variables, *batch)[0], (shuffled, keys)
            )
            found = found.reshape(len(image), -1)
            return jnp.zeros_like(found).at[order].set(found)

        z = jax.lax.map(one_pass, jax.random.split(jax.random.key(_DOSE_KEY), _PASSES))
        z = z - jnp.mean(z, axis=-1, keepdims=True)
        noise = jnp.mean(jnp.var(z, axis=0, ddof=1), axis=0)
        signal = jnp.var(jnp.mean(z, axis=0), axis=0)
        return jnp.sum(noise) / jnp.sum(signal)

    return program


def measure_dropout(config: Config, data: Data, runner: Runner) -> Records:
    """Two by two, each cell at its best rates, and the placements of dropout below BN."""
    trainer = _trainer("dropout", config, data, runner)
    shift = functools.partial(variance_shift, trainer)
    tuning = trainer.train(_rates_of_dropout(config), _tuning_seeds(config, "dropout"))
    cells = {cell: most_accurate(of_cell(tuning, cell)) for cell in CELLS}
    bn = cells["BN, no dropout"].replace(dropout=config.dropout_shift_rate)
    placements = [(place, bn.replace(dropout_placement=place)) for place in verdicts.PLACED]
    return {
        "dropout_tuning": tuning,
        "dropout": trainer.train(cells.items(), range(config.dropout_seeds), measure=shift),
        "shift": trainer.train(placements, range(config.seeds), measure=shift),
    }


def _rates_of_dropout(config: Config) -> list[tuple[str, Network]]:
    """Every learning rate and dropout rate."""
    base = Network(
        config.dropout_network,
        batch_size=config.dropout_batch_size,
        dropout_placement=config.dropout_placement,
    )
    return [
        (cell, base.replace(norm=norm, rate=rate, dropout=dropout))
        for cell, (norm, drops) in CELLS.items()
        for dropout in (config.dropout_rates if drops else (0.0,))
        for rate in config.dropout_learning_rates
    ]


def variance_shift(trainer: Trainer, network: Network, state: TrainState) -> dict[str, Any]:
    """What dropout in training does to a trained network's population statistics.

    Nothing without BN or dropout. Else a list over BN layers of medians over units, `ratio`:
    variance of the layer's input in inference over that of the population statistics, which were
    taken with dropout on; for dropout right before BN, from the moments of what it drops in
    training, `closed_form` of the ratio and `population_over_closed_form`; and `off_accuracy` and
    `off_loss` on the test set by population statistics taken anew with dropout off.
    """
    if network.norm == "none" or not network.dropout:
        return {}
    inference = pre_activation_stats(trainer.data, network, state, train=False)
    before = network.dropout_placement == "before"
    training = pre_activation_stats(trainer.data, network, state, train=True) if before else {}
    found: dict[str, Any] = {"ratio": [], "closed_form": [], "population_over_closed_form": []}
    for number in range(1, len(state.batch_stats) + 1):  # BN stands on all hidden layers
        sown = f"pre_activation_{number}"
        population = np.asarray(state.batch_stats[f"batch_norm{number}"]["var"], np.float64)
        variance = np.asarray(inference[sown].var, np.float64)
        found["ratio"].append(float(np.median(variance / population)))
        if before:
            mean, var = (np.asarray(leaf, np.float64) for leaf in training[sown])
            dropped = dropped_variance(mean, var, network.dropout)
            found["closed_form"].append(float(np.median(var / dropped)))
            found["population_over_closed_form"].append(float(np.median(population / dropped)))
    off = trainer.with_population_stats(network.replace(dropout=0.0), state)
    scores = trainer.evaluate(network, off)
    return {**found, "off_accuracy": scores["test_accuracy"], "off_loss": scores["test_loss"]}


def dropped_variance(mean: Any, var: Any, rate: float) -> Any:
    """Variance of z·mask/(1 − rate), mask ~ B(1, 1 − rate): (Var z + rate·(E z)²)/(1 − rate)."""
    return (var + rate * mean**2) / (1 - rate)


def pre_activation_stats(data: Data, network: Network, state: TrainState, *, train: bool):
    """Mean and unbiased variance of each pre-activation's units over the training set, as sown.

    Passes are in training mode, with dropout and the statistics of batches; or in inference.
    """
    size = network.batch_size
    count = len(data.train.image) // size
    images = jnp.split(data.train.image[: count * size], count)
    keys = jax.random.split(jax.random.key(_SHIFT_KEY), (count, size))
    if not train:  # one program for every placement
        network = network.replace(dropout_placement="none")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    program = _pre_activation_program()
    return population_stats(
        lambda batch: program(network.traced, variables, *batch, train=train),
        zip(images, keys, strict=True),
        method="merged",
    )


@functools.cache
def _pre_activation_program():
    @functools.partial(jax.jit, compiler_options=compiler_options(0), static_argnames="train")
    def moments(network: Network, variables: Any, image: Array, keys: Array, *, train: bool):
        mutable = ["intermediates", "batch_stats"]
        model = make_model(network)
        _, new = model.apply(variables, image, train=train, mutable=mutable, keys=keys)
        return {name: batch_moments(x) for name, (x,) in new["intermediates"].items()}

    return moments
