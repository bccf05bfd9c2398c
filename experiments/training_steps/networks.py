"""The networks of `experiments.training_steps`: the paper's ladder, and its changes one at a time.

The changes are those of Ioffe & Szegedy (2015), section 4.2.1, and the rate of 4.2.2.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from bn_research.lab.settings import Setting
from bn_research.layers.linen import BatchNorm
from bn_research.models.inception import Inception
from bn_research.training.optimizers import create_optimizer, weight_mask
from experiments.training_steps import Config

LADDER = ("Inception", "BN-Baseline", "BN-x5", "BN-x30", "BN-x5-Sigmoid")
PLAIN, BASELINE, X5, X30, SIGMOID = LADDER
TUNED, TUNED_BN = "Inception, tuned", "BN-Baseline, tuned"  # each at its own best rate
TUNING_SEED = 10_000  # apart from every seed of a run

_MOMENTUM = 0.9  # of SGD, and of the running statistics, by which the test set is seen
_EPSILON = 1e-3  # of BN

# Steps to 72.2 %, Inception's best accuracy: Ioffe & Szegedy (2015), figure 3, on ImageNet by a
# single crop. The others come to 72.7, 73.0, 74.8 and 69.8 %.
PUBLISHED = {PLAIN: 31.0e6, BASELINE: 13.3e6, X5: 2.1e6, X30: 2.7e6, SIGMOID: math.inf}


class Network(Setting, traced="rate decay l2 distortion shuffled"):
    """A network and its training."""

    batch_norm: bool
    activation: str  # of jax.nn
    dropout: float
    local_response_norm: bool
    rate: float  # of the first step
    decay: float  # of the rate, per step
    l2: float  # λ of g + λ·θ, on weights alone
    distortion: float  # factors of contrast and brightness within 1 ± this
    shuffled: bool  # whether examples meet others in every epoch


def inception(config: Config) -> Network:
    """The network without BN, at the base rate."""
    return Network(
        batch_norm=False,
        activation="relu",
        dropout=config.dropout,
        local_response_norm=True,
        rate=config.base_rate,
        decay=-math.log(config.final_rate) / config.num_steps,
        l2=config.l2,
        distortion=config.distortion,
        shuffled=False,
    )


def changes(config: Config) -> dict[str, Callable[[Network], Network]]:
    """The seven changes that make BN-x5 of BN-Baseline, by name, in the paper's order."""
    return {
        "learning_rate": lambda s: s.replace(rate=5 * s.rate),
        "dropout": lambda s: s.replace(dropout=0.0),
        "l2": lambda s: s.replace(l2=s.l2 / 5),
        "rate_decay": lambda s: s.replace(decay=6 * s.decay),
        "local_response_norm": lambda s: s.replace(local_response_norm=False),
        "shuffling": lambda s: s.replace(shuffled=True),
        "photometric_distortion": lambda s: s.replace(distortion=config.weaker_distortion),
    }


def ladder(config: Config) -> dict[str, Network]:
    """The five networks of the paper, by name."""
    plain = inception(config)
    baseline = x5 = plain.replace(batch_norm=True)
    for change in changes(config).values():
        x5 = change(x5)
    others = x5.replace(rate=30 * plain.rate), x5.replace(activation="sigmoid")
    return dict(zip(LADDER, (plain, baseline, x5, *others), strict=True))


def switched(config: Config) -> dict[str, Network]:
    """BN-Baseline with one change each, by the name of the change."""
    baseline = ladder(config)[BASELINE]
    return {name: change(baseline) for name, change in changes(config).items()}


def plan(config: Config) -> dict[str, Network]:
    """The networks that are trained for each seed, by name; tuned ones are chosen in the run."""
    return {**ladder(config), **(switched(config) if config.switches else {})}


def learning_rate(network: Network, step: Int[Array, ""]) -> Float[Array, ""]:
    """η_t = rate·exp(−decay·t): the paper's, decayed exponentially."""
    return network.rate * jnp.exp(-network.decay * step)


def optimizer(network: Network) -> optax.GradientTransformation:
    """Momentum SGD at the decaying rate on the loss with an L2 term; all of it traced."""
    rate = functools.partial(learning_rate, network)
    sgd = create_optimizer("momentum", rate, momentum=_MOMENTUM)
    return optax.chain(optax.add_decayed_weights(network.l2, weight_mask), sgd)


class Task(NamedTuple):
    """What all networks of a run have in common; static."""

    config: Config
    num_classes: int
    image_shape: tuple[int, ...]


def make_model(network: Network, task: Task) -> Inception:
    """The module of a network."""
    norm = functools.partial(BatchNorm, momentum=_MOMENTUM, epsilon=_EPSILON)
    return Inception(
        task.num_classes,
        norm if network.batch_norm else None,
        width=task.config.width,
        dropout=network.dropout,
        local_response_norm=network.local_response_norm,
        activation=getattr(jax.nn, network.activation),
        modules=task.config.modules,
        stem="small",
        implementation="auto",
    )
