"""What is trained and measured: arms by the role that they play, each at the rate it chose."""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bn_research.claims.judging import Record, choose, numbers
from bn_research.lab.arms import Arm, Trainer
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, check_network, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.models.cnn import NormPlacement
from bn_research.models.spec import num_logits
from bn_research.training.cores import use_cpu_cores
from experiments.init_sensitivity import Config
from experiments.init_sensitivity.signal import measure_signals

PLAIN = "plain"  # the role whose claim is about every rate, not about the best
Best = Mapping[str, list[Record]]  # role -> records at its best rate, by seed


class Records(NamedTuple):
    """What the verdicts rest on."""

    signal: list[Record]  # at initialization
    plain: list[list[Record]]  # of each rate, by seed
    best: Best


class Cell(NamedTuple):
    """A role: BN on one layer, with its ε, an optimizer, and biases or none."""

    epsilon: float
    optimizer: str = "sgd"
    use_bias: bool = False
    placement: NormPlacement = "last"

    def __str__(self) -> str:
        """`last ε=1e-05 adam bias`."""
        bias = " bias" if self.use_bias else ""
        return f"{self.placement} ε={self.epsilon:g} {self.optimizer}{bias}"


def last_cells(config: Config) -> list[Cell]:
    """Those of BN on the last layer: each ε with each optimizer, with and without biases."""
    return [Cell(epsilon, *column) for epsilon in config.epsilons for column in config.columns]


def layer_rows(config: Config) -> list[list[Cell]]:
    """Those of BN on one layer alone: from layer to layer, for each optimizer and ε."""
    layers: tuple[NormPlacement, ...] = (*config.layers, "last")
    epsilons = {"sgd": config.layer_epsilons, "adam": config.adam_layer_epsilons}
    return [
        [Cell(epsilon, optimizer, placement=layer) for layer in layers]
        for optimizer, group in epsilons.items()
        for epsilon in group
    ]


def escape_cells(config: Config, optimizer: str, use_bias: bool) -> list[Cell]:
    """Those whose steps to leave the plateau are counted, in the order of ε."""
    ladders = {"sgd": config.escape_epsilons, "adam": config.adam_escape_epsilons}
    return [Cell(epsilon, optimizer, use_bias) for epsilon in ladders[optimizer]]


def escape_level(config: Config) -> float:
    """A loss that only a network that has begun to learn reaches: 0.1 below guessing."""
    return math.log(num_logits(config.network)) - 0.1


def final_loss(record: Record) -> float:
    """Mean loss of the last 20 steps; infinite when the run diverged."""
    return math.inf if record["diverged"] else float(np.mean(record["loss"][-20:]))


def plan(config: Config) -> dict[str, list[Arm]]:
    """The arms of a run by their role, one for each rate of its grid."""
    plain = Arm(
        config.network, "none", a=config.a, batch_size=config.batch_size, num_steps=config.num_steps
    )
    arms: dict[str, list[Arm]] = {}

    def add(role: str, rates: tuple[float, ...], **fields: Any) -> None:
        arms[role] = [plain.replace(learning_rate=rate, **fields) for rate in rates]

    grids = {"sgd": config.rates, "adam": config.adam_rates}
    add(PLAIN, config.rates)
    add("plain, Adam", config.adam_rates, optimizer="adam")
    for scheme in config.schemes:
        add(f"plain, {scheme}", config.scheme_rates, initializer=scheme)
    by_layer = list(zip(*layer_rows(config), strict=True))[:-1]  # the last is in the grid
    for cell in itertools.chain(last_cells(config), *by_layer):
        add(str(cell), grids[cell.optimizer], **cell._asdict())
    grids = {"sgd": (config.escape_rate,), "adam": (config.adam_escape_rate,)}
    end = dict(num_steps=config.escape_steps, stop_below=escape_level(config))
    for column in config.columns:
        for cell in escape_cells(config, *column):
            add(f"escape {cell}", grids[cell.optimizer], **end, **cell._asdict())
    steps = config.width_steps
    for placement, a in itertools.product(("none", "all"), config.widths):
        add(f"{placement} a={a:g}", config.width_rates, placement=placement, a=a, num_steps=steps)
    return arms


def prepare(config: Config) -> Images:
    """The images; each core becomes a device, for the sweeps."""
    use_cpu_cores()
    images = images_of(config, scale="standardized", limit=config.examples)
    check_network(config.network, images, config.dataset)
    at_most(config, len(images.train.label), "the training set", "batch_size")
    return images


def measure(config: Config, images: Images, path: Path) -> Records:
    """The signal at initialization, then every arm; rates are chosen on a seed of their own."""
    arms, seeds = plan(config), range(config.seeds)
    tuned = [role for role, group in arms.items() if len(group) > 1 and role != PLAIN]
    trials = [(arm, config.seeds) for role in tuned for arm in arms[role]]
    total = sum(arm.num_steps for arm, _ in trials)
    for role, group in arms.items():
        kept = group[:1] if role in tuned else group
        total += config.seeds * sum(arm.num_steps for arm in kept)
    ledger = Ledger(path / "metrics.jsonl")
    with Runner(path, ledger, total_steps=total, strategy=config.strategy) as runner:
        trainer = Trainer(images, runner, steps_per_dispatch=config.steps_per_dispatch)
        runner.describe("signal at initialization")
        signal = measure_signals(config, images, ledger)
        tried = iter(trainer.tune(trials))
        for role in tuned:
            chosen = choose([next(tried) for _ in arms[role]], final_loss)
            arms[role] = [arms[role][0].replace(learning_rate=chosen["learning_rate"])]
        runs = [(arm, seed) for group in arms.values() for arm in group for seed in seeds]
        trained: Iterator[Record] = iter(trainer.train(runs))
    found = {role: [[next(trained) for _ in seeds] for _ in group] for role, group in arms.items()}
    best: dict[str, list[Record]] = {role: rows[0] for role, rows in found.items()}
    best[PLAIN] = min(found[PLAIN], key=lambda row: numbers(row, final_loss).mean())
    return Records(signal, found[PLAIN], best)
