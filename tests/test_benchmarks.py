"""The benchmarks measure what they say: equal networks, equal work, every program in its turn."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import (
    batch_norm,
    command_line,
    memory,
    networks,
    quick,
    startup,
    train_programs,
    train_step,
)
from benchmarks.networks import NETWORKS
from benchmarks.turns import Measured, Memory, ratio
from bn_research.models import inception
from bn_research.training.state import create_train_state
from bn_research.training.step import Batch, make_train_step

TORCH = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")


def from_json(*command):
    done = subprocess.run(
        [sys.executable, "-m", *command, "--json"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_flax_is_the_same_network(name, monkeypatch):
    """From the same weights: the same losses."""
    monkeypatch.setattr(inception, "max_pool", inception.max_pool)  # put back after the test
    network = NETWORKS[name]._replace(batch=8)
    images, labels = (jnp.asarray(v[:8]) for v in networks.data(network))
    optimizer = optax.sgd(0.01, momentum=0.9)
    losses, shapes = [], []
    for make in (networks.our_network, networks.flax_network):
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


@TORCH
@pytest.mark.parametrize("name", NETWORKS)
def test_pytorch_has_as_many_parameters(name):
    import torch

    from benchmarks.torch_networks import torch_network

    network = NETWORKS[name]
    model = torch_network(network)
    images = jnp.zeros((2, *network.image))
    variables = jax.eval_shape(
        lambda key: networks.our_network(network).init(key, images, train=False),
        jax.random.key(0),
    )
    ours = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(p.numel() for p in model.parameters()) == ours
    assert model(torch.zeros(2, network.image[2], *network.image[:2])).shape == (2, 10)


def test_products_of_a_step(monkeypatch):
    """Three products a layer, but for the images' gradient, against weights counted by hand."""
    monkeypatch.setattr(inception, "max_pool", inception.max_pool)
    weights = 784 * 100 + 2 * 100 * 100 + 100 * 10
    gflop = 2 * 60 * (3 * weights - 784 * 100) / 1e9
    assert networks.gflop(NETWORKS["mlp"]) == pytest.approx(gflop)
    first = 32 * 32 * 9 * 3 * 32
    rest = 32 * 32 * 9 * 32 * 32 + 16 * 16 * 9 * (32 * 64 + 64 * 64)
    rest += 8 * 8 * 9 * (64 * 128 + 128 * 128) + 4 * 4 * 128 * 10
    assert networks.gflop(NETWORKS["cnn"]) == pytest.approx(2 * 128 * (2 * first + 3 * rest) / 1e9)
    # Inception's first module: 8 channels of 7×7 in, branches of figure 5 at an eighth.
    one = NETWORKS["inception"]._replace(modules=("3a",))
    stem = 14 * 14 * 9 * 1 * 8
    module = 7 * 7 * (8 * 8 + 8 * 8 + 9 * 8 * 8 + 8 * 8 + 9 * 8 * 12 + 9 * 12 * 12 + 8 * 4)
    head = (8 + 8 + 12 + 4) * 10
    expected = 2 * 32 * (2 * stem + 3 * (module + head)) / 1e9
    assert networks.gflop(one) == pytest.approx(expected)


def test_ratio_is_of_each_round():
    assert ratio([1.0, 2.0, 6.0], [2.0, 4.0, 4.0]) == "0.50 [0.50, 1.00]"


def test_a_missing_peer_is_said_and_the_others_stay(monkeypatch):
    find = importlib.util.find_spec
    absent = {"torch", "haiku"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    reasons = train_programs.left_out("cnn")
    assert reasons["PyTorch"] == reasons["PyTorch, channels last"] == "PyTorch is not installed"
    assert reasons["Flax"] == ""
    layers = batch_norm.left_out()
    assert layers["PyTorch"] == "torch is not installed"
    assert layers["dm-haiku"] == "haiku is not installed"
    assert layers["bn_research"] == layers["flax.linen (default)"] == ""
    one = Measured(
        {f"{kind}, {part}": [1.0, 2.0] for kind in batch_norm.SHAPES for part in batch_norm.PASSES},
        Memory(1.0, 2.0, 3.0),
    )
    measured = {mode: {n: one for n, why in layers.items() if not why} for mode in batch_norm.MODES}
    table = batch_norm.markdown(measured, layers, batch_norm.SHAPES)
    assert "| dm-haiku | left out: haiku is not installed |" in table
    assert "| flax.linen (default) | 1.00 [1.00, 1.00] |" in table
    kept = memory.residuals()
    assert kept["PyTorch"] == "torch is not installed"
    assert kept["dm-haiku"] == "haiku is not installed"


def test_what_is_kept_for_the_gradient():
    kept = memory.residuals()
    for dtype in memory.DTYPES:
        assert kept["bn_research"][dtype] == pytest.approx(1, abs=0.001)
        assert kept["flax.linen (default)"][dtype] >= 1


def test_every_training_program_takes_its_turns():
    """In processes of their own; times and memory come back."""
    found = from_json("benchmarks.train_step", "--network=mlp", "--seconds=1")
    assert set(found["left out"]["mlp"]) >= {train_step.OURS, "Flax", "Flax, scanned", "PyTorch"}
    assert {train_step.OURS, "Flax", "Flax, scanned", train_step.PRODUCT} <= set(found["mlp"])
    for one in found["mlp"].values():
        assert len(one["seconds"]["step"]) >= 1 and min(one["seconds"]["step"]) > 0
        before, peak, at_end = one["memory"]
        assert 0 < before < at_end <= peak + 1


def test_a_start_has_its_parts():
    found = from_json("benchmarks.startup", "--network=mlp", "--rounds=1")["mlp"]
    assert {startup.CACHED, startup.OURS, "Flax"} <= set(found)
    for (one,) in found.values():
        assert set(one) == set(startup.Started._fields) and min(one.values()) > 0


def test_what_a_user_waits_for():
    """Of an experiment that cannot run here its own words are told."""
    table = quick.markdown(
        {
            "one": quick.Waited([95.0, 30.0], ""),
            "two": quick.Waited([], "two: no data"),
        }
    )
    assert "| `one` | 95 s **missed** | 30 s |" in table
    assert "| `two` | two: no data |  |" in table
    table = command_line.markdown({"one": [1.0, 1.5, 2.5], "two": [1.0, 2.5, 2.0]})
    assert "| `one` | 1.50 [1.00, 2.50] |" in table
    assert "| `two` | 2.00 [1.00, 2.50] **missed** |" in table
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quick", "--only=no_such"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--only=no_such: allowed are init_sensitivity" in done.stderr
