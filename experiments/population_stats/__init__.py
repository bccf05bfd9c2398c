"""Which statistics should inference with batch normalization use?

Ioffe & Szegedy (2015, section 3.1) freeze the weights and average the statistics of training
batches, algorithm 2; practice keeps a moving average during training. This experiment measures how
far each is from the statistics of the whole training set, and what each does to test accuracy, from
early to late in training, at a low and a high learning rate and several batch sizes.

    python -m experiments.population_stats --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, tiny: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds, two batch sizes: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 seeds, three batch sizes: within 20 min on 2 CPU cores

Method. A convolutional network with BN on its hidden layers is trained by momentum SGD at a
constant rate, and carries moving averages of every momentum at once, which do not influence it. At
each of some steps the weights are frozen. Algorithm 2: E[x] is the mean over batches of μ_B, Var[x]
that of m/(m − 1)·σ_B². Merged: the moments of the same batches merged exactly (Chan et al., 1983),
which adds the spread of the μ_B. The batches have training's size and are drawn independently.
The distance of statistics to those of the whole training set is defined in
`population_stats_measurements`. Low rate: a tenth of the best of a grid, by training loss on a seed
apart; high: the next of the grid above the best if it still trains.

Theory. With momentum β a moving average is the mean of about (1 + β)/(1 − β) batches in its noise:
19, 199 and 1999 for 0.9, 0.99 and 0.999. It looks back 1/(1 − β) steps, over which the weights have
moved, and of its start, mean 0 and variance 1, βᵗ is left after t steps. Algorithm 2's error falls
as 1/√K with K batches, so where the weights hardly move an average of more than K batches is
closer. Both share a bias that no number of batches removes: while their statistics are taken, lower
layers are normalized by each batch, at inference by one set of statistics. Flax's average has
m2/n, without n/(n − 1); n counts examples and positions, so it matters in dense layers.

Controls: averages without their start; the same with n/(n − 1); the high rate decayed to 0 by a
cosine, where the weights stand still in the end and the lag should vanish.

| claim | expected |
|---|---|
| population-beats-ema | ratio of distances above 1, largest early and at a high rate |
| population-statistics-classify-better | above 0 early, about 0 late at a low rate |
"""

import dataclasses
import itertools
import math
from pathlib import Path

from bn_research.lab.experiment import Experiment
from bn_research.lab.images import Images, check_network, load_images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.cores import use_cpu_cores
from experiments.population_stats.figures import draw
from experiments.population_stats.grid import LEVELS, best_momentum, grid
from experiments.population_stats.training import Setting, Trainer, choose_rates
from experiments.population_stats.verdicts import judge


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3  # 0, 1, …; the next one chooses the rates and enters no verdict
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    examples: int = 0  # of each split; 0 is all. The whole training set is one batch for the truth
    image_size: int = 0  # height and width the images are resized to; 0 keeps theirs
    network: str = "c8 P c16 P f32 f10"
    batch_sizes: tuple[int, ...] = (16, 64)
    momenta: tuple[float, ...] = (0.9, 0.99, 0.999)  # of the moving averages, Flax's convention
    snapshots: tuple[int, ...] = (10, 40, 160, 640)  # steps at which statistics are measured
    steps_per_dispatch: int = 10
    learning_rates: tuple[float, ...] = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)  # of the tuning
    tuning_steps: int = 160
    population_batches: int = 32  # of Algorithm 2
    most_population_batches: int = 128  # at the last step


PRESETS = {
    "smoke": Config(
        seeds=2,
        examples=256,
        network="c4 P f8 f10",
        batch_sizes=(32,),
        momenta=(0.9, 0.99),
        snapshots=(5, 20),
        steps_per_dispatch=5,
        learning_rates=(1 / 16, 1 / 4),
        tuning_steps=20,
        population_batches=4,
        most_population_batches=8,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        examples=4096,
        image_size=14,
        network="c8 c8 P c16 P f64 f10",
        batch_sizes=(8, 32, 128),
        snapshots=(10, 40, 160, 640, 2560),
        learning_rates=(1 / 1024, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0),
        tuning_steps=320,
    ),
}

_LEAST = {
    "seeds": 1,
    "examples": 0,
    "image_size": 0,
    "steps_per_dispatch": 1,
    "tuning_steps": 1,
    "population_batches": 1,
    "most_population_batches": 2,
}


def prepare(config: Config) -> Images:
    """Checks the config and loads the images; each core becomes a device, for the sweeps."""
    for name, least in _LEAST.items():
        if getattr(config, name) < least:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: at least {least} is needed"
            )
    for name in ("batch_sizes", "momenta", "snapshots", "learning_rates"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"{name}={values} is not allowed: give at least one entry, and each once"
            )
    for name in ("snapshots", "tuning_steps"):
        steps = getattr(config, name)
        for step in steps if isinstance(steps, tuple) else (steps,):
            if step < 1 or step % config.steps_per_dispatch:
                raise ValueError(
                    f"{name}={steps} is not allowed: each must be a positive multiple of "
                    f"steps_per_dispatch={config.steps_per_dispatch}"
                )
    if not all(isinstance(m, float) and 0 < m < 1 for m in config.momenta):
        raise ValueError(f"momenta={config.momenta} is not allowed: each must lie between 0 and 1")
    rates = config.learning_rates
    if not all(isinstance(rate, int | float) and 0 < rate < math.inf for rate in rates):
        raise ValueError(f"learning_rates={rates} is not allowed: each must be a positive number")
    if config.most_population_batches % config.population_batches:
        raise ValueError(
            f"most_population_batches={config.most_population_batches} is not allowed: it must be "
            f"a multiple of population_batches={config.population_batches}"
        )
    use_cpu_cores()
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="standardized",
        size=config.image_size,
        limit=config.examples or None,
    )
    check_network(config.network, images, config.dataset)
    count = len(images.train.label)
    if not all(2 <= size <= count for size in config.batch_sizes):
        raise ValueError(
            f"batch_sizes={config.batch_sizes} is not allowed: each must lie from 2 to {count}"
        )
    return images


def settings(config: Config, batch_size: int, rates: dict[str, float]) -> list[Setting]:
    """Trainings of a batch size, the longest first: the grid, and the control with decay.

    Args:
      config: of the run.
      batch_size: of the trainings.
      rates: by level.
    """
    last, seeds = max(config.snapshots), range(config.seeds)
    constant = itertools.product(sorted(config.snapshots, reverse=True), LEVELS, seeds)
    decayed = [Setting(batch_size, rates["high"], last, s, "high", decay=True) for s in seeds]
    return decayed + [
        Setting(batch_size, rates[level], step, seed, level) for step, level, seed in constant
    ]


def run(config: Config, images: Images, path: Path):
    """Measures what is not yet in the workdir, decides, and draws."""
    steps = len(LEVELS) * sum(config.snapshots) + max(config.snapshots)
    tuning = config.tuning_steps * len(config.learning_rates)
    total = len(config.batch_sizes) * (config.seeds * steps + tuning)
    ledger = Ledger(path / "metrics.jsonl")
    records, rates = [], {}
    with Runner(path, ledger, total_steps=total, strategy="devices") as runner:
        trainer = Trainer(config, images, runner)
        for size in sorted(config.batch_sizes):
            trials = [
                Setting(size, rate, config.tuning_steps, config.seeds)
                for rate in config.learning_rates
            ]
            rates[size] = choose_rates(trainer.tune(trials), images.num_classes)
            chosen = {level: getattr(rates[size], level) for level in LEVELS}
            records += trainer.train(settings(config, size, chosen))
    cells = grid(records).cells
    momentum = best_momentum(cells, config.momenta) if cells else config.momenta[0]
    findings = judge(config, records, rates, images.num_classes)
    return findings, draw(config, cells, momentum, path / "figures")


EXPERIMENT = Experiment(
    __name__,
    title="Which statistics should inference with batch normalization use?",
    presets=PRESETS,
)
