"""Do networks converge faster on whitened inputs?

The notes on Ioffe & Szegedy (2015) recall from LeCun et al. (1998) that networks converge faster
when their inputs are whitened: linearly transformed to zero means and unit variances, and
decorrelated. BN does the first two to every layer and leaves out the third. This experiment holds
the theory of gradient descent to the digit, on linear regression, and then trains a network on real
images as they are, centred, scaled and whitened, each at its own best rate.

    python -m experiments.whitening --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST, 5 seeds: within 10 min on 2 CPU cores

Regression (float64). With H = E[x̃·x̃ᵀ], x̃ = (x, 1), and κ its condition number, gradient descent at
η = 2/(λmax + λmin) contracts the error by (κ − 1)/(κ + 1) a step; a mean μ of the inputs adds an
eigenvalue near ‖μ‖². Steps from 1 to 1e-6 are counted from a start on both extreme eigenvectors.

Images. raw is pixels from 0 to 1, centred x − μ, scaled also divided by each pixel's standard
deviation, zca and pca whitened, all fitted to the training set; ε is relative to the mean variance
of a pixel and the same for the last three (0.1: of 0.001, 0.01, 0.1 and 1 whitening at 0.1 and 1
was fastest in a trial at 14×14). The network is trained by plain SGD from He's initialization, with
and without BN on its hidden layers; each arm takes the rate that reached the target loss in the
fewest steps on a seed apart, from one grid. The loss is that of training, averaged over the last
`window` steps. A first run at standard had whitened images behind scaled ones at the target and
ahead of them at lower losses; since then other losses and ε stand beside it, and the criterion is
as it was.

| claim | expected |
|---|---|
| whitened-inputs-converge-faster | regression as predicted; steps: raw > scaled ≥ whitened |
"""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bn_research.lab.arms import Arm, Trainer
from bn_research.lab.experiment import Experiment
from bn_research.lab.images import Images, check_network, load_images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.models.cnn import NormPlacement
from bn_research.models.spec import parse_spec
from bn_research.training.cores import use_cpu_cores
from bn_research.training.step import Batch
from experiments.whitening.figures import draw
from experiments.whitening.inputs import TRANSFORMS, second_moment, transform_inputs
from experiments.whitening.regression import measure_regression
from experiments.whitening.verdicts import choose, judge, other

PLACEMENTS: tuple[NormPlacement, ...] = ("none", "hidden")  # of BN


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3  # 0, 1, …; the next one chooses the rates and enters no verdict
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    examples: int = 0  # of each split; 0 is all
    image_size: int = 0  # height and width the images are resized to; 0 keeps theirs
    features: int = 16  # of the regression
    condition_numbers: tuple[float, ...] = (1.0, 10.0, 100.0)
    mean_norms: tuple[float, ...] = (0.0, 1.0, 3.0, 10.0)
    regression_examples: int = 128
    epsilon: float = 0.1  # of scaled and whitened images
    other_epsilons: tuple[float, ...] = (0.01, 1.0)  # of ZCA, beside it; no verdict rests on them
    network: str = "f100 f100 f10"
    batch_size: int = 60
    rates: tuple[float, ...] = (0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    target_loss: float = 0.1  # in nats
    other_targets: tuple[float, ...] = (0.3, 0.03, 0.01)  # beside it
    window: int = 10  # steps that the loss is averaged over
    num_steps: int = 400
    steps_per_dispatch: int = 100


PRESETS = {
    "smoke": Config(
        seeds=2,
        examples=256,
        features=4,
        condition_numbers=(1.0, 10.0),
        mean_norms=(0.0, 3.0),
        regression_examples=32,
        network="f8 f10",
        batch_size=32,
        rates=(0.1, 1.0),
        other_epsilons=(1.0,),
        target_loss=2.0,
        other_targets=(1.5,),
        num_steps=40,
        steps_per_dispatch=20,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        features=32,
        condition_numbers=(1.0, 10.0, 100.0, 1000.0),
        regression_examples=256,
        rates=(0.016, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0),
        target_loss=0.5,
        other_targets=(0.7, 0.6, 0.45, 0.4, 0.35, 0.3),
        window=50,
        num_steps=2000,
    ),
}

# The least that each number may be.
_LEAST = {
    "seeds": 1,
    "examples": 0,
    "image_size": 0,
    "features": 2,
    "regression_examples": 3,
    "window": 1,
    "num_steps": 1,
    "steps_per_dispatch": 1,
}


def prepare(config: Config) -> Images:
    """Checks the config and loads the images; each core becomes a device, for the sweeps."""
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{name}={value} is not allowed: at least {least} is needed")
    for name in ("condition_numbers", "mean_norms", "rates"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}={values} is not allowed: give at least one, each once")
    if not all(1 <= kappa < math.inf for kappa in config.condition_numbers):
        raise ValueError(f"condition_numbers={config.condition_numbers}: each must be ≥ 1")
    if not all(0 <= norm < math.inf for norm in config.mean_norms):
        raise ValueError(f"mean_norms={config.mean_norms}: each must be ≥ 0")
    if not all(0 < rate < math.inf for rate in config.rates):
        raise ValueError(f"rates={config.rates} is not allowed: each must be positive")
    if config.regression_examples <= config.features:
        raise ValueError(
            f"regression_examples={config.regression_examples} is not allowed: more than "
            f"features={config.features} are needed for a covariance of full rank"
        )
    epsilons = (config.epsilon, *config.other_epsilons)
    if not all(0 <= e < math.inf for e in epsilons) or len(set(epsilons)) < len(epsilons):
        raise ValueError(
            f"epsilon={config.epsilon} with other_epsilons={config.other_epsilons} is not allowed: "
            "each must be ≥ 0, all of them different"
        )
    targets = (config.target_loss, *config.other_targets)
    if not all(0 < t < math.inf for t in targets) or len(set(targets)) < len(targets):
        raise ValueError(
            f"target_loss={config.target_loss} with other_targets={config.other_targets} is not "
            "allowed: each must be positive, all of them different"
        )
    if config.num_steps % config.steps_per_dispatch or config.window > config.num_steps:
        raise ValueError(
            f"num_steps={config.num_steps} is not allowed: it must be a multiple of "
            f"steps_per_dispatch={config.steps_per_dispatch} and at least window={config.window}"
        )
    parse_spec(config.network)
    use_cpu_cores()
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="unit",
        size=config.image_size,
        limit=config.examples or None,
    )
    check_network(config.network, images, config.dataset)
    count = len(images.train.label)
    if not 2 <= config.batch_size <= count:
        raise ValueError(f"batch_size={config.batch_size} must lie between 2 and {count}")
    return images


def run(config: Config, images: Images, path: Path):
    """Measures what is not yet in the workdir, decides, and draws."""
    ledger = Ledger(path / "metrics.jsonl")
    kinds = {name: (name, config.epsilon) for name in TRANSFORMS}
    kinds |= {other(epsilon): ("zca", epsilon) for epsilon in config.other_epsilons}
    arms = len(kinds) * len(PLACEMENTS)
    total = arms * (len(config.rates) + config.seeds) * config.num_steps
    trained = []
    with Runner(path, ledger, total_steps=total, strategy="devices") as runner:
        regressions = [
            runner.get(
                f"regression seed={seed}",
                functools.partial(
                    measure_regression,
                    seed,
                    features=config.features,
                    condition_numbers=config.condition_numbers,
                    mean_norms=config.mean_norms,
                    examples=config.regression_examples,
                ),
            )
            for seed in range(config.seeds)
        ]
        spectra = {}
        for name, (transform, epsilon) in kinds.items():
            transformed = _transformed(images, transform, epsilon)
            spectra[name] = runner.get(
                f"second moment {name}", functools.partial(_second_moment, transformed)
            )
            trainer = Trainer(
                transformed, runner, steps_per_dispatch=config.steps_per_dispatch, tag=name
            )
            trained += _train(config, trainer, name)
    findings = [judge(config, regressions, spectra, trained)]
    return findings, draw(config, regressions, spectra, trained, path / "figures")


def _train(config: Config, trainer: Trainer, name: str) -> list[dict]:
    """Records of both placements on one kind of inputs, each at its best rate."""
    arms = {
        (placement, rate): Arm(
            config.network,
            placement,
            initializer="he",
            use_bias=True,
            batch_size=config.batch_size,
            learning_rate=rate,
            num_steps=config.num_steps,
        )
        for placement, rate in itertools.product(PLACEMENTS, config.rates)
    }
    trials = trainer.tune([(arm, config.seeds) for arm in arms.values()])
    best = {
        placement: choose(config, [trial for trial in trials if trial["placement"] == placement])
        for placement in PLACEMENTS
    }
    runs = [
        (arms[placement, best[placement]], seed)
        for placement in PLACEMENTS
        for seed in range(config.seeds)
    ]
    return [{**record, "inputs": name} for record in trainer.train(runs)]


def _second_moment(images: Images) -> dict[str, float]:
    return second_moment(np.asarray(images.train.image))._asdict()


def _transformed(images: Images, name: str, epsilon: float) -> Images:
    train, test = transform_inputs(
        np.asarray(images.train.image), np.asarray(images.test.image), name, epsilon=epsilon
    )
    return images._replace(
        train=Batch(jnp.asarray(train), images.train.label),
        test=Batch(jnp.asarray(test), images.test.label),
    )


EXPERIMENT = Experiment(
    __name__,
    title="Do networks converge faster on whitened inputs?",
    presets=PRESETS,
)
