"""The networks of `experiments.ensemble`: their settings and compiled programs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from bn_research.lab.compiler import compiler_options
from bn_research.layers.linen import MOMENTS, BatchNorm, update_from_batch_moments
from bn_research.models.inception import Inception
from bn_research.normalization.batch_stats import cumulative_momentum
from bn_research.training.loop import run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, make_train_step
from bn_research.training.sweep import Sweep

_MOMENTUM = 0.9  # of SGD, and of running statistics
_EPSILON = 1e-3  # of BN


class Setting(NamedTuple):
    """In what networks differ; per_activation is static, the rest traced."""

    per_activation: bool  # BN of the last module
    gain: float  # times the initial kernels of convolutions
    dropout: float  # before the head


BASE = Setting(per_activation=False, gain=1.0, dropout=0.0)


def six(gain: float) -> tuple[Setting, ...]:
    """Six networks, each modified "via some of" the paper's three changes (section 4.2.3).

    The paper does not say which network has which, nor by how much its weights are increased.
    """
    return (
        Setting(per_activation=False, gain=gain, dropout=0.0),
        Setting(per_activation=False, gain=1.0, dropout=0.05),
        Setting(per_activation=False, gain=1.0, dropout=0.10),
        Setting(per_activation=False, gain=gain, dropout=0.05),
        Setting(per_activation=True, gain=1.0, dropout=0.0),
        Setting(per_activation=True, gain=gain, dropout=0.10),
    )


class Network(NamedTuple):
    """What all networks of a run have in common; static."""

    num_classes: int
    width: float
    modules: tuple[str, ...]
    image_shape: tuple[int, ...]
    batch_size: int
    num_steps: int
    steps_per_dispatch: int
    rate: float  # of the first step; it falls to 0 by half a cosine
    l2: float  # λ of g + λ·θ, on weights alone
    compiler_level: int  # see `bn_research.lab.arms.compiler_options`


class Hyper(NamedTuple):
    """The traced part of a setting."""

    gain: Array  # shape=()
    dropout: Array  # shape=()


def hyper(setting: Setting) -> Hyper:
    """The traced part."""
    return Hyper(np.float32(setting.gain), np.float32(setting.dropout))  # type: ignore[arg-type]


class Run(NamedTuple):
    """One training."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Identifies it in the ledger."""
        fields = " ".join(f"{field}={value}" for field, value in self.setting._asdict().items())
        return f"{fields} seed={self.seed}"


def make_model(network: Network, per_activation: bool, dropout: Any = 0.0) -> Inception:
    """The network of a setting."""
    norm = functools.partial(BatchNorm, momentum=_MOMENTUM, epsilon=_EPSILON)
    return Inception(
        network.num_classes,
        norm,
        width=network.width,
        dropout=dropout,
        modules=network.modules,
        stem="small",
        implementation="auto",
        # Of images, not of channels: one mean for each pixel of each channel.
        last_norm=functools.partial(norm, axis=(1, 2, 3)) if per_activation else None,
    )


def _optimizer(network: Network) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(network.rate, network.num_steps)
    return create_optimizer("momentum", rate, momentum=_MOMENTUM, weight_decay=network.l2)


def scale_convolutions(params: Any, gain: Array | float) -> Any:
    """Params with the kernels of all convolutions times gain; those of the head stay."""

    def scaled(path, leaf):
        return leaf * gain if [key.key for key in path[-2:]] == ["conv", "kernel"] else leaf

    return jax.tree_util.tree_map_with_path(scaled, params)


@functools.cache
def create_program(network: Network, per_activation: bool):
    """(key, hyper) -> state before the first step."""

    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key, hyper):
        model, image = make_model(network, per_activation), jnp.zeros((1, *network.image_shape))
        state = create_train_state(
            lambda key: model.init(key, image, train=False), _optimizer(network), key
        )
        return state._replace(params=scale_convolutions(state.params, hyper.gain))

    return create


@functools.cache
def sweep_program(network: Network, per_activation: bool) -> Sweep:
    """The training of all networks with BN of one kind."""

    def advance(state: TrainState, hyper: Hyper, examples: Batch):
        model = make_model(network, per_activation, hyper.dropout)

        def apply(variables, image, *, train, keys):
            logits, new = model.apply(
                variables, image, train=train, keys=keys, mutable=["batch_stats"]
            )
            return logits, new["batch_stats"]

        step = make_train_step(apply, _optimizer(network), stochastic=True)
        return run_steps(
            step,
            state,
            examples,
            batch_size=network.batch_size,
            num_steps=network.steps_per_dispatch,
        )

    return Sweep(
        advance,
        steps_per_dispatch=network.steps_per_dispatch,
        compiler_options=compiler_options(network.compiler_level),
    )


@functools.cache
def statistics_program(network: Network, per_activation: bool):
    """(params, batch_stats, batches) -> statistics of the population, and those of each batch.

    The first are those of algorithm 2, means over the batches of mean and unbiased variance, with
    every layer normalizing by the batch; the second are what the batch is normalized by, with a
    first axis of batches. batch_stats gives the shapes alone.
    """
    model = make_model(network, per_activation)

    @functools.partial(jax.jit, compiler_options=compiler_options(network.compiler_level))
    def statistics(params, batch_stats, batches):
        def see(population, numbered):
            number, image = numbered
            variables = {"params": params, "batch_stats": batch_stats}
            moments = model.apply(variables, image, train=True, mutable=[MOMENTS])[1][MOMENTS]
            population = update_from_batch_moments(
                population, moments, momentum=cumulative_momentum(number), unbiased=True
            )
            return population, update_from_batch_moments(batch_stats, moments, momentum=0.0)

        return jax.lax.scan(see, batch_stats, (jnp.arange(len(batches)), batches))

    return statistics


@functools.cache
def prediction_program(network: Network, per_activation: bool, mesh: Mesh):
    """(params, batch_stats, images) -> logarithms of class probabilities, [batches, examples, …].

    The batches are shared out over the devices.
    """
    model = make_model(network, per_activation)
    (axis,) = mesh.axis_names
    cut, whole = PartitionSpec(axis), PartitionSpec()

    def predict(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}

        def one(image):
            return jax.nn.log_softmax(model.apply(variables, image, train=False))

        return jax.lax.map(one, images)

    mapped = jax.shard_map(
        predict, mesh=mesh, in_specs=(whole, whole, cut), out_specs=cut, check_vma=False
    )
    return jax.jit(mapped, compiler_options=compiler_options(network.compiler_level))
