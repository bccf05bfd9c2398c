"""Optimizers against steps computed by hand."""

import dataclasses
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bn_research.layers.linen import BatchNorm
from bn_research.training.optimizers import create_optimizer, weight_mask

PARAMS = {
    "dense": {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([3.0])},
    "bn": {"scale": jnp.array([1.5]), "bias": jnp.array([-0.5])},
}
GRADS = {
    "dense": {"kernel": jnp.array([0.5, 0.25]), "bias": jnp.array([-1.0])},
    "bn": {"scale": jnp.array([0.1]), "bias": jnp.array([0.2])},
}
RATE, DECAY = 0.1, 0.01


def run(optimizer, steps, params=PARAMS):
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_hand(name, steps, decayed):
    """The same gradient in each step; `decayed` says which leaves the decay reaches."""

    def one(p, g, decays):
        p, g, velocity, m, v = np.float64(p), np.float64(g), 0.0, 0.0, 0.0
        decay = DECAY * decays
        for t in range(1, steps + 1):
            if name == "adam":
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
                p = p - RATE * (step + decay * p)
            else:
                velocity = (0.8 if name == "momentum" else 0.0) * velocity + g + decay * p
                p = p - RATE * velocity
        return p

    return jax.tree.map(one, PARAMS, GRADS, decayed)


def everywhere(value):
    return jax.tree.map(lambda _: value, PARAMS)


WEIGHTS = {"dense": {"kernel": True, "bias": False}, "bn": {"scale": False, "bias": False}}


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize(
    ("options", "decayed"),
    [
        (dict(), everywhere(False)),
        (dict(weight_decay=DECAY), WEIGHTS),
        (dict(weight_decay=DECAY, decay_scale_and_bias=True), everywhere(True)),
    ],
)
def test_three_steps_by_hand(name, options, decayed):
    """Decay is L2 for sgd and momentum, decoupled for adam; it spares scale and bias."""
    params = run(create_optimizer(name, RATE, momentum=0.8, **options), 3)
    expected = by_hand(name, 3, decayed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


def test_default_momentum():
    """θ − η·(1 + 1.9 + 2.71)·g after three steps with v ← 0.9·v + g."""
    params = run(create_optimizer("momentum", RATE), 3)
    np.testing.assert_allclose(params["bn"]["scale"], [1.5 - RATE * 5.61 * 0.1], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_traced_learning_rate(name):
    """One program for every rate, with the numbers of a static one."""

    @jax.jit
    def traced(rate):
        return run(create_optimizer(name, rate, weight_decay=DECAY), 2)

    for rate in (0.1, 0.7):
        static = run(create_optimizer(name, rate, weight_decay=DECAY), 2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), traced(rate), static)
    assert traced._cache_size() == 1


def test_weight_mask():
    assert weight_mask(PARAMS) == WEIGHTS
    assert weight_mask({"layers": [jnp.ones(2), {"bias": jnp.ones(1)}]}) == {
        "layers": [True, {"bias": False}]
    }


class Layer(NamedTuple):
    """A layer as a NamedTuple."""

    kernel: Any
    scale: Any
    bias: Any


StructLayer = flax.struct.dataclass(
    type("StructLayer", (), {"__annotations__": dict.fromkeys(Layer._fields, Any)})
)
DataLayer = jax.tree_util.register_dataclass(
    dataclasses.make_dataclass("DataLayer", Layer._fields), list(Layer._fields), []
)


class NnxNetwork(nnx.Module):
    """BN directly, in a list and in a dict, and parameters of its own in a list."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.layers = nnx.List([nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])
        self.named = nnx.Dict(scale=nnx.Linear(3, 3, rngs=rngs), norm=nnx.BatchNorm(3, rngs=rngs))
        self.scale = nnx.List([nnx.Param(jnp.ones(3)), nnx.Param(jnp.ones(3))])


class LinenNetwork(nn.Module):
    """A dense layer and BN; `partition` wraps every initializer."""

    partition: Any = staticmethod(lambda init, axes: init)

    @nn.compact
    def __call__(self, x):
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        x = nn.Dense(
            3,
            kernel_init=self.partition(ones, (None, "model")),
            bias_init=self.partition(zeros, ("model",)),
        )(x)
        return BatchNorm(
            use_running_average=True,
            scale_init=self.partition(ones, ("model",)),
            bias_init=self.partition(zeros, ("model",)),
        )(x)


def linen_params(*partition):
    return LinenNetwork(*partition).init(jax.random.key(0), jnp.ones((1, 2)))["params"]


def containers():
    """Name -> (params, the number of weights among them, and of all parameters)."""
    state = nnx.state(NnxNetwork(nnx.Rngs(0)), nnx.Param)
    ones = [jnp.ones(3)] * 3
    layers = [kind(*ones) for kind in (Layer, StructLayer, DataLayer)]
    return {
        "dict": (linen_params(), 1, 4),
        "frozen": (flax.core.freeze(linen_params()), 1, 4),
        "partitioned": (linen_params(nn.with_partitioning), 1, 4),
        "logically partitioned": (linen_params(nn.with_logical_partitioning), 1, 4),
        "nnx state": (state, 3, 12),
        "nnx dict": (nnx.to_pure_dict(state), 3, 12),
        "dataclasses": (layers, 3, 9),
        "boxed by hand": ({"bn": {"scale": nnx.Param(ones[0])}, "w": nnx.Param(ones[0])}, 1, 2),
        "lists": ({"scale": ones, "bias": (ones, {"a": [ones]}), "w": ones}, 6, 12),
        "state dict": (flax.serialization.to_state_dict({"scale": ones, "w": ones}), 3, 6),
        "no names": (ones, 3, 3),
    }


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("name", containers())
def test_decay_spares_scale_and_bias_in_any_container(name, optimizer):
    """Without a gradient a weight θ becomes θ·(1 − η·λ), and the others keep their bits."""
    params, weights, count = containers()[name]
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3.0), params)
    transformation = create_optimizer(optimizer, 0.5, weight_decay=0.25)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = jax.jit(transformation.init)(params)
    updates, _ = jax.jit(transformation.update)(zeros, state, params)
    moved = optax.apply_updates(params, updates)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    leaves = jax.tree.leaves(moved)
    decayed = [leaf for leaf in leaves if np.all(np.abs(leaf - 3 * (1 - 0.5 * 0.25)) < 1e-6)]
    kept = [leaf for leaf in leaves if np.all(leaf == 3)]
    assert (len(decayed), len(decayed) + len(kept), len(leaves)) == (weights, count, count)


def test_the_weights_are_those_of_two_or_more_axes():
    """Of Flax's own layers, whatever holds them."""
    for name in ("dict", "frozen", "partitioned", "logically partitioned", "nnx state", "nnx dict"):
        params = containers()[name][0]
        expected = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
        assert jax.tree.leaves(weight_mask(params)) == jax.tree.leaves(expected), name


def test_a_container_without_names_is_refused():
    """The flat state of nnx, whose keys are numbers alone."""
    params = nnx.to_flat_state(nnx.state(NnxNetwork(nnx.Rngs(0)), nnx.Param))
    with pytest.raises(
        ValueError, match=r"params\[<flat index 0>\].value lies in a cont"
    ) as raised:
        create_optimizer("sgd", 0.1, weight_decay=0.1).init(params)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("adagrad", 0.1), {}, "optimizer='adagrad' is unknown: allowed are sgd, momentum, adam"),
        (("sgd", -0.1), {}, "learning_rate=-0.1 is not allowed: it must be ≥ 0"),
        (("sgd", float("nan")), {}, "learning_rate=nan is not allowed"),
        (("sgd", 0.1), dict(weight_decay=-1e-4), "weight_decay=-0.0001 is not allowed"),
        (("momentum", 0.1), dict(momentum=1.0), r"momentum=1.0 is not allowed.*\[0, 1\)"),
        (("momentum", 0.1), dict(momentum=-0.1), "momentum=-0.1 is not allowed"),
    ],
)
def test_bad_arguments(args, options, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(*args, **options)


def test_a_schedule_is_the_rate_of_each_update():
    """θ moves by −η_t·g with η_t of the number of updates made."""
    optimizer = create_optimizer("sgd", lambda count: 0.5 / (count + 1))
    params = jnp.zeros(())
    state = optimizer.init(params)
    for count in range(3):
        update, state = optimizer.update(jnp.float32(2), state, params)
        np.testing.assert_allclose(update, -2 * 0.5 / (count + 1), rtol=1e-6)
