"""Deep perceptrons with BN, plain and residual, whose layers are scanned.

A dense layer to the width, `depth` times BN, ReLU and a dense layer, and BN, ReLU and a dense head.
The residual network adds the input of each of the `depth` to its output (pre-activation, He et al.,
2016), the plain one does not; both have the same parameters. A network of 80 layers compiles as
fast as one of 5.
"""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bn_research.models.initializers import kernel_initializer
from bn_research.normalization import BatchStats, batch_norm, normalize


class Params(NamedTuple):
    """Parameters of a network; the first axis of BN's counts the layers, one more than hidden."""

    first: Array  # shape=(inputs, width)
    hidden: Array  # shape=(depth, width, width)
    scale: Array  # shape=(depth + 1, width)
    bias: Array  # shape=(depth + 1, width)
    head: Array  # shape=(width, classes)


def initialize(key: Array, inputs: int, width: int, depth: int, classes: int) -> dict[str, Any]:
    """Variables before training: He-normal kernels, the head LeCun-normal, scale 1 and bias 0."""
    keys = jax.random.split(key, 3)
    he, lecun = kernel_initializer("he"), kernel_initializer("lecun")
    hidden = jax.vmap(lambda key: he(key, (width, width)))(jax.random.split(keys[1], depth))
    ones, zeros = jnp.ones((depth + 1, width)), jnp.zeros((depth + 1, width))
    params = Params(
        lecun(keys[0], (inputs, width)), hidden, ones, zeros, lecun(keys[2], (width, classes))
    )
    return {"params": params, "batch_stats": BatchStats(zeros, ones)}


def forward(
    variables: dict[str, Any],
    image: Float[Array, "batch ..."],
    skip: float | Float[Array, ""],
    *,
    train: bool,
) -> tuple[Float[Array, "batch classes"], Any]:
    """Logits, and the moments of every BN layer ([depth + 1, ...]) where `train`, else None.

    A layer's input times skip is added to its output: 1 is residual, 0 is plain. It is traced, so
    that one program serves both arms. Training normalizes by the batch, else `batch_stats` do.
    """
    params, stats = variables["params"], variables["batch_stats"]

    def normalized(x, scale, bias, stats):
        if train:
            y, moments = batch_norm(x, scale, bias)
        else:
            y, moments = normalize(x, *stats, scale, bias), None
        return jax.nn.relu(y), moments

    def block(x, layer):
        kernel, norm = layer
        y, moments = normalized(x, *norm)
        return skip * x + y @ kernel, moments

    below, top = (
        jax.tree.map(operator.itemgetter(part), (params.scale, params.bias, stats))
        for part in (slice(-1), -1)
    )
    x = image.reshape(len(image), -1) @ params.first
    x, moments = jax.lax.scan(block, x, (params.hidden, below))
    y, last = normalized(x, *top)
    moments = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), moments, last)
    return y @ params.head, moments
