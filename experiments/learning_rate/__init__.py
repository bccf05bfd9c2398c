"""How much larger may the learning rate be with batch normalization?

Ioffe & Szegedy (2015, section 4.2) train BN networks at 5 and 30 times the rate of Inception. This
experiment searches the largest rate at which momentum SGD still trains, for networks without BN,
with BN on all layers, on the hidden layers (as in the paper) and on the last layer alone, at
several batch sizes; trains BN at 30 times the plain network's best rate; and asks whether deep
networks of sigmoids, which do not train without BN, train with it.

    python -m experiments.learning_rate --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, tiny networks: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds, the CNN at two batch sizes: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 seeds, CNN and MLP: within 12 min on 2 CPU cores

Method. A rate is stable if of all steps none was non-finite and the mean training loss over the
last tenth of them is below half of ln C, C the number of classes. The largest stable rate is found
by bisection on a log grid, for each seed by itself, from a bracket whose two ends were run; see
`learning_rate_search`. Whether a rate above it trains again is looked at afterwards. Plain networks
have He initialization and biases, the same optimizer (momentum 0.9), steps and grid. In a trial of
one seed, 200 steps and batch 8 no rate brought the MLP with BN on all layers below half of ln C:
the smallest batch of standard is 16, and it has 300 steps.

Theory. On a quadratic, momentum SGD is stable up to η = 2(1 + μ)/λ_max, so without BN the limit is
set by the curvature and, at a small batch, by the noise. Weights below a BN are scale-invariant: a
step that is too large makes them longer, and the next one shorter in angle by as much, so that no
rate is too large for them. What sets the limit with BN are the parameters that are not
scale-invariant: γ and β, and a head without BN. Which way the batch should act was settled after
trials: on digits, where the advantage grew with it, and a short one on Fashion-MNIST, which decided
nothing.

| claim | expected |
|---|---|
| higher-learning-rates | the largest stable rate with BN at least 10 times that without |
| sigmoid-trainable | plain at chance, BN at 3 times chance or more |
| advantage-shrinks-with-batch | a positive slope of the ratio over the batch |
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from bn_research.lab.arms import Arm, Trainer
from bn_research.lab.experiment import Experiment
from bn_research.lab.images import Images, check_network, load_images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.models.cnn import NormPlacement
from bn_research.training.cores import use_cpu_cores
from bn_research.training.lanes import STRATEGIES
from experiments.learning_rate.figures import draw
from experiments.learning_rate.search import Searches, Setting, arm_of, find_limits
from experiments.learning_rate.sigmoid import CLAIM as SIGMOID_CLAIM
from experiments.learning_rate.sigmoid import judge_sigmoid, train_sigmoids
from experiments.learning_rate.verdicts import (
    BOOSTED,
    PUBLISHED_BATCH,
    PUBLISHED_FACTOR,
    judge_batches,
    judge_rates,
)
from experiments.learning_rate.verdicts import (
    CLAIMS as RATE_CLAIMS,
)

_SEARCH_STEPS = 7  # about, of a search; for the progress bar


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3  # 0, 1, …; the next one chooses the rates and enters no verdict
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    examples: int = 0  # of each split; 0 is all
    image_size: int = 0  # height and width the images are resized to; 0 keeps theirs
    cnn: str = "c8 P c16 P f64 f10"
    cnn_batch_sizes: tuple[int, ...] = (8, 32)
    mlp: str = "f100 f100 f100 f10"
    mlp_batch_sizes: tuple[int, ...] = ()
    placements: tuple[NormPlacement, ...] = ("none", "last", "hidden", "all")
    num_steps: int = 150
    steps_per_dispatch: int = 50
    strategy: str = "devices"  # of the sweeps: auto (measured), in_turn, devices, vmap
    lowest_log2_rate: int = -10  # of the grid
    highest_log2_rate: int = 8
    rates_per_octave: int = 2
    tuning_stride: int = 4  # each so many-th rate of the grid is tried when tuning
    sigmoid_networks: tuple[str, ...] = (
        "c8 P f10",
        "c8 c8 P c16 c16 P f64 f64 f10",
    )  # the deepest last
    sigmoid_batch_size: int = 32
    sigmoid_steps: int = 150
    sigmoid_rates: tuple[float, ...] = (1 / 32, 1 / 8, 1 / 2, 2.0)


PRESETS = {
    "smoke": Config(
        seeds=2,
        examples=128,
        cnn="c4 P f10",
        cnn_batch_sizes=(8, 32),
        placements=("none", "all"),
        num_steps=20,
        steps_per_dispatch=10,
        lowest_log2_rate=-6,
        highest_log2_rate=6,
        rates_per_octave=1,
        tuning_stride=4,
        sigmoid_networks=("c4 P f10",),
        sigmoid_steps=20,
        sigmoid_rates=(1 / 8, 2.0),
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        cnn_batch_sizes=(16, 32, 128),
        mlp_batch_sizes=(16, 32, 128, 512),
        num_steps=300,
        sigmoid_networks=(
            "c8 P f10",
            "c8 P c16 P f10",
            "c8 c8 P c16 c16 P f64 f64 f10",
        ),
        sigmoid_steps=300,
        sigmoid_rates=(1 / 128, 1 / 32, 1 / 8, 1 / 2, 2.0, 8.0),
    ),
}

_LEAST = {
    "seeds": 1,
    "examples": 0,
    "image_size": 0,
    "num_steps": 1,
    "sigmoid_steps": 1,
    "steps_per_dispatch": 1,
    "rates_per_octave": 1,
    "tuning_stride": 1,
    "sigmoid_batch_size": 2,
}


def prepare(config: Config) -> Images:
    """Checks the config and loads the images; each core becomes a device, for the sweeps."""
    for name, least in _LEAST.items():
        if getattr(config, name) < least:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: at least {least} is needed"
            )
    for name in ("num_steps", "sigmoid_steps"):
        if getattr(config, name) % config.steps_per_dispatch:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: it must be a multiple of "
                f"steps_per_dispatch={config.steps_per_dispatch}"
            )
    for name, values in dataclasses.asdict(config).items():
        if isinstance(values, tuple) and len(set(values)) < len(values):
            raise ValueError(f"{name}={values} holds an entry twice: give each once")
    for name in ("sigmoid_networks", "sigmoid_rates"):
        if not getattr(config, name):
            raise ValueError(f"{name}=() is not allowed: it needs at least one entry")
    if not all(0 < rate < math.inf for rate in config.sigmoid_rates):
        raise ValueError(f"sigmoid_rates={config.sigmoid_rates} is not allowed: each must be > 0")
    octaves = config.highest_log2_rate - config.lowest_log2_rate
    if octaves < 1 or octaves * config.rates_per_octave < config.tuning_stride:
        raise ValueError(
            f"highest_log2_rate={config.highest_log2_rate} is not allowed: from "
            f"lowest_log2_rate={config.lowest_log2_rate} up the grid must hold at least "
            f"{config.tuning_stride + 1} rates, tuning_stride={config.tuning_stride} apart"
        )
    allowed = ("none", "last", "hidden", "all")
    if not {"none", "all"} <= set(config.placements) <= set(allowed):
        raise ValueError(
            f"placements={config.placements} is not allowed: none and all are needed, and of "
            "last and hidden those that shall be run"
        )
    if PUBLISHED_BATCH not in config.cnn_batch_sizes:
        raise ValueError(
            f"cnn_batch_sizes={config.cnn_batch_sizes} must hold {PUBLISHED_BATCH}: a claim is "
            "about it"
        )
    if config.strategy not in ("auto", *STRATEGIES):
        raise ValueError(
            f"strategy={config.strategy!r} is unknown: allowed are auto, {', '.join(STRATEGIES)}"
        )
    for name, first in (("cnn", "c"), ("mlp", "f")):
        if not getattr(config, name).startswith(first):
            raise ValueError(f"{name}={getattr(config, name)!r} must begin with a layer {first}N")
    use_cpu_cores()
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="standardized",
        size=config.image_size,
        limit=config.examples or None,
    )
    count = len(images.train.label)
    for network in (config.cnn, config.mlp, *config.sigmoid_networks):
        check_network(network, images, config.dataset)
    for name in ("cnn_batch_sizes", "mlp_batch_sizes", "sigmoid_batch_size"):
        sizes: Any = getattr(config, name)
        for size in sizes if isinstance(sizes, tuple) else (sizes,):
            if not 2 <= size <= count:
                raise ValueError(f"{name}={sizes} is not allowed: each from 2 to {count}")
    return images


def batch_sizes(config: Config) -> dict[str, list[int]]:
    """Those of each network that is run, rising; the CNN first."""
    found = {config.cnn: config.cnn_batch_sizes, config.mlp: config.mlp_batch_sizes}
    return {network: sorted(sizes) for network, sizes in found.items() if sizes}


def settings(config: Config) -> list[Setting]:
    """What the largest stable rate is asked of."""
    return [
        Setting(network, placement, size)
        for network, sizes in batch_sizes(config).items()
        for size in sizes
        for placement in config.placements
    ]


def boosted_arms(config: Config, searches: Searches) -> dict[str, Arm]:
    """Plain at its best rate, BN at 30 times that and at its own best; CNN, the paper's batch."""
    plain, bn = (Setting(config.cnn, where, PUBLISHED_BATCH) for where in ("none", "all"))
    best = searches[plain].best
    rates = (best, PUBLISHED_FACTOR * best, searches[bn].best)
    return {
        name: arm_of(config, setting).replace(learning_rate=rate)
        for name, setting, rate in zip(BOOSTED, (plain, bn, bn), rates, strict=True)
    }


def run(config: Config, images: Images, path: Path):
    """Measures what is not yet in the workdir, decides, and draws."""
    ledger = Ledger(path / "metrics.jsonl")
    asked = settings(config)
    places = (config.highest_log2_rate - config.lowest_log2_rate) * config.rates_per_octave
    tuned = places // config.tuning_stride + 1
    total = config.num_steps * (
        len(asked) * (tuned + _SEARCH_STEPS * config.seeds) + len(BOOSTED) * config.seeds
    )
    total += (
        config.sigmoid_steps
        * 2
        * len(config.sigmoid_networks)
        * (len(config.sigmoid_rates) + config.seeds)
    )
    with Runner(path, ledger, total_steps=total, strategy=config.strategy) as runner:
        trainer = Trainer(images, runner, steps_per_dispatch=config.steps_per_dispatch)
        searches = find_limits(config, asked, trainer, images.num_classes)
        arms = boosted_arms(config, searches)
        seeds = range(config.seeds)
        records = iter(trainer.train([(arm, seed) for arm in arms.values() for seed in seeds]))
        boosted = {name: [next(records) for _ in seeds] for name in arms}
        sigmoid = train_sigmoids(config, trainer)
    findings = [
        judge_rates(searches, config.cnn, boosted, images.num_classes),
        judge_sigmoid(config.sigmoid_networks, sigmoid, config.sigmoid_rates, images.num_classes),
        judge_batches(searches, batch_sizes(config)),
    ]
    return findings, draw(config, searches, boosted, sigmoid, images.num_classes, path / "figures")


_RATE, _BATCH = RATE_CLAIMS
CLAIMS = (_RATE, SIGMOID_CLAIM, _BATCH)

EXPERIMENT = Experiment(
    __name__,
    title="How much larger may the learning rate be with batch normalization?",
    presets=PRESETS,
)
