"""Why can a network with batch normalization take larger steps: is its loss surface smoother?

Santurkar et al. (2018) answer that BN does not work by reducing internal covariate shift but by
making the loss smoother: along a training step, loss and gradient change less with BN than without.
This experiment measures both along the steps of plain SGD, up to four times their length, and the
largest eigenvalue λmax of the Hessian, with and without BN, at the same learning rate (the plain
network's best, and the next lower one) and with each network at its own best rate. It then asks
whether λmax at the start says how large a rate a network takes, as it would for a quadratic, and
whether it settles at 2 over the rate during training.

    python -m experiments.loss_surface --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, a tiny network: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 seeds: within 6 min on 2 CPU cores

Networks are convolutional, without skip connections, with biases and He's initialization; BN stands
on all layers but the head. SGD has no momentum, as in the paper's measurement, so that the step is
−η times the gradient. Every measurement of a dispatch is of the state that it begins with: loss and
gradient at ½ to 4 times the step, on the very batch that gives the step.

λmax is of one fixed batch, by Lanczos. With BN there are two Hessians: of training, where the
statistics of the batch are differentiated through, and of a network whose statistics are frozen,
where BN is a fixed affine map. Gradient descent on that batch is governed by the first. On a
quadratic it is stable for rates below 2/λmax. Networks are no quadratics: a ReLU network that is
thrown out may land where λmax is smaller (Lewkowycz et al., 2020), so that a rate is called stable
here if it trains. A scale-invariant weight that is thrown out has grown, and its curvature has
fallen as the square of its norm.

| claim | expected |
|---|---|
| smoother-along-the-step | ranges of loss and of gradient smaller with BN at the same rate |
| sharpness-sets-the-rate | 1/λmax larger with BN, by as much as the largest stable rate |
| edge-of-stability | rate·λmax about 2 at the end, without BN |
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.lab.experiment import Experiment
from bn_research.lab.images import Images, check_network, load_images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.models.cnn import NormPlacement
from bn_research.training.cores import use_cpu_cores
from experiments.loss_surface import verdicts
from experiments.loss_surface.figures import draw
from experiments.loss_surface.summaries import final_loss, sharpness_at_start
from experiments.loss_surface.training import Network, Program, Run, train


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3  # 0, 1, …; the next one chooses the rates and enters no verdict
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    image_size: int = 0  # height and width the images are resized to; 0 keeps theirs
    network: str = "c8 c8 P c16 P f32 f10"
    batch_size: int = 64  # of SGD
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)  # of SGD, both arms choose from them
    num_steps: int = 200  # of SGD
    steps_per_dispatch: int = 10  # the surface is measured before the first of them
    curvature_steps: tuple[int, ...] = (0, 50, 190)  # of SGD, at which λmax is measured
    num_iterations: int = 12  # of Lanczos
    fixed_examples: int = 256  # of the batch of λmax and of gradient descent
    descent_factors: tuple[float, ...] = (1, 4, 8, 16, 32, 64, 128)  # times 2/λmax
    descent_steps: int = 40
    edge_factor: float = 2.0  # likewise, of the descent along which λmax is followed
    edge_steps: int = 100


PRESETS = {
    "smoke": Config(
        seeds=2,
        network="c4 P f10",
        batch_size=16,
        rates=(0.1, 0.3),
        num_steps=6,
        steps_per_dispatch=2,
        curvature_steps=(0, 4),
        num_iterations=3,
        fixed_examples=32,
        descent_factors=(4.0,),
        descent_steps=4,
        edge_steps=6,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        network="c8 c8 P c16 c16 P f64 f64 f10",
        rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        num_steps=500,
        steps_per_dispatch=20,
        curvature_steps=(0, 120, 480),
        descent_factors=(1, 8, 11, 16, 23, 32, 45, 64, 91, 128),
        edge_steps=300,
    ),
}

_PLACEMENTS: dict[str, NormPlacement] = {"plain": "none", "BN": "hidden"}
_LEAST = {
    "seeds": 1,
    "image_size": 0,
    "num_steps": 1,
    "steps_per_dispatch": 1,
    "curvature_steps": 0,
    "num_iterations": 1,
    "descent_steps": 1,
    "edge_steps": 1,
}


def prepare(config: Config) -> Images:
    """Checks the config and loads the images; each core becomes a device, for the sweeps."""
    for name, least in _LEAST.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int) or number < least:
                raise ValueError(
                    f"{name}={value} is not allowed: whole numbers from {least} up are needed"
                )
    for name in ("num_steps", "descent_steps", "edge_steps"):
        if getattr(config, name) % config.steps_per_dispatch:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: it must be a multiple of "
                f"steps_per_dispatch={config.steps_per_dispatch}"
            )
    for name in ("rates", "descent_factors", "curvature_steps"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}={values} is not allowed: give one or more, all different")
    for name in ("rates", "descent_factors"):
        values = getattr(config, name)
        if not all(isinstance(v, int | float) and 0 < v < math.inf for v in values):
            raise ValueError(f"{name}={values} is not allowed: give positive numbers")
    if not 0 < config.edge_factor < math.inf:
        raise ValueError(f"edge_factor={config.edge_factor} is not allowed: it must be positive")
    begun = range(0, config.num_steps, config.steps_per_dispatch)
    if 0 not in config.curvature_steps or not set(config.curvature_steps) <= set(begun):
        raise ValueError(
            f"curvature_steps={config.curvature_steps} is not allowed: 0 and multiples of "
            f"steps_per_dispatch={config.steps_per_dispatch} below num_steps={config.num_steps}"
        )
    use_cpu_cores()
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="standardized",
        size=config.image_size,
    )
    check_network(config.network, images, config.dataset)
    count = len(images.train.label)
    for name in ("batch_size", "fixed_examples"):
        if not 2 <= getattr(config, name) <= count:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: it must lie between 2 and {count}"
            )
    return images


def run(config: Config, images: Images, path: Path):
    """Measures what is not yet in the workdir, decides, and draws."""
    ledger = Ledger(path / "metrics.jsonl")
    seeds = range(config.seeds)
    networks = {arm: Network(config.network, place) for arm, place in _PLACEMENTS.items()}
    programs = {
        arm: Program(
            network,
            config.batch_size,
            config.steps_per_dispatch,
            config.num_iterations,
            tuple(config.curvature_steps),
        )
        for arm, network in networks.items()
    }
    descents_of_an_arm = len(config.descent_factors) * config.descent_steps + config.edge_steps
    total = (
        2 * len(config.rates) * config.num_steps
        + 5 * config.seeds * config.num_steps
        + 2 * config.seeds * descents_of_an_arm
    )
    with Runner(path, ledger, total_steps=total, strategy="devices") as runner:

        def trained(purpose: str, arm: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
            program = programs[arm]
            return train(runner, purpose, program, runs, images, config.fixed_examples)

        best = {}
        for arm, network in networks.items():
            # Rates are chosen on a seed that no verdict sees.
            trials = [
                Run(network, rate, config.seeds, config.num_steps, is_watched=False)
                for rate in config.rates
            ]
            losses = [final_loss(record) for record in trained("tune", arm, trials)]
            best[arm] = config.rates[int(np.argmin(losses))]

        def sgd(arm: str, rate: float) -> list[dict[str, Any]]:
            runs = [Run(networks[arm], rate, seed, config.num_steps) for seed in seeds]
            return trained("SGD", arm, runs)

        # At its best rate a plain network is near the end of its stability, and some seeds die.
        lower = max((r for r in config.rates if r < best["plain"]), default=best["plain"])
        surfaces = {
            verdicts.PLAIN: sgd("plain", best["plain"]),
            verdicts.SAME: sgd("BN", best["plain"]),
            verdicts.OWN: sgd("BN", best["BN"]),
            verdicts.LOW: sgd("plain", lower),
            verdicts.LOW_BN: sgd("BN", lower),
        }
        descents, edges = {}, {}
        for arm, role in (("plain", verdicts.PLAIN), ("BN", verdicts.SAME)):
            limits = [2 / sharpness.low for sharpness in sharpness_at_start(surfaces[role])]
            runs = [
                Run(
                    networks[arm],
                    factor * limits[seed],
                    seed,
                    config.descent_steps,
                    is_descent=True,
                    is_watched=False,
                )
                for factor in config.descent_factors
                for seed in seeds
            ]
            records = iter(trained("descent", arm, runs))
            for factor in config.descent_factors:
                descents[arm, factor] = [next(records) for _ in seeds]
            followed = [
                Run(
                    networks[arm],
                    config.edge_factor * limits[seed],
                    seed,
                    config.edge_steps,
                    is_descent=True,
                )
                for seed in seeds
            ]
            edges[arm] = trained("descent", arm, followed)
    findings = [
        verdicts.judge_surface(config, surfaces),
        verdicts.judge_sharpness(config, surfaces, descents),
        verdicts.judge_edge(config, edges),
    ]
    return findings, draw(config, surfaces, descents, edges, path / "figures")


CLAIMS = verdicts.CLAIMS

EXPERIMENT = Experiment(
    __name__,
    title="Is the loss surface smoother with batch normalization?",
    presets=PRESETS,
)
