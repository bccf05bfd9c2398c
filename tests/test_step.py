"""Train state and steps against gradients written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy.special import log_softmax

from bn_research.normalization import BatchStats, batch_norm, normalize, update_batch_stats
from bn_research.training.state import TrainState, create_train_state, digest
from bn_research.training.step import Batch, make_eval_step, make_train_step

DEVICES = 4


def data(count=16, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((count, 2, 3, 1)).astype(np.float32)
    return Batch(image, rng.integers(0, 4, count).astype(np.int32))


def linear(variables, images, train):
    """Logits and a running count of examples seen."""
    logits = images.reshape(len(images), -1) @ variables["params"]["w"]
    return logits, {"seen": variables["batch_stats"]["seen"] + train * len(images)}


def linear_init(key):
    return {
        "params": {"w": jax.random.normal(key, (6, 4))},
        "batch_stats": {"seen": jnp.zeros(())},
    }


def with_bn(variables, images, train, *, axis_name=None, where=None):
    """Dense → BN synced over axis_name."""
    params, stats = variables["params"], BatchStats(**variables["batch_stats"])
    h = images.reshape(len(images), -1) @ params["w"]
    if not train:
        return normalize(h, *stats, params["scale"], params["bias"]), stats._asdict()
    y, moments = batch_norm(h, params["scale"], params["bias"], axis_name=axis_name, where=where)
    return y, update_batch_stats(stats, moments, momentum=0.9)._asdict()


def bn_init(key):
    return {
        "params": {
            "w": jax.random.normal(key, (6, 4)),
            "scale": jnp.array([1.0, 2.0, 0.5, 1.5]),
            "bias": jnp.arange(4.0),
        },
        "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
    }


def same_bits(a, b):
    def raw(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def test_create_train_state():
    """Its key is neither the seed nor what initialized the model; equal seeds, equal bits."""
    seen = []

    def init(key):
        seen.append(key)
        return linear_init(key)

    key = jax.random.key(3)
    state = create_train_state(init, optax.adam(0.1), key)
    assert state.step == 0 and state.step.dtype == jnp.int32 and state.step.shape == ()
    keys = [np.asarray(jax.random.key_data(k)).tolist() for k in (key, state.key, seen[0])]
    assert len({tuple(k) for k in keys}) == 3
    same_bits(state.opt_state, optax.adam(0.1).init(state.params))
    same_bits(state, create_train_state(init, optax.adam(0.1), jax.random.key(3)))
    without_bn = create_train_state(lambda k: {"params": jnp.ones(2)}, optax.sgd(0.1), key)
    assert without_bn.batch_stats == {}


def test_digest():
    """Of every bit of params and batch_stats, and of nothing else."""
    state = create_train_state(linear_init, optax.sgd(0.1), jax.random.key(0))
    found = digest(state)
    assert len(found) == 64 and found == digest(state._replace(step=1, key=None, opt_state=()))
    bit = jnp.nextafter(state.params["w"][0, 0], 9)
    assert digest(state._replace(params={"w": state.params["w"].at[0, 0].set(bit)})) != found
    assert digest(state._replace(batch_stats={"seen": jnp.ones(())})) != found


@pytest.mark.parametrize("masked", [False, True])
def test_train_step_by_hand(masked):
    """The new w is w − η·xᵀ(p − onehot)/n with η = 0.5; loss and accuracy are of the old w."""
    optimizer = optax.sgd(0.5)
    state, batch = create_train_state(linear_init, optimizer, jax.random.key(0)), data()
    keep = np.arange(16) < (11 if masked else 16)
    if masked:
        batch = batch._replace(where=keep)
    new, metrics = jax.jit(make_train_step(linear, optimizer))(state, batch)
    w = np.asarray(state.params["w"], np.float64)
    x, label = batch.image.reshape(16, 6)[keep].astype(float), batch.label[keep]
    log_p = log_softmax(x @ w, 1)
    gradient = x.T @ (np.exp(log_p) - np.eye(4)[label]) / keep.sum()
    np.testing.assert_allclose(new.params["w"], w - 0.5 * gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, -log_p[np.arange(len(x)), label].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics.accuracy, (log_p.argmax(1) == label).mean(), rtol=1e-6)
    assert not metrics.diverged and new.step == 1 and new.batch_stats["seen"] == 16
    same_bits(new.key, state.key)


def seen(params, grads, new_params):
    return params["w"], grads["w"], new_params["w"]


def test_what_is_observed():
    """Old params, the gradient that made the step, and the params that it led to."""
    optimizer = optax.sgd(0.5)
    state, batch = create_train_state(linear_init, optimizer, jax.random.key(0)), data()
    new, metrics = jax.jit(make_train_step(linear, optimizer, observe=seen))(state, batch)
    old, gradient, observed = metrics.observed
    same_bits([old, observed], [state.params["w"], new.params["w"]])
    np.testing.assert_allclose(observed, old - 0.5 * gradient, rtol=1e-6)
    plain, metrics = jax.jit(make_train_step(linear, optimizer))(state, batch)
    assert metrics.observed == ()
    same_bits(plain, new)


def rooted(variables, images, train):
    """A finite loss whose gradient is not: the root of zero."""
    logits, stats = linear(variables, images, train)
    return logits + jnp.sqrt(jnp.sum(0 * variables["params"]["w"])), stats


def spoiled(kind):
    """Apply function, learning rate and images of a step that must not be taken."""
    batch = data()
    batch.image[...] *= 10
    if kind in ("nan", "inf"):
        batch.image[3, 0, 0, 0] = float(kind)
        return linear, 0.1, batch
    return (rooted, 0.1, batch) if kind == "gradient" else (linear, 3e38, batch)


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient", "params"])
def test_a_step_that_is_not_finite_is_not_taken(kind):
    """Loss, gradient or new params: state keeps its bits, the step is counted and reported.

    Even by an optimizer that would make something finite of the gradient.
    """
    apply_fn, rate, bad = spoiled(kind)
    optimizer = optax.chain(optax.zero_nans(), optax.trace(0.9), optax.scale(-rate))
    state = create_train_state(linear_init, optimizer, jax.random.key(0))
    if kind != "params":  # so that momentum and statistics are away from zero
        state, metrics = jax.jit(make_train_step(linear, optimizer))(state, data())
        assert not metrics.diverged
    new, metrics = jax.jit(make_train_step(apply_fn, optimizer, observe=seen))(state, bad)
    assert metrics.diverged and new.step == state.step + 1
    same_bits(metrics.observed[2], state.params["w"])
    same_bits(new._replace(step=state.step), state)


def replicated_step(kind, step):
    """The step over a leading axis of devices of the batch; state and results of device 0."""
    if kind == "vmap":
        mapped = jax.vmap(step, axis_name="batch", in_axes=(None, 0))
    elif kind == "pmap":
        devices = jax.devices()[:DEVICES]
        mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0), devices=devices)
    else:
        mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("batch",))

        def local(state, batch):
            out = step(state, jax.tree.map(lambda leaf: leaf[0], batch))
            return jax.tree.map(lambda leaf: leaf[None], out)

        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("batch")),
            out_specs=PartitionSpec("batch"),
            check_vma=False,
        )
    return lambda *args: jax.tree.map(lambda leaf: leaf[0], jax.jit(mapped)(*args))


KINDS = ["vmap", "pmap", "shard_map"]


def split(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), tree)


def one_large_batch(batch, **options):
    optimizer = optax.sgd(0.5, momentum=0.9)
    state = create_train_state(bn_init, optimizer, jax.random.key(1))
    apply_fn = functools.partial(with_bn, **options)
    step = jax.jit(make_train_step(apply_fn, optimizer, observe=seen))
    return optimizer, state, step(state, batch)


def close(got, expected):
    got, expected = ((*r[0][1:4], r[1]) for r in (got, expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-4, atol=1e-5),
        got,
        expected,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_devices_equal_one_large_batch(kind):
    """With synced BN: params, batch_stats, opt_state and metrics, what is observed among them."""
    assert jax.device_count() >= DEVICES
    batch = data()
    optimizer, state, expected = one_large_batch(batch)
    step = make_train_step(
        functools.partial(with_bn, axis_name="batch"), optimizer, axis_name="batch", observe=seen
    )
    close(replicated_step(kind, step)(state, split(batch)), expected)


def test_devices_with_unequal_numbers_of_valid_examples():
    """The mean is over the examples, not over the devices."""
    assert jax.device_count() >= DEVICES
    batch = data()._replace(where=np.arange(16) < 9)
    optimizer, state, expected = one_large_batch(batch)
    step = make_train_step(
        functools.partial(with_bn, axis_name="batch"), optimizer, axis_name="batch", observe=seen
    )
    close(replicated_step("pmap", step)(state, split(batch)), expected)


def test_one_bad_device_stops_the_step_on_all():
    assert jax.device_count() >= DEVICES
    batch = data()
    batch.image[-1] = np.nan
    optimizer = optax.sgd(0.5)
    state = create_train_state(linear_init, optimizer, jax.random.key(0))
    step = jax.pmap(
        make_train_step(linear, optimizer, axis_name="batch"),
        axis_name="batch",
        in_axes=(None, 0),
        devices=jax.devices()[:DEVICES],
    )
    new, metrics = step(state, split(batch))
    assert np.all(metrics.diverged)
    for device in range(DEVICES):
        np.testing.assert_array_equal(new.params["w"][device], state.params["w"])


def test_eval_step_uses_the_running_statistics():
    batch = data()._replace(where=np.arange(16) % 3 > 0)
    variables = bn_init(jax.random.key(2))
    stats = {"mean": np.array([0.5, 1, -1, 0]), "var": np.array([2.0, 1, 0.5, 3])}
    state = TrainState(0, variables["params"], stats, (), jax.random.key(0))
    metrics = jax.jit(make_eval_step(with_bn))(state, batch)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    h = batch.image.reshape(16, 6) @ p["w"]
    logits = p["scale"] * (h - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) + p["bias"]
    loss = -log_softmax(logits, 1)[np.arange(16), batch.label]
    correct = logits.argmax(1) == batch.label
    expected = [loss[batch.where].sum(), correct[batch.where].sum(), batch.where.sum()]
    np.testing.assert_allclose(metrics, expected, rtol=1e-5)
