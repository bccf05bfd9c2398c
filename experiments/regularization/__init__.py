"""Why does batch normalization regularize?

"One thing remained unclear", say the notes on Ioffe & Szegedy's paper. The paper's own words are
that "a training example is seen in conjunction with other examples in the mini-batch": its
normalized value is noisy. This experiment measures how noisy, changes the noise alone and watches
the generalization gap, and asks whether BN makes dropout needless.

    python -m experiments.regularization --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14: within 40 min on 2 CPU cores

Three parts, each told in its own file:

    regularization_noise    how noisy x̂ is given x: exact, by the law, and in trained networks
    regularization_groups   the noise alone is changed: who shares statistics, and with whom;
                            population statistics with no noise, or with noise that is drawn
    regularization_dropout  BN × dropout, tuned in each cell; the variance shift of dropout below BN

Networks have BN on their hidden layers, as the paper's; momentum SGD whose rate a cosine takes to
0. Settings are chosen by a validation set, on seeds that enter no verdict. Every accuracy is that
of inference by population statistics (algorithm 2).

With x̃ = (x − μ)/σ, normalized by the population of skewness γ₁ and kurtosis κ, and m examples that
share statistics, to first order

    Var(x̂ | x) = (1 + γ₁·x̃ + (κ − 1)·x̃²/4)/m    which for Gaussian features is (1 + x̃²/2)/m

| claim | expected |
|---|---|
| batch-noise-law | within 10 % for m ≥ 128 |
| batch-noise-law-of-real-features | likewise, with each feature's own γ₁ and κ |
| pixels-are-not-examples | a batch of m images counts as fewer than m·h·w examples |
| batch-noise-regularizes | the gap grows with the group; drawn noise has half the effect |
| batch-noise-regularizes-by-loss | likewise |
| reshuffling-regularizes | about 1 point (paper) |
| less-need-for-dropout | dropout gains less with BN |
| dropout-before-bn-shifts-variance | BN above dropout sees another variance in inference |
"""

import dataclasses
from pathlib import Path

from bn_research.lab.experiment import Experiment
from bn_research.lab.images import Images, check_network, load_images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.cores import use_cpu_cores
from experiments.regularization import dropout, groups, noise, noise_figures
from experiments.regularization.data import split


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run; those of one part begin with its name."""

    seeds: int = 3  # 0, 1, …; settings are chosen on others
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    image_size: int = 0  # height and width the images are resized to; 0 keeps theirs
    train_examples: int = 512  # at most; few, so that the networks can overfit
    validation_examples: int = 256  # after them in the training split: settings are chosen by these
    test_examples: int = 899
    compiler_level: int = 1  # XLA's optimization, 0 to 3: less compiles faster and steps slower

    law_network: str = "c8 P c16 f32 f32 f10"
    law_images: int = 10_000  # of the training split, at most: the population
    law_batch_size: int = 64
    law_rate: float = 0.05
    law_steps: int = 200
    law_steps_per_dispatch: int = 50
    law_sizes: tuple[int, ...] = (8, 32, 128, 256)  # m
    law_points: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # x̃ of Gaussian samples
    law_samples: int = 40_000  # batches of Gaussian samples
    law_batches: int = 1000  # of images
    law_examples: int = 64  # whose variance is measured

    groups_network: str = "f64 f64 f10"
    groups_examples: int = 512  # of the training set
    groups_sizes: tuple[int, ...] = (8, 32, 256)  # examples that share statistics; the SGD batch
    groups_size: int = 8  # g*: of the arms whose groups are frozen, or whose noise is drawn
    groups_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    groups_slower: float = 0.0  # divides the rate of a second ladder; 0 is none
    groups_steps: int = 100
    groups_steps_per_dispatch: int = 20
    groups_tuning_seeds: int = 1
    groups_seeds: int = 3

    dropout_network: str = "f64 f64 f10"
    dropout_placement: str = "last"  # of the two by two
    dropout_rates: tuple[float, ...] = (0.3, 0.6)
    dropout_learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    dropout_shift_rate: float = 0.5  # where the variance shift is measured
    dropout_examples: int = 512  # of the training set
    dropout_batch_size: int = 64
    dropout_steps: int = 300
    dropout_steps_per_dispatch: int = 100
    dropout_tuning_seeds: int = 1
    dropout_seeds: int = 5  # of the two by two


PRESETS = {
    "smoke": Config(
        seeds=2,
        # All sets, and the networks of two parts, are alike: programs take the time.
        train_examples=128,
        validation_examples=128,
        test_examples=128,
        compiler_level=0,
        law_network="c4 P c4 f8 f10",
        law_images=400,
        law_steps=10,
        law_steps_per_dispatch=5,
        law_sizes=(8, 128),
        law_points=(0.0, 2.0),
        law_samples=500,
        law_batches=100,
        law_examples=16,
        groups_network="f16 f16 f10",
        groups_examples=128,
        groups_sizes=(4, 32),
        groups_size=4,
        groups_rates=(0.1,),
        groups_steps=4,
        groups_steps_per_dispatch=2,
        groups_tuning_seeds=2,  # as many as of the rest: so many lanes are one program
        groups_seeds=2,
        dropout_network="f16 f16 f10",
        dropout_rates=(0.5,),
        dropout_learning_rates=(0.1,),
        dropout_examples=128,
        dropout_batch_size=32,
        dropout_steps=20,
        dropout_steps_per_dispatch=10,
        dropout_tuning_seeds=2,
        dropout_seeds=2,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        train_examples=2048,
        validation_examples=5000,
        test_examples=10_000,
        law_network="c16 P c32 c32 P f64 f64 f10",
        law_steps=600,
        law_steps_per_dispatch=100,
        law_sizes=(8, 32, 128, 512, 1024),
        law_samples=20_000,
        law_batches=4000,
        groups_network="f256 f256 f256 f10",
        groups_examples=2048,
        groups_sizes=(8, 16, 32, 64, 128, 256, 512),
        groups_size=16,
        groups_rates=(0.01, 0.03, 0.1, 0.3),
        groups_slower=4.0,
        groups_steps=600,
        groups_steps_per_dispatch=100,
        groups_tuning_seeds=2,
        groups_seeds=10,
        dropout_network="f512 f512 f10",
        dropout_rates=(0.2, 0.4, 0.6, 0.8),
        dropout_learning_rates=(0.002, 0.006, 0.02, 0.06),
        dropout_examples=1000,
        dropout_steps=1200,
        dropout_steps_per_dispatch=400,
        dropout_tuning_seeds=3,
        dropout_seeds=30,
    ),
}

_PARTS = (noise, groups, dropout)


def prepare(config: Config) -> Images:
    """Checks the config and loads the images; each core becomes a device, for the sweeps."""
    for name, least in (
        ("seeds", 1),
        ("image_size", 0),
        ("train_examples", 2),
        ("validation_examples", 1),
        ("test_examples", 1),
        ("compiler_level", 0),
    ):
        value = getattr(config, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value} is not allowed: a whole number from {least} up")
    for part in _PARTS:
        part.check(config)
    use_cpu_cores()
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="standardized",
        size=config.image_size,
    )
    whole, used = len(images.train.label), config.train_examples + config.validation_examples
    if used > whole:
        raise ValueError(
            f"train_examples={config.train_examples} and validation_examples="
            f"{config.validation_examples} are not allowed: {config.dataset} has {whole} together"
        )
    if config.test_examples > len(images.test.label):
        raise ValueError(
            f"test_examples={config.test_examples} is not allowed: {config.dataset} has "
            f"{len(images.test.label)}"
        )
    for name in ("groups_examples", "dropout_examples"):
        if getattr(config, name) > config.train_examples:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: at most "
                f"train_examples={config.train_examples}"
            )
    noise.check_images(config, images)
    for network in (config.groups_network, config.dropout_network):
        check_network(network, images, config.dataset)
    return images


def run(config: Config, images: Images, path: Path):
    """Trains and measures what is not yet in the workdir, decides, and draws."""
    data = split(
        images,
        train=config.train_examples,
        validation=config.validation_examples,
        test=config.test_examples,
    )
    ledger, total = Ledger(path / "metrics.jsonl"), sum(part.total_steps(config) for part in _PARTS)
    with Runner(path, ledger, total_steps=total, strategy="devices") as runner:
        law = noise.measure(config, images, runner)
        by_group = groups.measure(config, data, runner)
        cells = dropout.measure(config, data, runner)
    findings = [
        *noise.judge(config, law),
        *groups.judge(config, by_group),
        *dropout.judge(config, cells),
    ]
    folder = path / "figures"
    return findings, [
        *groups.draw(config, by_group, folder),
        *noise_figures.draw(config, law, folder),
        *dropout.draw(config, cells, folder),
    ]


CLAIMS = (*noise.CLAIMS, *groups.CLAIMS, *dropout.CLAIMS)

EXPERIMENT = Experiment(
    __name__,
    title="Why does batch normalization regularize?",
    presets=PRESETS,
)
