"""Tests of what trains, and of the noise in the logits, in experiments.regularization."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.models.cnn import CNN
from bn_research.training.loop import epoch_order
from bn_research.training.state import TrainState
from bn_research.training.step import Batch
from experiments.regularization.measurements import dose
from experiments.regularization.training import NORMS, Data, Network, Trainer, make_model, optimizer

NETWORK = Network("f5 f3", group_size=4, batch_size=8, rate=0.2)
ONE = jnp.zeros((1, 2, 2, 1))
FLAX = functools.partial(nn.BatchNorm, epsilon=1e-5)


def examples(count, seed):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((count, 2, 2, 1)).astype(np.float32)
    return Batch(jnp.asarray(image), jnp.asarray(rng.integers(0, 3, count)))


DATA = Data(examples(24, 0), examples(7, 1), examples(9, 2))


@pytest.fixture
def trainer(tmp_path):
    ledger = Ledger(tmp_path / "metrics.jsonl")
    with Runner(tmp_path, ledger, total_steps=100, strategy="devices") as runner:
        yield Trainer(runner, DATA, num_steps=4, steps_per_dispatch=1)


def cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    return -np.mean(log_softmax(logits, axis=1)[np.arange(len(labels)), labels])


def started(seed, norm=FLAX):
    """Loss of groups of examples at the start, by Flax's layers, and the order of the epoch."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    model = CNN(NETWORK.network, norm, "hidden" if norm else "none", nn.initializers.he_normal())
    variables = model.init(init_key, ONE, train=False)

    def loss(*groups):
        logits = [
            model.apply(variables, DATA.train.image[group], train=True, mutable=["batch_stats"])[0]
            for group in groups
        ]
        rows = np.concatenate(groups)
        return cross_entropy(np.concatenate(logits), np.asarray(DATA.train.label)[rows])

    return loss, np.asarray(epoch_order(run_key, jnp.int32(0), 24))


def test_groups_share_statistics_and_nothing_else_changes(trainer):
    """First loss of a batch of 8 in groups of 4, by Flax's own layer applied to each group."""
    (record,) = trainer.train([("groups", NETWORK)], [3])
    (whole,) = trainer.train([("whole", NETWORK.replace(group_size=0))], [3])
    loss, order = started(3)
    assert record["loss"][0] == pytest.approx(loss(order[:4], order[4:8]), rel=1e-5)
    assert whole["loss"][0] == pytest.approx(loss(order[:8]), rel=1e-5)
    assert abs(loss(order[:8]) - loss(order[:4], order[4:8])) > 1e-3


def test_all_arms_of_a_seed_begin_with_the_same_weights_and_see_the_same_batches(trainer):
    """Against the plain network at its initialization on the first batch; BN's kernels are its."""
    plain = NETWORK.replace(norm="none", group_size=0)
    records = trainer.train([("BN", NETWORK), ("plain", plain)], [5])
    loss, order = started(5, norm=None)
    assert records[1]["loss"][0] == pytest.approx(loss(order[:8]), rel=1e-5)
    assert records[0]["loss"][0] != pytest.approx(loss(order[:8]), rel=1e-3)
    key = jax.random.split(jax.random.key(5))[0]
    created = [make_model(run).init(key, ONE, train=False)["params"] for run in (NETWORK, plain)]
    for layer in ("dense1", "dense2"):
        np.testing.assert_array_equal(created[0][layer]["kernel"], created[1][layer]["kernel"])


def test_frozen_groups_are_drawn_once(trainer):
    """The losses of a network that cannot learn are those of its batches, in groups drawn once."""
    network = NETWORK.replace(rate=0.0, regrouped=False)
    (record,) = trainer.train([("frozen", network)], [0])
    loss, order = started(0)
    losses = [loss(group) for group in order.reshape(6, 4)]
    pairs = [(losses[i] + losses[j]) / 2 for i in range(6) for j in range(i)]
    # Three batches are an epoch: every group once; the fourth batch is of the same six groups.
    assert np.sum(record["loss"][:3]) == pytest.approx(np.sum(losses) / 2, rel=1e-5)
    assert np.min(np.abs(np.array(pairs) - record["loss"][3])) < 1e-5


@pytest.mark.parametrize("group_size", [0, 4, 8])
def test_population_statistics_and_evaluation_by_hand(trainer, group_size):
    """Algorithm 2 over all groups, and the three sets' scores, in float64 with numpy."""
    states = []
    network = NETWORK.replace(group_size=group_size)
    keep = lambda network, state: states.append(state) or {}  # noqa: E731
    (record,) = trainer.train([("BN", network)], [1], measure=keep)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), states[0].params)
    flat = [np.asarray(b.image, np.float64).reshape(len(b.label), -1) for b in DATA]
    hidden = [x @ params["dense1"]["kernel"] + params["dense1"]["bias"] for x in flat]
    batches = np.split(hidden[0], 24 // (group_size or 8))
    mean = np.mean([b.mean(axis=0) for b in batches], axis=0)
    var = np.mean([b.var(axis=0, ddof=1) for b in batches], axis=0)
    stats = states[0].batch_stats["batch_norm1"]
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-4)
    for name, x, examples in zip(Data._fields, hidden, DATA, strict=True):
        normalized = (x - mean) / np.sqrt(var + 1e-5)
        y = normalized * params["batch_norm1"]["scale"] + params["batch_norm1"]["bias"]
        logits = np.maximum(y, 0) @ params["dense2"]["kernel"] + params["dense2"]["bias"]
        labels = np.asarray(examples.label)
        assert record[f"{name}_loss"] == pytest.approx(cross_entropy(logits, labels), rel=1e-4)
        assert record[f"{name}_accuracy"] == pytest.approx(np.mean(logits.argmax(1) == labels))


def test_the_rate_falls_to_zero_by_a_cosine():
    """θ ← θ − η_t·v, v ← 0.9·v + 1, of a gradient of 1: against the recursion."""
    sgd = optimizer(NETWORK, 10)
    theta, state = jnp.zeros(()), sgd.init(jnp.zeros(()))
    expected, v = 0.0, 0.0
    for step in range(10):
        update, state = sgd.update(jnp.ones(()), state)
        theta, v = theta + update, 0.9 * v + 1
        expected -= 0.2 * 0.5 * (1 + np.cos(np.pi * step / 10)) * v
    assert float(theta) == pytest.approx(expected, rel=1e-5)


def test_norms_by_name():
    assert make_model(NETWORK.replace(norm="none")).placement == "none"
    for norm in NORMS[2:]:
        network = NETWORK.replace(norm=norm)
        assert network.stochastic
        layer = make_model(network).norm(name="x", use_running_average=False)
        assert layer.noise == ("none" if norm == "population" else norm)
        assert layer.population == "running" and layer.group_size == 4
    assert not NETWORK.stochastic
    assert NETWORK.replace(dropout_placement="after").stochastic


def test_the_state_that_is_measured_is_not_the_trainings(trainer):
    """Statistics under another dropout are those of the same weights, elsewhere."""
    network = NETWORK.replace(dropout_placement="before", dropout=0.5, group_size=0)
    found = []

    def measure(network, state):
        assert isinstance(state, TrainState)
        off = trainer.with_population_stats(network.replace(dropout=0.0), state)
        found.extend([state, off])
        return {"extra": 1.0}

    (record,) = trainer.train([("dropout", network)], [0], measure=measure)
    assert record["extra"] == 1.0
    on, off = (s.batch_stats["batch_norm1"]["var"] for s in found)
    assert np.all(np.asarray(on) > 1.2 * np.asarray(off))  # (var + p·mean²)/(1 − p), p = 1/2


@pytest.fixture
def short(trainer):
    """Of examples that do not fill whole batches."""
    examples = jax.tree.map(lambda leaf: leaf[:18], DATA.train)
    return dataclasses.replace(trainer, data=DATA._replace(train=examples))


def state_of(network):
    variables = make_model(network).init(jax.random.key(1), ONE, train=False)
    stats = variables.get("batch_stats", {})
    return TrainState(jnp.int32(0), variables["params"], stats, (), jax.random.key(0))


def test_dose_of_groups_by_hand(short):
    """Eight orders of sixteen examples, in groups of four, in float64."""
    state = state_of(NETWORK)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    x = np.asarray(DATA.train.image[:16], np.float64).reshape(16, -1)
    hidden = x @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    z = np.empty((8, 16, 3))
    for number, key in enumerate(jax.random.split(jax.random.key(40_000), 8)):
        order = np.asarray(jax.random.permutation(jax.random.split(key)[0], 16))
        for group in order.reshape(4, 4):
            h = hidden[group]
            h = (h - h.mean(axis=0)) / np.sqrt(h.var(axis=0) + 1e-5)
            z[number, group] = np.maximum(h, 0) @ params["dense2"]["kernel"]
    z += params["dense2"]["bias"]
    z -= z.mean(axis=2, keepdims=True)
    noise = z.var(axis=0, ddof=1).mean(axis=0).sum()
    signal = z.mean(axis=0).var(axis=0).sum()
    assert dose(short, NETWORK, state)["dose"] == pytest.approx(noise / signal, rel=1e-4)


def test_what_adds_no_noise_has_no_dose_and_drawn_noise_has_one(short):
    """None without BN, and by the statistics of the whole set, whatever its order."""
    for network in (NETWORK.replace(norm="none"), NETWORK.replace(group_size=0, batch_size=16)):
        assert dose(short, network, state_of(network))["dose"] < 1e-10
    for norm in NORMS[3:]:
        network = NETWORK.replace(norm=norm, population="batch", batch_size=16)
        assert dose(short, network, state_of(network))["dose"] > 1e-3
