"""The networks of `experiments.regularization`, and what of them is static in their programs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from jaxtyping import Array, Key

from bn_research.layers.linen import MOMENTS, BatchNorm
from bn_research.layers.stochastic_norm import StochasticBatchNorm
from bn_research.models.cnn import CNN, NormPlacement
from bn_research.models.initializers import kernel_initializer
from bn_research.training.optimizers import create_optimizer

_MOMENTUM = 0.9  # of SGD
_STATS_MOMENTUM = 0.9  # of the running statistics, which no number of the results rests on
_EPSILON = 1e-5  # of BN


# "batch" is BatchNorm; those after it are StochasticBatchNorm, "population" without noise.
NORMS = ("none", "batch", "population", "measured", "borrowed", "additive")


class Setting(NamedTuple):
    """A network and its training; what stands before `rate` is static, the rest traced."""

    network: str
    norm: str = "batch"  # of the hidden layers: one of NORMS
    population: str = "running"  # of StochasticBatchNorm; the other norms do not look at it
    group_size: int = 0  # examples that share statistics, or one draw of noise; 0: the whole batch
    batch_size: int = 512  # of SGD
    dropout_placement: str = "none"  # or as of CNN
    rate: float = 0.1  # of the first step; a cosine takes it to 0
    dropout: float = 0.0
    regrouped: bool = (
        True  # False: groups of group_size are drawn once, in whatever batch they meet
    )

    @property
    def static(self) -> tuple[Any, ...]:
        """The part that makes the program."""
        return self[:_STATIC]

    @property
    def stochastic(self) -> bool:
        """Whether a training pass draws random numbers."""
        return self.norm not in NORMS[:2] or self.dropout_placement != "none"


_STATIC = Setting._fields.index("rate")


class Hyper(NamedTuple):
    """The traced part of a setting, shape=() each."""

    rate: Array
    dropout: Array
    regrouped: Array


def hyper(setting: Setting) -> Hyper:
    """The traced part."""
    rate, dropout = np.float32(setting.rate), np.float32(setting.dropout)
    return Hyper(rate, dropout, np.bool_(setting.regrouped))  # type: ignore[arg-type]


def optimizer(hyper: Hyper, num_steps: int) -> optax.GradientTransformation:
    """Momentum SGD whose rate a cosine takes to 0 over num_steps."""
    schedule = optax.cosine_decay_schedule(hyper.rate, num_steps)  # type: ignore[arg-type]
    return create_optimizer("momentum", schedule, momentum=_MOMENTUM)


def make_model(setting: Setting, *, dropout: float | Array = 0.0) -> CNN:
    """The network; BN, of whatever kind, stands on its hidden layers.

    Args:
      setting: its static part counts.
      dropout: rate; may be traced.
    """
    norm: Callable[..., nn.Module] | None = None
    options: dict[str, Any] = dict(
        momentum=_STATS_MOMENTUM, epsilon=_EPSILON, group_size=setting.group_size or None
    )
    if setting.norm == "batch":
        norm = functools.partial(BatchNorm, **options)
    elif setting.norm != "none":
        noise: Any = "none" if setting.norm == "population" else setting.norm
        population: Any = setting.population
        norm = functools.partial(StochasticBatchNorm, noise=noise, population=population, **options)
    drops: dict[str, Any] = {}
    if setting.dropout_placement != "none":
        drops = dict(dropout=dropout, dropout_placement=setting.dropout_placement)
    placement: NormPlacement = "none" if norm is None else "hidden"
    init = kernel_initializer("he")
    return CNN(setting.network, norm, placement, kernel_init=init, **drops)


def apply_training(
    model: CNN, setting: Setting, variables: Any, image: Array, keys: Key[Array, "batch"] | None
) -> tuple[Array, Any]:
    """Logits in training mode, and the collections `batch_stats` and `batch_moments`."""
    options: dict[str, Any] = {}
    if setting.stochastic:
        assert keys is not None
        # Two uses of one key: noise is drawn once for the batch, dropout for each example.
        options["rngs"] = {"noise": jax.random.fold_in(keys[0], 1)}
        if setting.dropout_placement != "none":
            options["keys"] = jax.vmap(jax.random.fold_in, (0, None))(keys, 2)
    mutable = ["batch_stats", MOMENTS]
    return model.apply(variables, image, train=True, mutable=mutable, **options)
