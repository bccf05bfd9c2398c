"""The networks of `experiments.training_steps`: the paper's ladder, and its changes one at a time.

Inception and BN-Baseline differ in BN alone. BN-x5 makes seven changes more to BN-Baseline (Ioffe &
Szegedy, 2015, section 4.2.1, and the rate of 4.2.2); BN-x30 differs from it in the rate, and
BN-x5-Sigmoid in the activation. Each change is a function of a setting here, so that it can be made
alone.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from bn_research.layers.linen import BatchNorm
from bn_research.models.inception import Inception
from bn_research.training.optimizers import create_optimizer, weight_mask

PLAIN, BASELINE, X5, X30 = "Inception", "BN-Baseline", "BN-x5", "BN-x30"
SIGMOID = "BN-x5-Sigmoid"
LADDER = (PLAIN, BASELINE, X5, X30, SIGMOID)
TUNED, TUNED_BN = "Inception, tuned", "BN-Baseline, tuned"  # each at its own best rate
TUNING_SEED = 10_000  # apart from every seed of a run

X5_RATE, X30_RATE = 5, 30  # times the rate of Inception
_L2_DIVISOR, _DECAY_FACTOR = 5, 6

_MOMENTUM = 0.9  # of SGD
_STATS_MOMENTUM = 0.9  # of the running statistics, by which the test set is seen
_EPSILON = 1e-3  # of BN


class Published(NamedTuple):
    """Ioffe & Szegedy (2015), figure 3: ImageNet, single crop."""

    steps: float | None  # to 72.2 %, Inception's best accuracy; None where it is not reached
    accuracy: float  # the highest

    @property
    def ratio(self) -> float | None:
        """Inception's steps over this network's."""
        return None if self.steps is None else 31.0e6 / self.steps


PUBLISHED = {
    PLAIN: Published(31.0e6, 0.722),
    BASELINE: Published(13.3e6, 0.727),
    X5: Published(2.1e6, 0.730),
    X30: Published(2.7e6, 0.748),
    SIGMOID: Published(None, 0.698),
}


class Setting(NamedTuple):
    """A network and its training; what stands before `rate` is static, the rest traced."""

    batch_norm: bool
    activation: str  # of jax.nn
    dropout: float
    local_response_norm: bool
    rate: float  # of the first step
    decay: float  # of the rate, per step: rate·exp(−decay·t)
    l2: float  # λ of g + λ·θ, on weights alone
    distortion: float  # factors of contrast and brightness within 1 ± this
    shuffled: bool  # whether examples meet others in every epoch

    @property
    def static(self) -> tuple[Any, ...]:
        """The part that makes the program."""
        return self[: _STATIC.index("rate")]


_STATIC = Setting._fields


def inception(config: Any) -> Setting:
    """The network without BN, at the base rate."""
    return Setting(
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


def changes(config: Any) -> dict[str, Callable[[Setting], Setting]]:
    """The seven changes that make BN-x5 of BN-Baseline, by name, in the paper's order."""
    return {
        "learning_rate": lambda s: s._replace(rate=X5_RATE * s.rate),
        "dropout": lambda s: s._replace(dropout=0.0),
        "l2": lambda s: s._replace(l2=s.l2 / _L2_DIVISOR),
        "rate_decay": lambda s: s._replace(decay=_DECAY_FACTOR * s.decay),
        "local_response_norm": lambda s: s._replace(local_response_norm=False),
        "shuffling": lambda s: s._replace(shuffled=True),
        "photometric_distortion": lambda s: s._replace(distortion=config.weaker_distortion),
    }


def ladder(config: Any) -> dict[str, Setting]:
    """The five networks of the paper, by name."""
    plain = inception(config)
    baseline = plain._replace(batch_norm=True)
    x5 = baseline
    for change in changes(config).values():
        x5 = change(x5)
    x30 = x5._replace(rate=X30_RATE * plain.rate)
    settings = (plain, baseline, x5, x30, x5._replace(activation="sigmoid"))
    return dict(zip(LADDER, settings, strict=True))


def switched(config: Any) -> dict[str, Setting]:
    """BN-Baseline with one change each, by the name of the change."""
    baseline = ladder(config)[BASELINE]
    return {name: change(baseline) for name, change in changes(config).items()}


class Network(NamedTuple):
    """What all networks of a run have in common; static."""

    num_classes: int
    width: float
    modules: tuple[str, ...]
    batch_size: int
    steps_per_dispatch: int
    image_shape: tuple[int, ...]
    lanes: int  # devices that train side by side, at most
    compiler_level: int = 1  # see `bn_research.lab.arms.compiler_options`


class Hyper(NamedTuple):
    """The traced part of a setting, shape=() each."""

    rate: Array
    decay: Array
    l2: Array
    distortion: Array
    shuffled: Array


def hyper(setting: Setting) -> Hyper:
    """The traced part."""
    *numbers, shuffled = (getattr(setting, field) for field in Hyper._fields)
    return Hyper(*map(np.float32, numbers), np.bool_(shuffled))  # type: ignore[arg-type, call-arg]


def learning_rate(hyper: Hyper, step: Int[Array, ""]) -> Float[Array, ""]:
    """η_t = rate·exp(−decay·t): the paper's, decayed exponentially."""
    return hyper.rate * jnp.exp(-hyper.decay * step)


def optimizer(hyper: Hyper) -> optax.GradientTransformation:
    """Momentum SGD at the decaying rate on the loss with an L2 term; all of it traced."""
    sgd = create_optimizer("momentum", functools.partial(learning_rate, hyper), momentum=_MOMENTUM)
    return optax.chain(optax.add_decayed_weights(hyper.l2, weight_mask), sgd)


def make_model(network: Network, static: tuple[Any, ...]) -> Inception:
    """The network of a setting, see `Setting.static`."""
    batch_norm, activation, dropout, local_response_norm = static
    norm = functools.partial(BatchNorm, momentum=_STATS_MOMENTUM, epsilon=_EPSILON)
    return Inception(
        network.num_classes,
        norm if batch_norm else None,
        width=network.width,
        dropout=dropout,
        local_response_norm=local_response_norm,
        activation=getattr(jax.nn, activation),
        modules=network.modules,
        stem="small",
        implementation="auto",
    )
