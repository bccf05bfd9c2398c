"""The networks whose training is measured, ours and in plain Flax; `torch_networks` has PyTorch's.

BN on every layer but the head, float32, random images.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from bn_research.models.spec import Conv, Pool, parse_spec

CLASSES = 10


class Network(NamedTuple):
    """What is trained."""

    image: tuple[int, int, int]
    batch: int
    batches: int  # in the set
    steps: int  # a turn
    spec: str = ""  # of `bn_research.models.cnn`, or a small Inception:
    modules: tuple[str, ...] = ()  # of figure 5
    width: float = 1.0  # times its channels
    activation: str = "relu"
    dtype: str = "float32"  # of the computation; another only of an Inception


NETWORKS = {
    "cnn": Network((32, 32, 3), 128, 4, steps=4, spec="c32 c32 P c64 c64 P c128 c128 P f10"),
    "mlp": Network(
        (28, 28, 1), 60, 100, steps=400, spec="f100 f100 f100 f10", activation="sigmoid"
    ),
    # That of `experiments.training_steps`, standard preset.
    "inception": Network(
        (14, 14, 1), 32, 16, steps=16, modules=("3a", "3c", "4a", "5b"), width=0.125
    ),
}


def data(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels."""
    rng = np.random.default_rng(0)
    count = network.batches * network.batch
    images = rng.standard_normal((count, *network.image)).astype(np.float32)
    return images, rng.integers(CLASSES, size=count).astype(np.int32)


def our_network(network: Network) -> Any:
    """As the experiments build it."""
    import jax

    from bn_research.layers.linen import BatchNorm
    from bn_research.models.cnn import CNN

    if network.modules:
        return _inception(network, BatchNorm, "auto")
    activation = getattr(jax.nn, network.activation)
    return CNN(network.spec, BatchNorm, "hidden", activation=activation)


def flax_network(network: Network) -> Any:
    """With the names of ours. An Inception takes Flax's pooling for the whole process."""
    import flax.linen as nn
    import jax

    if network.modules:
        from bn_research.models import inception

        inception.max_pool = nn.max_pool
        return _inception(network, nn.BatchNorm, "xla")

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            layers, number = parse_spec(network.spec), 0
            for layer in layers:
                if isinstance(layer, Pool):
                    x = nn.max_pool(x, (2, 2), (2, 2))
                    continue
                number += 1
                if isinstance(layer, Conv):
                    x = nn.Conv(layer.features, (3, 3), name=f"conv{number}")(x)
                else:
                    x = x.reshape(len(x), -1)
                    x = nn.Dense(layer.features, name=f"dense{number}")(x)
                if layer is not layers[-1]:
                    norm = nn.BatchNorm(use_running_average=not train, name=f"batch_norm{number}")
                    x = getattr(jax.nn, network.activation)(norm(x))
            return x

    return Plain()


def _inception(network: Network, norm: Any, implementation: Any) -> Any:
    from bn_research.models.inception import Inception

    return Inception(
        CLASSES,
        norm,
        network.width,
        modules=network.modules,
        stem="small",
        implementation=implementation,
        dtype=network.dtype,
    )


def gflop(network: Network) -> float:
    """Of a step's products, 2 for each multiplication and addition.

    Every product of the forward pass comes again for the gradients of its two operands; the images
    take none.
    """
    import jax
    import jax.numpy as jnp

    model = flax_network(network)
    images = jax.ShapeDtypeStruct((network.batch, *network.image), jnp.float32)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    program = jax.make_jaxpr(functools.partial(model.apply, train=False))(variables, images)
    products = list(_products(program.jaxpr))
    return (3 * sum(products) - products[0]) / 1e9


def _products(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape)
        operands = [v.aval.shape for v in equation.invars]
        if equation.primitive.name == "conv_general_dilated":
            yield 2 * out * math.prod(operands[1][:-1])  # kernels are height, width, in, out
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            yield 2 * out * math.prod(operands[0][axis] for axis in contracted)
        for inner in _within(equation):
            yield from _products(inner)


def _within(equation: Any) -> Any:
    from jax.extend.core import ClosedJaxpr, Jaxpr

    for value in equation.params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
