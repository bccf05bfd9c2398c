"""The programs of `benchmarks.train_step` train the same networks."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import train_step
from benchmarks.turns import ratio
from bn_research.training.state import create_train_state
from bn_research.training.step import Batch, make_train_step


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_plain_flax_is_the_same_network(name):
    """From the same weights: the same losses."""
    network = train_step.NETWORKS[name]._replace(batch=8)
    images, labels = (jnp.asarray(v[:8]) for v in train_step.data(network))
    optimizer = optax.sgd(0.01, momentum=0.9)
    losses, shapes = [], []
    for make in (train_step.our_network, train_step.flax_network):
        model = make(network)

        def apply_fn(variables, image, *, train, model=model):
            logits, new = model.apply(variables, image, train=train, mutable=["batch_stats"])
            return logits, new["batch_stats"]

        state = create_train_state(
            lambda key, model=model: model.init(key, images[:1], train=False),
            optimizer,
            jax.random.key(0),
        )
        shapes.append(jax.tree.map(jnp.shape, state.params))
        step = jax.jit(make_train_step(apply_fn, optimizer))
        found = []
        for _ in range(3):
            state, metrics = step(state, Batch(images, labels))
            found.append(float(metrics.loss))
        losses.append(found)
    assert shapes[0] == shapes[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_pytorch_has_as_many_parameters(name):
    import torch

    from benchmarks.torch_networks import network as torch_network

    network = train_step.NETWORKS[name]
    model = torch_network(network.spec, network.image, torch.nn.ReLU)
    variables = jax.eval_shape(
        lambda key: train_step.our_network(network).init(
            key, jnp.zeros((1, *network.image)), train=False
        ),
        jax.random.key(0),
    )
    ours = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(p.numel() for p in model.parameters()) == ours


def test_products_of_a_step():
    """784·100 + 100·100·2 + 100·10 weights, three products each but for the images' gradient."""
    weights = 784 * 100 + 2 * 100 * 100 + 100 * 10
    gflop = 2 * 60 * (3 * weights - 784 * 100) / 1e9
    assert train_step.NETWORKS["mlp"].gflop == pytest.approx(gflop)


def test_ratio_is_of_each_round():
    assert ratio([1.0, 2.0, 6.0], [2.0, 4.0, 4.0]) == "0.50 [0.50, 1.00]"


def test_a_missing_peer_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    left_out = train_step.chosen("cnn")
    assert left_out["PyTorch"] == left_out["PyTorch, channels last"] == "PyTorch is not installed"
    assert left_out["Flax"] == ""


def test_every_program_takes_its_turns():
    """In processes of their own; times and memory come back."""
    command = ["-m", "benchmarks.train_step", "--network=mlp", "--seconds=1", "--json"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["mlp"]
    assert {train_step.OURS, "Flax", "Flax, scanned", "matrix product"} <= set(found)
    for one in found.values():
        assert len(one["seconds"]) >= 1 and min(one["seconds"]) > 0
        before, peak, at_end = one["memory"]
        assert 0 < before < at_end <= peak + 1
