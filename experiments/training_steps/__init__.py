"""How many times fewer training steps does batch normalization need, and what makes them fewer?

Ioffe & Szegedy (2015, section 4.2) train Inception on ImageNet to 72.2 % in 31 million steps. With
BN alone the same network gets there in 2.3 times fewer; with BN, five times the learning rate and
six more changes in 14.8 times fewer; at thirty times the rate in 11.5 times fewer, and it ends
higher. "14 times fewer steps" is thus the work of eight changes together, and was measured against
a network whose rate is that of the authors. This experiment trains the paper's ladder of networks
on small images, against plain Inception at the same rate and at its own best rate, and makes each
change alone.

    python -m experiments.training_steps --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, one module: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds, the ladder alone: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 seeds, ladder and changes: within 22 min on 2 CPU cores

Network: Inception of figure 5 with fewer modules and channels and a stem for small images;
momentum SGD, batch 32. The ladder, where each network keeps what stands above it:

    Inception      rate η, dropout 0.4, L2 λ, rate·exp(−δt), local response normalization (LRN),
                   photometric distortion, and mini-batches that are drawn once
    BN-Baseline    BN after every convolution; nothing else
    BN-x5          rate 5η; no dropout; λ/5; 6δ; no LRN; examples shuffled anew in every epoch, so
                   that they meet other ones; weaker distortion
    BN-x30         rate 30η
    BN-x5-Sigmoid  BN-x5 with sigmoids

The paper gives factors for rate, L2 and decay but no values besides η; those here are the config's.
η is fixed before the run and below the plain network's best rate (0.03 to 0.1 in pilots of one
seed), as the paper's is the authors' choice and not the best of a search. Since a slow baseline
flatters BN, ratios are given against plain Inception at its own best rate too, chosen by training
loss on a seed apart; and of BN-Baseline at its own best rate from the same grid.

Steps to a target: the first evaluation at which the test accuracy (running statistics) is at least
the best one of plain Inception with the same seed. Plain gets there at its own best step, which
noise in a maximum delays; so the steps to 95 % of that target stand beside it. A network that never
gets there has needed more steps than it was given: a bound, never left out.

| claim | expected |
|---|---|
| fewer-steps-same-rate | 2.3 times (ImageNet); at least 1.5 |
| fewer-steps-tuned | 14.8 times; at least 3, and fewer than plain at its own best rate |
| fewer-steps-x30 | 11.5 times; likewise, and it ends higher than BN-x5 |
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from bn_research.lab.experiment import Experiment
from bn_research.lab.images import Images, load_images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.cores import use_cpu_cores
from experiments.training_steps import training, verdicts
from experiments.training_steps.arms import (
    BASELINE,
    PLAIN,
    TUNED,
    TUNED_BN,
    TUNING_SEED,
    X5,
    Setting,
    ladder,
    switched,
)
from experiments.training_steps.figures import draw


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3  # 0, 1, …
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    image_size: int = 0  # height and width the images are resized to; 0 keeps theirs
    train_examples: int = 800  # few enough for many epochs, as in the paper
    eval_examples: int = 400  # of the test set, at most
    width: float = 0.0625  # times the channels of figure 5
    modules: tuple[str, ...] = ("3a", "3c")  # of figure 5
    batch_size: int = 32
    num_steps: int = 500
    steps_per_dispatch: int = 10  # after each the test set is seen
    base_rate: float = 0.01  # of Inception and BN-Baseline; fixed before the run
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)  # for plain's own best
    final_rate: float = 0.1  # of Inception, over its first
    l2: float = 5e-4
    dropout: float = 0.4
    distortion: float = 0.5  # factors of contrast and brightness within 1 ± this
    weaker_distortion: float = 0.25
    switches: bool = False  # make each change alone, too
    timing_rounds: int = 7  # of seconds per step
    compiler_level: int = 1  # XLA's optimization, 0 to 3: less compiles faster and steps slower


PRESETS = {
    "smoke": Config(
        seeds=2,
        train_examples=96,
        eval_examples=50,
        width=0.03125,
        modules=("3c",),
        num_steps=20,
        steps_per_dispatch=5,
        learning_rates=(0.003, 0.03),
        timing_rounds=1,
        compiler_level=0,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        train_examples=6400,
        eval_examples=1000,
        width=0.125,
        modules=("3a", "3c", "4a", "5b"),
        num_steps=1500,
        steps_per_dispatch=25,
        learning_rates=(0.003, 0.01, 0.03, 0.1, 0.3),
        switches=True,
    ),
}

_WHOLE = {  # the least that each number may be
    "seeds": 1,
    "image_size": 0,
    "train_examples": 2,
    "eval_examples": 1,
    "batch_size": 2,  # one example has no variance
    "num_steps": 1,
    "steps_per_dispatch": 1,
    "timing_rounds": 1,
    "compiler_level": 0,
}
_POSITIVE = ("width", "base_rate", "final_rate")


def prepare(config: Config) -> Images:
    """Checks the config and loads the images; each core becomes a device, for the sweeps."""
    for name, least in _WHOLE.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value} is not allowed: a whole number from {least} up")
    for name in _POSITIVE:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} is not allowed: it must be positive and finite")
    if config.final_rate > 1:
        raise ValueError(f"final_rate={config.final_rate} is not allowed: at most 1, no decay")
    if not 0 <= config.l2 < math.inf:
        raise ValueError(f"l2={config.l2} is not allowed: it must be 0 or more, and finite")
    for name in ("dropout", "distortion", "weaker_distortion"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} is not allowed: it must be in [0, 1)")
    if config.weaker_distortion > config.distortion:
        raise ValueError(
            f"weaker_distortion={config.weaker_distortion} is not allowed: at most "
            f"distortion={config.distortion}"
        )
    if config.num_steps % config.steps_per_dispatch:
        raise ValueError(
            f"num_steps={config.num_steps} is not allowed: it must be a multiple of "
            f"steps_per_dispatch={config.steps_per_dispatch}"
        )
    rates = config.learning_rates
    if not rates or len(set(rates)) < len(rates):
        raise ValueError(f"learning_rates={rates} is not allowed: give one or more, all different")
    if not all(isinstance(rate, int | float) and 0 < rate < math.inf for rate in rates):
        raise ValueError(f"learning_rates={rates} is not allowed: give positive numbers")
    use_cpu_cores()
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="unit",
        size=config.image_size,
    )
    for split, count in (
        (images.train, "train_examples"),
        (images.test, "eval_examples"),
    ):
        if getattr(config, count) > len(split.label):
            raise ValueError(
                f"{count}={getattr(config, count)} is not allowed: {config.dataset} has "
                f"{len(split.label)}"
            )
    if config.batch_size > config.train_examples:
        raise ValueError(
            f"batch_size={config.batch_size} is not allowed: it must lie between 2 and "
            f"train_examples={config.train_examples}"
        )
    train = jax.tree.map(lambda leaf: leaf[: config.train_examples], images.train)
    images = images._replace(train=train)
    model = training.make_model(_network(config, images), ladder(config)[PLAIN].static)
    sample = jax.ShapeDtypeStruct((1, *train.image.shape[1:]), jnp.float32)
    # Modules that are unknown, and images too small for them, are refused here.
    jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), sample)
    return images


def _network(config: Config, images: Images) -> training.Network:
    return training.Network(
        num_classes=images.num_classes,
        width=config.width,
        modules=tuple(config.modules),
        batch_size=config.batch_size,
        steps_per_dispatch=config.steps_per_dispatch,
        image_shape=images.train.image.shape[1:],
        lanes=config.seeds,  # each arm has so many members or more: one program for all its sweeps
        compiler_level=config.compiler_level,
    )


def plan(config: Config) -> dict[str, Setting]:
    """The networks that are trained for each seed, by name; tuned ones are chosen in the run."""
    return {**ladder(config), **(switched(config) if config.switches else {})}


def run(config: Config, images: Images, path: Path):
    """Trains what is not yet in the workdir, decides, and draws."""
    ledger, seeds = Ledger(path / "metrics.jsonl"), range(config.seeds)
    settings = plan(config)
    total = 2 * len(config.learning_rates) + (len(settings) + 2) * config.seeds
    with Runner(path, ledger, total_steps=total * config.num_steps, strategy="devices") as runner:
        trainer = training.Trainer(
            runner,
            _network(config, images),
            training.place(images, config.eval_examples),
            config.num_steps,
        )
        timed = {name: settings[name] for name in (PLAIN, BASELINE, X5)}
        seconds = runner.get(
            "seconds per step",
            functools.partial(trainer.time_steps, timed, config.timing_rounds),
        )
        for name, setting in ((TUNED, settings[PLAIN]), (TUNED_BN, settings[BASELINE])):
            trials = trainer.train(
                [
                    training.Run("tuning", setting._replace(rate=rate), TUNING_SEED)
                    for rate in config.learning_rates
                ]
            )
            settings[name] = setting._replace(rate=training.choose_rate(trials))
        runs = [
            training.Run(name, setting, seed)
            for name, setting in settings.items()
            for seed in seeds
        ]
        trained = trainer.train(runs)
    records = {name: [r for r in trained if r["arm"] == name] for name in settings}
    findings = verdicts.judge(config, records, seconds, images.num_classes)
    return findings, draw(config, records, path / "figures")


CLAIMS = verdicts.CLAIMS

EXPERIMENT = Experiment(
    __name__,
    title="How many times fewer training steps with batch normalization?",
    presets=PRESETS,
)
