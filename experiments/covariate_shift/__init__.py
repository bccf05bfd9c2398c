"""Does batch normalization reduce internal covariate shift?

Ioffe & Szegedy (2015, section 4.1) train a small sigmoid network and show in their figure 1 that BN
makes it more accurate and keeps the inputs of one typical last hidden unit steady. Santurkar et al.
(2018) measure the shift on gradients instead and find that BN does not reduce it. This experiment
rebuilds that figure, with the drift of all units of the last hidden layer, and measures the
gradient shift in the same runs.

    python -m experiments.covariate_shift --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, few steps: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 28×28, 5 seeds, the paper's 50,000 steps: about 10 min on 2 CPU cores

The paper's network: 3 fully connected hidden layers of 100 sigmoid units, 10-way softmax, batches
of 60, small Gaussian weights, BN on each hidden layer. It trains on MNIST: --config.dataset=mnist
takes it where its files are. Rate, momentum, width of the Gaussian and ε are not given there; here
they are chosen from one grid for both networks, by the training loss of short runs on a seed apart.
The claims compare both at the settings that suit the plain network, as the paper trains both alike;
BN at its own best is reported beside it, and so is a comparison with small weights alone: tuned,
the width of the plain network's weights is a remedy of its own.

Drift. With p_l(t) the {15, 50, 85} percentiles of what a unit's nonlinearity receives (after BN),
on images that stay the same, and r = p_85 − p_15 its width,

    drift = Σ_t ⟨|p_l(t + 1) − p_l(t)|⟩_l / ½(r(t) + r(t + 1))

A unit on a plateau hardly drifts, and one whose width has just begun to grow drifts by much of it;
so the part after the plain network has left its plateau is reported too, for both.

Gradient shift. Layer i takes its step along G, while the layers below take theirs:

    G  = ∇_{W_i} L(W_1, …, W_k)        G′ = ∇_{W_i} L(W⁺_1, …, W⁺_{i−1}, W_i, …, W_k)

and ‖G − G′‖/‖G‖ and the cosine of the two say how far G was out of date. The same distance between
two batches at the same weights is the noise that SGD lives with anyway.

| claim | expected |
|---|---|
| distribution-drift-reduced | drift BN/plain at most 0.5, accuracy higher |
| gradient-shift-not-reduced | gradient shift BN/plain at least 1 |
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from bn_research.lab.experiment import Experiment
from bn_research.lab.images import Images, check_network, load_images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.models.spec import Dense, num_weight_layers, parse_spec
from bn_research.training.cores import use_cpu_cores
from experiments.covariate_shift.figures import draw
from experiments.covariate_shift.training import Setting, Trainer, choose
from experiments.covariate_shift.verdicts import (
    ARMS,
    Runs,
    judge_drift,
    judge_gradient,
    small_weights,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3  # 0, 1, …; the next one chooses the settings and enters no verdict
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    network: str = "f100 f100 f100 f10"
    activations: tuple[str, ...] = ("sigmoid",)  # of jax.nn; the claims are about the first
    batch_size: int = 60
    num_steps: int = 3000
    other_steps: int = 3000  # of the comparisons that no verdict rests on
    steps_per_dispatch: int = 100  # measured before each dispatch
    measuring_images: int = 800  # of the test set, for the percentiles
    evaluation_images: int = 0  # of the test set, for the accuracy while training; 0 is all
    tuning_steps: int = 500
    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    momenta: tuple[float, ...] = (0.0, 0.9)
    init_stds: tuple[float, ...] = (0.03, 0.1, 0.3)  # of the Gaussian weights: small, as there
    small_init_std: float = 0.03  # of a comparison of its own, as small as the paper's may be; or 0
    epsilons: tuple[float, ...] = (1e-5,)  # of BN


PRESETS = {
    "smoke": Config(
        seeds=2,
        network="f12 f12 f10",
        num_steps=60,
        steps_per_dispatch=20,
        measuring_images=100,
        evaluation_images=100,
        tuning_steps=20,
        learning_rates=(0.3, 1.0),
        momenta=(0.0, 0.9),
        other_steps=40,
        init_stds=(0.1,),
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        activations=("sigmoid", "relu"),
        num_steps=50_000,
        other_steps=10_000,
        steps_per_dispatch=1000,
        measuring_images=1000,
        evaluation_images=2000,
        tuning_steps=2000,
        epsilons=(1e-5, 1e-3),
    ),
}

_GRIDS = {  # entries, and what each must be
    "learning_rates": ("above 0", lambda x: 0 < x < math.inf),
    "momenta": ("in [0, 1)", lambda x: 0 <= x < 1),
    "init_stds": ("above 0", lambda x: 0 < x < math.inf),
    "epsilons": ("0 or more", lambda x: 0 <= x < math.inf),
}
_ACTIVATIONS = ("sigmoid", "relu", "tanh", "gelu", "silu", "softplus")


def prepare(config: Config) -> Images:
    """Checks the config and loads the images; each core becomes a device, for the sweeps."""
    for name, least in (("seeds", 1), ("batch_size", 2), ("measuring_images", 4)):
        if getattr(config, name) < least:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: at least {least} is needed"
            )
    if config.evaluation_images < 0:
        raise ValueError(
            f"evaluation_images={config.evaluation_images} is not allowed: 0 is all, or give more"
        )
    for name, dispatches in (("num_steps", 2), ("other_steps", 2), ("tuning_steps", 1)):
        steps, each = getattr(config, name), config.steps_per_dispatch
        if each < 1 or steps < dispatches * each or steps % each:
            raise ValueError(
                f"{name}={steps} is not allowed: it must be a multiple of steps_per_dispatch="
                f"{each}, {dispatches} of them or more"
            )
    for name, (allowed, is_allowed) in _GRIDS.items():
        values = getattr(config, name)
        sound = all(isinstance(x, int | float) and is_allowed(x) for x in values)
        if not values or len(set(values)) < len(values) or not sound:
            raise ValueError(
                f"{name}={values} is not allowed: give one or more, all different, each {allowed}"
            )
    if not 0 <= config.small_init_std < math.inf:
        raise ValueError(
            f"small_init_std={config.small_init_std} is not allowed: 0 leaves its comparison out, "
            "or give more"
        )
    known = set(config.activations) <= set(_ACTIVATIONS)
    if (
        not config.activations
        or len(set(config.activations)) < len(config.activations)
        or not known
    ):
        raise ValueError(
            f"activations={config.activations} is not allowed: give one or more of "
            f"{', '.join(_ACTIVATIONS)}, each once"
        )
    if not all(isinstance(layer, Dense) for layer in parse_spec(config.network)):
        raise ValueError(f"network={config.network!r} is not allowed: dense layers only")
    if num_weight_layers(config.network) < 2:
        raise ValueError(f"network={config.network!r} is not allowed: it needs a hidden layer")
    use_cpu_cores()
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="standardized",
    )
    check_network(config.network, images, config.dataset)
    count, test = len(images.train.label), len(images.test.label)
    if 2 * config.batch_size > count:
        raise ValueError(
            f"batch_size={config.batch_size} is not allowed: two batches of the {count} training "
            "examples are needed for the noise floor"
        )
    for name in ("measuring_images", "evaluation_images"):
        if getattr(config, name) > test:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: the test set has {test}"
            )
    return images


def trials(
    config: Config, activation: str, *, batch_norm: bool, init_stds: Sequence[float] = ()
) -> list[Setting]:
    """The grid that an arm's settings are chosen from; ε is BN's alone.

    Args:
      config: of the run.
      activation: of jax.nn.
      batch_norm: whether the arm has BN.
      init_stds: those of the grid; () is the config's.
    """
    epsilons = config.epsilons if batch_norm else config.epsilons[:1]
    stds = init_stds or config.init_stds
    grid = itertools.product(config.learning_rates, config.momenta, stds, epsilons)
    return [Setting(activation, batch_norm, *point) for point in grid]


class Comparison(NamedTuple):
    """Plain networks and networks with BN that are tuned alike."""

    activation: str
    init_stds: tuple[float, ...]
    num_steps: int


def comparisons(config: Config) -> dict[str, Comparison]:
    """By name, that of the claims first."""
    first, *others = config.activations
    found = {first: Comparison(first, config.init_stds, config.num_steps)}
    if config.small_init_std:
        small = (config.small_init_std,)
        found[small_weights(config)] = Comparison(first, small, config.other_steps)
    for name in others:
        found[name] = Comparison(name, config.init_stds, config.other_steps)
    return found


def run(config: Config, images: Images, path: Path):
    """Trains what is not yet in the workdir, decides, and draws."""
    ledger = Ledger(path / "metrics.jsonl")
    grids = {
        name: [
            setting
            for batch_norm in (False, True)
            for setting in trials(
                config, planned.activation, batch_norm=batch_norm, init_stds=planned.init_stds
            )
        ]
        for name, planned in comparisons(config).items()
    }
    total = sum(
        len(grids[name]) * config.tuning_steps + len(ARMS) * config.seeds * planned.num_steps
        for name, planned in comparisons(config).items()
    )
    strategy = "devices" if len(jax.local_devices()) > 1 else "in_turn"
    runs: dict[str, Runs] = {}
    with Runner(path, ledger, total_steps=total, strategy=strategy) as runner:
        trainer = Trainer(config, images, runner)
        for name, planned in comparisons(config).items():
            tuned = trainer.tune(grids[name], seed=config.seeds)
            plain = choose([r for r in tuned if not r["batch_norm"]])
            normalized = [r for r in tuned if r["batch_norm"]]
            shared = ("learning_rate", "momentum", "init_std")
            same = choose([r for r in normalized if all(r[k] == getattr(plain, k) for k in shared)])
            chosen = [plain, same, choose(normalized)]
            records = trainer.train(chosen, seeds=config.seeds, num_steps=planned.num_steps)
            runs[name] = dict(zip(ARMS, records, strict=True))
    findings = [judge_drift(config, runs), judge_gradient(config, runs)]
    return findings, draw(config, runs, path / "figures")


EXPERIMENT = Experiment(
    __name__,
    title="Does batch normalization reduce internal covariate shift?",
    presets=PRESETS,
)
