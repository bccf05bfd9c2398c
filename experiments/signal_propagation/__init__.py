"""Where do deep networks with batch normalization fail at initialization all the same?

Ioffe & Szegedy (2015, section 3.3) conjecture that BN leads the Jacobians of layers to have
singular values near 1, which keeps gradients in range. Mean-field theory says the opposite: without
skip connections BN itself makes gradients explode with depth. This experiment measures gradients,
variances and ranks of networks before training, against theory, and then trains plain and residual
networks of growing depth to see what comes of it.

    python -m experiments.signal_propagation --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, narrow and shallow: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 seeds: within 10 min on 2 CPU cores

Gradients: layers h ← W·φ(BN(h)) with Gaussian weights, Gaussian input and a Gaussian gradient at
the top; no bias, ε = 0. The mean-field growth of the squared gradient norm per layer is derived in
`signal_propagation_theory`: (B − 2)/(B − 3) without φ, and for ReLU a closed form that falls to
π/(π − 1) as the batch grows. Control: He initialization without BN, where it is 1.

Residual stream: x ← x + W·relu(BN(x)) against x ← x + W·relu(x), weights of variance 2/n, input of
variance 1. Variance is the mean square over units and examples. 2^l is a law of wide layers: the
mean over networks of n units lies above it, at l = 12 by about 7/n (21 %, 10 % and 5 % for n = 32,
64 and 128). A first run at standard, 12 layers of 256 units, was inconclusive for that (0.8 to
5.1 %), and one at quick, 96 networks a seed, for the scatter (−1.8 to 5.6 %). Since then there are
more networks, wider and less deep; the criterion is as it was.

Ranks: linear networks of d units on d examples, h ← BN(W·h) against h ← W·h. Soft rank is the
participation ratio (Σλ)²/Σλ² of HHᵀ, a lower bound of the rank, and beside it the number of λ at
least τ = 0.5 times their mean (Daneshmand et al., 2020). That the depth must be many times d for
the collapse follows from the Lyapunov exponents of Gaussian products: the two largest are 1/(2d)
apart, so that the second λ falls as exp(−l/d) of the first.

Training: momentum SGD; plain and residual networks have the same parameters and take their rate
from the same grid, by training loss on a seed apart.

| claim | expected |
|---|---|
| gradient-explosion | within 3 % of theory: 1.79 at batch 8, 1.48 at batch 128 |
| residual-variance | within 5 % of 1 + l and of 2^l |
| rank-collapse | without BN 1; with BN an exponent of at least 0.5 in d |
| deep-bn-untrainable | plain near chance at the largest depth, residual not |
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bn_research.lab.experiment import Experiment
from bn_research.lab.images import Images, load_images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.cores import use_cpu_cores
from experiments.signal_propagation import measurements, training, verdicts
from experiments.signal_propagation.figures import draw
from experiments.signal_propagation.theory import LEAST_BATCH, growth


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3  # 0, 1, …
    dataset: str = "digits"  # of the training; all else has Gaussian input
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    image_size: int = 0  # height and width the images are resized to; 0 keeps theirs
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64, 128)  # of the gradients
    gradient_width: int = 1024
    gradient_depth: int = 32
    residual_width: int = 512
    residual_depth: int = 8
    residual_networks: int = 160  # a seed: their mean tells the law from its scatter
    residual_batch: int = 64
    rank_widths: tuple[int, ...] = (8, 16, 32, 64)  # d, units and examples alike
    rank_depth: int = 1280  # many times the largest width
    train_width: int = 64
    train_depths: tuple[int, ...] = (5, 10, 20, 40)
    learning_rates: tuple[float, ...] = (
        0.001,
        0.003,
        0.01,
        0.03,
        0.1,
    )  # both arms choose from them
    batch_size: int = 32  # of the training
    num_steps: int = 300
    steps_per_dispatch: int = 50


PRESETS = {
    "smoke": Config(
        seeds=2,
        batch_sizes=(4, 8),
        gradient_width=32,
        gradient_depth=8,
        residual_width=16,
        residual_depth=3,
        residual_networks=4,
        residual_batch=8,
        rank_widths=(4, 8),
        rank_depth=40,
        train_width=8,
        train_depths=(1, 3),
        learning_rates=(0.01, 0.1),
        num_steps=10,
        steps_per_dispatch=5,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        gradient_depth=40,
        residual_width=1024,
        residual_depth=10,
        residual_networks=64,
        rank_widths=(8, 16, 32, 64, 128),
        rank_depth=2560,
        train_width=100,
        train_depths=(5, 10, 20, 40, 80),
        learning_rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
        batch_size=64,
        num_steps=500,
    ),
}

# The least that each number may be; of a tuple, each of its entries.
_LEAST = {
    "seeds": 1,
    "image_size": 0,
    "batch_sizes": LEAST_BATCH,  # E[1/σ²] is infinite below
    "gradient_width": 2,
    "gradient_depth": 8,  # below there are no middle layers
    "residual_width": 2,
    "residual_depth": 1,
    "residual_networks": 1,
    "residual_batch": LEAST_BATCH,
    "rank_widths": LEAST_BATCH,
    "rank_depth": 2,
    "train_width": 2,
    "train_depths": 1,
    "num_steps": 1,
    "steps_per_dispatch": 1,
}
_LEAST_ENTRIES = {"batch_sizes": 1, "rank_widths": 2, "train_depths": 2, "learning_rates": 1}


_MOST_DOUBLINGS = 100  # of a squared norm; float32 ends at 2^128


def prepare(config: Config) -> Images:
    """Checks the config and loads the images; each core becomes a device, for the sweeps."""
    for name, entries in _LEAST_ENTRIES.items():
        values = getattr(config, name)
        if len(values) < entries or len(set(values)) < len(values):
            raise ValueError(
                f"{name}={values} is not allowed: give {entries} or more, all of them different"
            )
    for name, least in _LEAST.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int) or number < least:
                raise ValueError(
                    f"{name}={value} is not allowed: whole numbers from {least} up are needed"
                )
    if config.num_steps % config.steps_per_dispatch:
        raise ValueError(
            f"num_steps={config.num_steps} is not allowed: it must be a multiple of "
            f"steps_per_dispatch={config.steps_per_dispatch}"
        )
    rates = config.learning_rates
    if not all(isinstance(rate, int | float) and 0 < rate < math.inf for rate in rates):
        raise ValueError(f"learning_rates={rates} is not allowed: give positive numbers")
    if config.residual_depth > _MOST_DOUBLINGS:
        raise ValueError(
            f"residual_depth={config.residual_depth} is not allowed: 2^l leaves float32's range, "
            f"so at most {_MOST_DOUBLINGS} layers"
        )
    least_batch = min(config.batch_sizes)
    deepest = int(_MOST_DOUBLINGS / math.log2(growth("relu", least_batch)))
    if config.gradient_depth > deepest:
        raise ValueError(
            f"gradient_depth={config.gradient_depth} is not allowed: gradients leave float32's "
            f"range, so at most {deepest} layers at a batch of {least_batch}"
        )
    use_cpu_cores()
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="standardized",
        size=config.image_size,
    )
    count = len(images.train.label)
    if not 1 < config.batch_size <= count:
        raise ValueError(
            f"batch_size={config.batch_size} is not allowed: it must lie between 2 and {count}, "
            "the number of training examples"
        )
    return images


def run(config: Config, images: Images, path: Path):
    """Measures what is not yet in the workdir, decides, and draws."""
    seeds = range(config.seeds)
    runs = 2 * len(config.train_depths) * (len(config.learning_rates) + config.seeds)
    with Runner(
        path,
        Ledger(path / "metrics.jsonl"),
        total_steps=runs * config.num_steps,
        strategy="devices",
    ) as runner:

        def get(name: str, measure: Callable[..., Mapping[str, Any]], *arguments):
            return runner.get(name, functools.partial(measure, *arguments))

        gradients = [
            get(f"gradients seed={seed}", measurements.measure_gradients, config, seed)
            for seed in seeds
        ]
        jacobians = [
            get(f"Jacobian seed={seed}", measurements.measure_jacobian, seed) for seed in seeds
        ]
        residuals = [
            get(f"residual stream seed={seed}", measurements.measure_residual, config, seed)
            for seed in seeds
        ]
        ranks = [
            get(f"rank d={d} seed={seed}", measurements.measure_ranks, config, d, seed)
            for d, seed in itertools.product(config.rank_widths, seeds)
        ]
        trainer = training.Trainer(
            images,
            runner,
            width=config.train_width,
            batch_size=config.batch_size,
            num_steps=config.num_steps,
            steps_per_dispatch=config.steps_per_dispatch,
        )
        trained = []
        for depth in sorted(config.train_depths):
            trials = [
                training.Setting(residual, rate, training.TUNING_SEED)
                for residual in (False, True)
                for rate in config.learning_rates
            ]
            tuned = trainer.tune(depth, trials)
            rates = {
                residual: training.choose_rate([r for r in tuned if r["residual"] == residual])
                for residual in (False, True)
            }
            trained += trainer.train(
                depth,
                [
                    training.Setting(residual, rates[residual], seed)
                    for residual in (False, True)
                    for seed in seeds
                ],
            )
    findings = [
        verdicts.judge_gradients(config, gradients, jacobians),
        verdicts.judge_residual(config, residuals),
        verdicts.judge_ranks(config, ranks),
        verdicts.judge_training(config, trained),
    ]
    records = {
        "gradients": gradients,
        "jacobians": jacobians,
        "residuals": residuals,
        "ranks": ranks,
        "trained": trained,
    }
    num_classes = images.num_classes
    return findings, draw(config, records, num_classes, path / "figures")


CLAIMS = verdicts.CLAIMS

EXPERIMENT = Experiment(
    __name__,
    title="Where do deep BN networks fail at initialization?",
    presets=PRESETS,
)
