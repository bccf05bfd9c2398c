"""Checkpoints of models with Flax's BatchNorm restore into the same models with ours, and back.

Real files: orbax for flax.linen and flax.nnx, and Flax's own msgpack for flax.linen.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.traverse_util import flatten_dict

from bn_research.layers import linen
from bn_research.layers import nnx as own_nnx

IMAGES = np.random.default_rng(0).standard_normal((4, 8, 6, 6, 2)).astype(np.float32) * 2 + 1
LABELS = np.random.default_rng(1).integers(0, 3, (4, 8))
ADAM = optax.adam(0.01)
BOTH_WAYS = ["Flax's into ours", "ours into Flax's"]


def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def close(own, flax, tolerance):
    """Every leaf, relative to its largest entry."""
    assert jax.tree.structure(own) == jax.tree.structure(flax)
    for ours, theirs in zip(jax.tree.leaves(own), jax.tree.leaves(flax), strict=True):
        atol = tolerance * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def layout(tree):
    """Path, shape and dtype of each leaf."""
    return {
        jax.tree_util.keystr(path): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def through_orbax(path, tree, template):
    """Saves the tree, and restores it as what the template is."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, template)


def through_msgpack(path, tree, template):
    path.write_bytes(serialization.to_bytes(tree))
    return serialization.from_bytes(template, path.read_bytes())


class Block(nn.Module):
    """Conv → BN → relu, with automatic names."""

    layer: type[nn.Module]

    @nn.compact
    def __call__(self, x, train):
        """Four channels."""
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        return nn.relu(self.layer(use_running_average=not train, momentum=0.9)(x))


class ConvNet(nn.Module):
    """BN on the images, two blocks and a linear head."""

    layer: type[nn.Module]

    @nn.compact
    def __call__(self, x, train):
        """Logits of three classes."""
        x = self.layer(use_running_average=not train, momentum=0.9)(x)
        for _ in range(2):
            x = Block(self.layer)(x, train)
        return nn.Dense(3)(jnp.mean(x, (1, 2)))


@functools.cache
def linen_model(layer):
    """Fresh variables, a training step by SGD, and the evaluation of a model with this layer."""
    net = ConvNet(layer)

    @jax.jit
    def step(variables, images, labels):
        def loss(params):
            logits, new = net.apply(
                {**variables, "params": params}, images, True, mutable=["batch_stats"]
            )
            return cross_entropy(logits, labels), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return {"params": params, **new}

    @jax.jit
    def evaluate(variables, images):
        return net.apply(variables, images, False)

    fresh = jax.jit(net.init, static_argnums=2)(jax.random.key(0), IMAGES[0], True)
    return fresh, step, evaluate


@pytest.mark.parametrize("through", [through_orbax, through_msgpack])
@pytest.mark.parametrize("way", BOTH_WAYS)
def test_linen(tmp_path, through, way):
    layers = [nn.BatchNorm, linen.BatchNorm]
    if way == "ours into Flax's":
        layers.reverse()
    (trained, step, evaluate), (fresh, other_step, other_evaluate) = map(linen_model, layers)
    for images, labels in zip(IMAGES[:3], LABELS[:3], strict=True):
        trained = step(trained, images, labels)
    restored = through(tmp_path / "checkpoint", trained, fresh)

    assert layout(restored) == layout(trained) == layout(fresh)
    expected = {"BatchNorm_0", "Block_0/BatchNorm_0", "Block_1/BatchNorm_0"}
    flat = flatten_dict(restored["batch_stats"], sep="/")
    assert set(flat) == {f"{name}/{leaf}" for name in expected for leaf in ("mean", "var")}
    jax.tree.map(np.testing.assert_array_equal, restored, trained)

    logits = evaluate(trained, IMAGES[3])
    close(other_evaluate(restored, IMAGES[3]), logits, 1e-5)
    assert np.abs(logits - other_evaluate(fresh, IMAGES[3])).max() > 0.01
    close(other_step(restored, IMAGES[3], LABELS[3]), step(trained, IMAGES[3], LABELS[3]), 1e-4)


class NnxBlock(nnx.Module):
    """Conv → BN → relu."""

    def __init__(self, layer, channels, rngs):
        """Draws the weights."""
        self.conv = nnx.Conv(channels, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn = layer(4, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        """Four channels."""
        return nnx.relu(self.bn(self.conv(x)))


class NnxConvNet(nnx.Module):
    """BN on the images, two blocks and a linear head."""

    def __init__(self, layer, seed):
        """Draws the weights."""
        rngs = nnx.Rngs(seed)
        self.bn = layer(2, momentum=0.9, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(layer, channels, rngs) for channels in (2, 4)])
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        """Logits of three classes."""
        x = self.bn(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, (1, 2)))


@nnx.jit
def nnx_step(net, optimizer, images, labels):
    grads = nnx.grad(lambda net: cross_entropy(net(images), labels))(net)
    optimizer.update(net, grads)


@nnx.jit
def nnx_evaluate(net, images):
    net.eval()
    logits = net(images)
    net.train()
    return logits


@pytest.mark.parametrize("way", BOTH_WAYS)
def test_nnx(tmp_path, way):
    """The model's state and the optimizer's."""
    layers = [nnx.BatchNorm, own_nnx.BatchNorm]
    if way == "ours into Flax's":
        layers.reverse()
    nets = [NnxConvNet(layer, seed) for seed, layer in enumerate(layers)]
    trained, restored = ((n, nnx.Optimizer(n, ADAM, wrt=nnx.Param)) for n in nets)
    for images, labels in zip(IMAGES[:3], LABELS[:3], strict=True):
        nnx_step(*trained, images, labels)
    before = nnx_evaluate(restored[0], IMAGES[3])
    saved, template = nnx.state(trained), nnx.state(restored)
    loaded = through_orbax(tmp_path / "checkpoint", saved, template)

    assert layout(loaded) == layout(saved) == layout(template)
    stats = nnx.to_flat_state(nnx.state(trained[0], nnx.BatchStat))
    expected = {("bn",), ("blocks", 0, "bn"), ("blocks", 1, "bn")}
    assert {path for path, _ in stats} == {(*p, leaf) for p in expected for leaf in ("mean", "var")}
    nnx.update(restored, loaded)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(restored), saved)

    logits = nnx_evaluate(trained[0], IMAGES[3])
    close(nnx_evaluate(restored[0], IMAGES[3]), logits, 1e-5)
    assert np.abs(logits - before).max() > 0.01
    for pair in (trained, restored):
        nnx_step(*pair, IMAGES[3], LABELS[3])
    close(nnx.state(restored), nnx.state(trained), 1e-4)
