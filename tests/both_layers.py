"""The layers of linen and of nnx, ours and Flax's, as pure functions of all that a layer has."""

import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bn_research.layers import linen
from bn_research.layers import nnx as own_nnx

KEY = jax.random.key(0)


def linen_step(layer, x, mask=None, params=None, stats=None, *, train=True, **options):
    """Output and statistics after it; variables that are not given are the initial ones."""
    layer = layer(use_running_average=not train, **options)
    variables = {} if params and stats else dict(layer.init(KEY, x))
    given = {"params": params, "batch_stats": stats}
    variables |= {name: tree for name, tree in given.items() if tree is not None}
    y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    assert set(new) == {"batch_stats"}
    return y, new["batch_stats"]


def nnx_step(layer, x, mask=None, params=None, stats=None, *, train=True, frozen=False, **options):
    layer = layer(x.shape[-1], use_running_average=not train, rngs=nnx.Rngs(0), **options)
    if frozen:
        layer.frozen = True
    for name, value in {**(params or {}), **(stats or {})}.items():
        getattr(layer, name).set_value(jnp.asarray(value))
    y = layer(x, mask=mask)
    for name, value in (params or {}).items():
        assert getattr(layer, name)[...].dtype == value.dtype
    return y, {name: getattr(layer, name).get_value() for name in ("mean", "var")}


class Api(typing.NamedTuple):
    own: typing.Callable
    flax: typing.Callable


LINEN = Api(*(functools.partial(linen_step, c) for c in (linen.BatchNorm, nn.BatchNorm)))
NNX = Api(*(functools.partial(nnx_step, c) for c in (own_nnx.BatchNorm, nnx.BatchNorm)))
APIS = {"linen": LINEN, "nnx": NNX}


def data(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 2 + 1


def stats_by_hand(batches, momentum):
    """Of a layer that starts with 0 and 1 and sees the union of batches."""
    flat = np.concatenate([b.reshape(-1, b.shape[-1]) for b in batches]).astype(np.float64)
    mean, var = (1 - momentum) * flat.mean(0), momentum + (1 - momentum) * flat.var(0)
    return {"mean": mean, "var": var}


def population_by_hand(batches, method="algorithm2"):
    parts = batches if method == "algorithm2" else [np.concatenate(batches)]
    mean = np.mean([b.mean(0, dtype=np.float64) for b in parts], 0)
    return {"mean": mean, "var": np.mean([b.var(0, ddof=1, dtype=np.float64) for b in parts], 0)}


def two_layers_by_hand(kind, axis, use, parts):
    """Statistics, stacked, of two layers of momentum 0.9 in "scan" or "vmap".

    In a scan the second sees what the first has normalized, under vmap 2x + 1.
    """
    second = [2 * p + 1 for p in parts]
    if kind == "scan":
        second = [(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-5) for p in parts]
    by_hand = {
        "accumulate": functools.partial(stats_by_hand, momentum=0.9),
        "population": population_by_hand,
    }[use]
    return jax.tree.map(lambda *v: np.stack(v, axis), by_hand(parts), by_hand(second))
