"""Other batch-norm layers behind one signature, so that they can be asked the same questions.

A peer's step is

    step(x, scale, bias, where=None, axis_name=None) -> y, mean, var

in training mode, features last, with the batch's own mean and (biased) variance taken from the
running statistics that the layer leaves when its average forgets everything but this batch.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bn_research.layers import linen as our_linen

EPSILON = 1e-5


class Peer(NamedTuple):
    """A layer of some library."""

    name: str
    package: str  # to import
    make: Callable[[int], Callable[..., tuple[Any, Any, Any]]]  # features -> step
    masks: bool = False  # takes `where`
    syncs: bool = False  # takes `axis_name`


def available(peers: Sequence[Peer]) -> list[Peer]:
    """Those whose package is installed."""
    return [peer for peer in peers if importlib.util.find_spec(peer.package)]


def _linen(layer, **options):
    def make(features):
        def step(x, scale, bias, where=None, axis_name=None, **more):
            module = layer(
                use_running_average=False,
                momentum=0.0,
                epsilon=EPSILON,
                axis_name=axis_name,
                **options,
                **more,
            )
            stats = {"mean": jnp.zeros(features), "var": jnp.ones(features)}
            variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
            y, new = module.apply(variables, x, mask=where, mutable=["batch_stats"])
            return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]

        return step

    return make


def _nnx(features):
    def step(x, scale, bias, where=None, axis_name=None):
        layer = nnx.BatchNorm(
            features, momentum=0.0, epsilon=EPSILON, axis_name=axis_name, rngs=nnx.Rngs(0)
        )
        layer.scale[...], layer.bias[...] = scale, bias
        y = layer(x, use_running_average=False, mask=where)
        return y, layer.mean[...], layer.var[...]

    return step


def _haiku(features):
    import haiku as hk

    def step(x, scale, bias, where=None, axis_name=None):
        def forward(x):
            layer = hk.BatchNorm(
                create_scale=True,
                create_offset=True,
                decay_rate=0.0,
                eps=EPSILON,
                cross_replica_axis=axis_name,
            )
            return layer(x, is_training=True)

        transformed = hk.transform_with_state(forward)
        shape = (1,) * (x.ndim - 1) + (features,)
        average = {
            "hidden": jnp.zeros(shape),
            "average": jnp.zeros(shape),
            "counter": jnp.zeros((), jnp.int32),
        }
        params = {"batch_norm": {"scale": scale.reshape(shape), "offset": bias.reshape(shape)}}
        state = {f"batch_norm/~/{name}_ema": average for name in ("mean", "var")}
        y, new = transformed.apply(params, state, None, x)
        mean, var = (new[f"batch_norm/~/{name}_ema"]["average"] for name in ("mean", "var"))
        return y, mean.reshape(features), var.reshape(features)

    return step


def _equinox(features):
    import equinox as eqx

    def step(x, scale, bias, where=None, axis_name=None):
        axes = ("examples",) if axis_name is None else ("examples", axis_name)
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            features, axes, eps=EPSILON, momentum=0.0, mode="batch"
        )
        layer = eqx.tree_at(lambda m: (m.weight, m.bias), layer, (scale, bias))
        y, state = jax.vmap(layer, axis_name="examples", in_axes=(0, None), out_axes=(0, None))(
            jnp.moveaxis(x, -1, 1), state
        )
        mean, var = state.get(layer.batch_state_index)
        return jnp.moveaxis(y, 1, -1), mean, var

    return step


def _keras(features):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    layer = keras.layers.BatchNormalization(momentum=0.0, epsilon=EPSILON)
    layer.build((None, features))

    def step(x, scale, bias, where=None, axis_name=None):
        layer.input_spec = None  # one layer for inputs of every rank
        layer._reduction_axes = list(range(x.ndim - 1))
        mask = None if where is None else jnp.broadcast_to(where, x.shape)[..., 0]
        state = [jnp.zeros(features), jnp.ones(features)]
        y, (mean, var) = layer.stateless_call([scale, bias], state, x, training=True, mask=mask)
        return y, mean, var

    return step


OURS = Peer("bn_research", "flax", _linen(our_linen.BatchNorm), masks=True, syncs=True)
OTHERS = (
    Peer("flax.linen (default)", "flax", _linen(nn.BatchNorm), masks=True, syncs=True),
    Peer(
        "flax.linen (two-pass)",
        "flax",
        _linen(nn.BatchNorm, use_fast_variance=False),
        masks=True,
        syncs=True,
    ),
    Peer("flax.nnx", "flax", _nnx, masks=True, syncs=True),
    Peer("dm-haiku", "haiku", _haiku, syncs=True),
    Peer("equinox (batch)", "equinox", _equinox, syncs=True),
    Peer("keras 3 (JAX)", "keras", _keras, masks=True),
)


def torch_batch_norm(x, scale, bias, g):
    """PyTorch's layer on numpy arrays: y, mean, biased variance and the gradient of Σ g·y in x."""
    import torch

    half = {2: torch.bfloat16 if "bfloat" in str(x.dtype) else torch.float16}
    dtype = half.get(x.dtype.itemsize, torch.float32)
    layer = torch.nn.BatchNorm1d(x.shape[-1], eps=EPSILON, momentum=1.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(scale))
        layer.bias.copy_(torch.tensor(bias))
    inputs = torch.tensor(x.astype("float32")).to(dtype).requires_grad_()
    y = layer(inputs)
    y.backward(torch.tensor(g).to(y.dtype))
    count = x.shape[0]
    arrays = (y, layer.running_mean, layer.running_var, inputs.grad)
    y, mean, var, dx = (v.detach().double().numpy() for v in arrays)
    return y, mean, var * (count - 1) / count, dx
