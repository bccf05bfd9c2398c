"""Train state and steps against gradients written out by hand."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy.special import log_softmax

from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN
from bn_research.normalization import BatchStats, batch_norm, normalize, update_batch_stats
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState, create_train_state, digest
from bn_research.training.step import Batch, apply_fn_of, make_eval_step, make_train_step

DEVICES = 4


def data(count=16, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((count, 2, 3, 1)).astype(np.float32)
    return Batch(image, rng.integers(0, 4, count).astype(np.int32))


def linear(variables, images, train, where=None):
    """Logits and a running count of examples seen."""
    logits = images.reshape(len(images), -1) @ variables["params"]["w"]
    seen = len(images) if where is None else jnp.sum(where)
    return logits, {"seen": variables["batch_stats"]["seen"] + train * seen}


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
    mask = None if where is None else where[:, None]
    y, moments = batch_norm(h, params["scale"], params["bias"], axis_name=axis_name, where=mask)
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


@pytest.mark.parametrize("placement", ["all", "none"])
def test_apply_fn_of_a_module(placement):
    """New statistics in training, where there are any; else those that were given."""
    model, image = CNN("c2 f3", BatchNorm, placement), jnp.arange(32.0).reshape(2, 4, 4, 1)
    variables = {"batch_stats": {}, **model.init(jax.random.key(0), image, train=False)}
    apply_fn = apply_fn_of(model)
    logits, stats = apply_fn(variables, image, train=False)
    np.testing.assert_array_equal(logits, model.apply(variables, image, train=False))
    assert stats is variables["batch_stats"]
    logits, stats = apply_fn(variables, image, train=True)
    expected, new = model.apply(variables, image, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, stats, new.get("batch_stats", {}))
    assert bool(stats) == (placement == "all")


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
    assert not metrics.diverged and new.step == 1 and new.batch_stats["seen"] == keep.sum()
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


def test_what_is_compiled_grows_as_the_network_does():
    """Whether a step is finite is not asked again beside each parameter."""
    mesh, optimizer = Mesh(jax.devices()[:2], "i"), optax.sgd(0.1)
    sizes = []
    for layers in (10, 40):

        def deep(variables, images, train):
            h = images.reshape(len(images), -1)
            for w in variables["params"]:
                h = jnp.tanh(h @ w)
            return h, variables["batch_stats"]

        init = {"params": [jnp.eye(6)] * layers}
        state = create_train_state(lambda key, init=init: init, optimizer, jax.random.key(0))
        step = jax.shard_map(
            make_train_step(deep, optimizer, axis_name="i"),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("i")),
            out_specs=PartitionSpec(),
        )
        compiled = jax.jit(step).lower(state, data()).compile().as_text()
        sizes.append(len(re.findall(r" = \S+ \w[\w-]*\(", compiled)))
    assert sizes[1] < 5 * sizes[0]


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


# --- padding ---


def flax_bn(variables, images, train, *, where=None):
    """The same by Flax's layer, which makes NaN of no example at all."""
    params, stats = variables["params"], variables["batch_stats"]
    h = images.reshape(len(images), -1) @ params["w"]
    own = {"params": {name: params[name] for name in ("scale", "bias")}, "batch_stats": stats}
    mask = None if where is None else where[:, None]
    layer = nn.BatchNorm(use_running_average=not train, momentum=0.9)
    y, new = layer.apply(own, h, mask=mask, mutable=["batch_stats"])
    return y, new["batch_stats"]


def spelled_out(params, images, labels):
    """Mean loss of examples that share statistics, and these: in plain arithmetic."""
    h = images.reshape(len(images), -1) @ params["w"]
    mean, var = jnp.mean(h, 0), jnp.var(h, 0)
    logits = params["scale"] * (h - mean) / jnp.sqrt(var + 1e-5) + params["bias"]
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(log_p[jnp.arange(len(labels)), labels]), (mean, var)


def expected_step(state, parts, rate):
    """Loss, params and running statistics after a step on parts [(images, labels), ...]."""
    total = sum(len(labels) for _, labels in parts)

    def loss_fn(params):
        found = [spelled_out(params, *part) for part in parts]
        weights = [len(labels) / total for _, labels in parts]
        loss = sum(w * loss for w, (loss, _) in zip(weights, found, strict=True))
        means = [sum(w * s[i] for w, (_, s) in zip(weights, found, strict=True)) for i in (0, 1)]
        return loss, means

    (loss, means), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    old = [state.batch_stats[name] for name in ("mean", "var")]
    stats = [0.9 * a + 0.1 * b for a, b in zip(old, means, strict=True)]
    params = jax.tree.map(lambda p, g: p - rate * g, state.params, grads)
    return loss, params, dict(mean=stats[0], var=stats[1])


def state_64():
    state = create_train_state(bn_init, optax.sgd(0.5), jax.random.key(1))
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, state
    )


# Numbers of valid examples in each part of four: none, one part in part, few, all, one after none.
VALID = [(4, 4, 4, 4), (4, 3, 0, 2), (0, 0, 4, 2), (2, 4, 4, 3), (0, 2, 0, 0)]


def padded(valid, filling, interleaved):
    """A batch of 4 parts of 4 with so many valid, float64, and the valid examples of each part."""
    batch = data()
    image = batch.image.astype(np.float64).reshape(4, 4, *batch.image.shape[1:])
    label = batch.label.reshape(4, 4)
    where = np.arange(4) < np.array(valid)[:, None]
    if interleaved:
        where = where[:, ::-1]
    parts = [(image[i][where[i]], label[i][where[i]]) for i in range(4) if np.any(where[i])]
    image = np.where(where.reshape(4, 4, 1, 1, 1), image, filling)
    label = np.where(where, label, 3)
    return Batch(image, label, where), parts


def check_step(got, state, parts):
    new, metrics = got
    loss, params, stats = expected_step(state, parts, 0.5)
    assert not np.any(metrics.diverged)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13),
        (metrics.loss, new.params, new.batch_stats),
        (loss, params, stats),
    )


@pytest.mark.parametrize("apply_fn", [with_bn, flax_bn])
@pytest.mark.parametrize("filling", [0.0, 1e30, np.nan, np.inf])
@pytest.mark.parametrize("valid", VALID)
def test_padding_reaches_nothing(valid, filling, apply_fn):
    """A step is that of the examples there are: whole, in microbatches, and as one batch of these.

    With microbatches each counts by its examples, and one of padding alone not at all.
    """
    with jax.enable_x64(True):
        state = state_64()
        batch, parts = padded(valid, filling, interleaved=filling == 1e30)
        whole = [tuple(np.concatenate(leaves) for leaves in zip(*parts, strict=True))]
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
        for accumulated, given, expected in (
            (None, flat, whole),
            ("batch", batch, whole),
            ("microbatch", batch, parts),
        ):
            options = dict(accumulated_statistics=accumulated)
            step = jax.jit(make_train_step(apply_fn, optax.sgd(0.5), **options))
            check_step(step(state, given), state, expected)


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("valid", VALID)
def test_padding_on_devices_reaches_nothing(valid, synced):
    """A device counts by its examples, and one with padding alone not at all."""
    with jax.enable_x64(True):
        state = state_64()
        batch, parts = padded(valid, np.nan, interleaved=False)
        if synced:
            parts = [tuple(np.concatenate(leaves) for leaves in zip(*parts, strict=True))]
        apply_fn = functools.partial(with_bn, axis_name="batch" if synced else None)
        step = make_train_step(apply_fn, optax.sgd(0.5), axis_name="batch")
        check_step(replicated_step("vmap", step)(state, batch), state, parts)
        if valid == VALID[1]:
            check_step(replicated_step("pmap", step)(state, batch), state, parts)


def test_padding_on_devices_in_microbatches():
    """Two devices with two microbatches each, of their own statistics."""
    with jax.enable_x64(True):
        state = state_64()
        batch, parts = padded((4, 0, 1, 3), np.nan, interleaved=True)
        step = make_train_step(
            with_bn, optax.sgd(0.5), axis_name="batch", accumulated_statistics="microbatch"
        )
        pairs = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), batch)
        check_step(replicated_step("vmap", step)(state, pairs), state, parts)


def test_a_batch_of_padding_alone_is_a_step_without_a_gradient():
    state = create_train_state(bn_init, optax.sgd(0.5), jax.random.key(1))
    batch = data()._replace(where=np.zeros(16, bool))
    batch.image[...] = np.nan
    quarters = jax.tree.map(lambda leaf: leaf.reshape(4, 4, *leaf.shape[1:]), batch)
    for accumulated, given in ((None, batch), ("microbatch", quarters)):
        step = make_train_step(with_bn, optax.sgd(0.5), accumulated_statistics=accumulated)
        new, metrics = jax.jit(step)(state, given)
        assert metrics.loss == 0 and not metrics.diverged
        same_bits(new._replace(step=state.step), state)


def test_padding_and_randomness():
    """Each example keeps its key, and padding has one that reaches nothing."""

    def apply_fn(variables, images, train, keys, where=None):
        noise = jax.vmap(jax.random.normal, (0, None))(keys, images.shape[1:])
        return with_bn(variables, images + noise, train, where=where)

    step = jax.jit(make_train_step(apply_fn, optax.sgd(0.5), stochastic=True))
    state, batch = create_train_state(bn_init, optax.sgd(0.5), jax.random.key(1)), data()
    short = jax.tree.map(lambda leaf: leaf[:11], batch)
    batch.image[11:] = np.nan
    close(step(state, batch._replace(where=np.arange(16) < 11)), step(state, short))


@pytest.mark.parametrize("accumulated", [None, "microbatch", "batch"])
def test_a_mask_that_apply_fn_does_not_take_is_refused(accumulated):
    """Without a mask the same function is welcome."""

    def apply_fn(variables, images, train):
        return with_bn(variables, images, train)

    state = create_train_state(bn_init, optax.sgd(0.5), jax.random.key(1))
    batch = jax.tree.map(lambda leaf: leaf[None] if accumulated else leaf, data())
    step = make_train_step(apply_fn, optax.sgd(0.5), accumulated_statistics=accumulated)
    assert np.isfinite(step(state, batch)[1].loss)
    with pytest.raises(ValueError, match="apply_fn takes no argument `where`.*as `mask`, or") as e:
        step(state, batch._replace(where=np.ones(batch.label.shape, bool)))
    assert "\n" not in str(e.value)


def test_evaluation_gives_the_mask_to_a_model_that_takes_it():
    """Such as one that normalizes by the batch in evaluation too; NaN reaches nothing."""

    def by_batch(variables, images, train, where=None):
        return with_bn(variables, images, True, where=where)

    state, batch = create_train_state(bn_init, optax.sgd(0.5), jax.random.key(1)), data()
    short = jax.tree.map(lambda leaf: leaf[:11], batch)
    batch.image[11:] = np.nan
    masked = batch._replace(where=np.arange(16) < 11)
    for apply_fn in (by_batch, with_bn):
        evaluate = jax.jit(make_eval_step(apply_fn))
        for got, expected in zip(evaluate(state, masked), evaluate(state, short), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)


# --- sums over many parts ---

KINDS_OF_PARTS = ["microbatch", "devices"]


def lookup(variables, images, train):
    """Logits whose gradient in w is the images themselves, times what softmax makes of them."""
    return images.reshape(len(images), -1) @ variables["params"]["w"], variables["batch_stats"]


def step_in_parts(kind, apply_fn):
    """A step over parts of the batch, its first axis, that observes the gradient."""
    observe = lambda params, grads, new_params: grads  # noqa: E731
    make = functools.partial(make_train_step, apply_fn, optax.identity(), observe=observe)
    if kind == "microbatch":
        return jax.jit(make(accumulated_statistics="microbatch"))
    step = make(axis_name="batch")
    return jax.jit(jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name="batch"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("parts", [3, 2048])
@pytest.mark.parametrize("kind", KINDS_OF_PARTS)
def test_gradients_of_many_parts_add_up(kind, parts, dtype):
    """Each part's gradient is rounded to the params' dtype once, their mean once more."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((6, 4)), dtype)
    image = jnp.asarray(rng.uniform(0.5, 1.5, (parts, 3, 6)), dtype)
    # Gradients of one sign, which a short accumulator stops adding to.
    label = np.ones((parts, 3), np.int32)
    state = TrainState(jnp.int32(0), {"w": w}, {}, optax.EmptyState(), jax.random.key(0))
    _, metrics = step_in_parts(kind, lookup)(state, Batch(image, label))
    gradient = metrics.observed["w"]
    assert gradient.dtype == dtype
    w, x = np.asarray(w, np.float64), np.asarray(image, np.float64).reshape(-1, 6)
    p = np.exp(log_softmax(x @ w, 1)) - np.eye(4)[label.ravel()]
    expected = x.T @ p / len(x)
    error = np.abs(np.asarray(gradient, np.float64) - expected).max() / np.abs(expected).max()
    # The products of each part are rounded in the params' dtype, whatever adds them up.
    assert error < 4 * max(float(jnp.finfo(dtype).eps), 1e-6), error


def odd_leaves(dtype=jnp.float32):
    """Statistics whose bits an average of copies would change, and leaves that are no floats."""
    rng = np.random.default_rng(3)
    return {
        "mean": jnp.asarray(rng.standard_normal(64), dtype),
        "special": jnp.asarray([-0.0, 0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38], jnp.float32),
        "int": jnp.asarray([-(2**31), -7, 0, 2**30 + 1, 2**31 - 1], jnp.int32),
        "bool": jnp.asarray([True, False]),
        "unsigned": jnp.asarray([0, 2**32 - 1], jnp.uint32),
    }


def in_many_parts(kind, parts, stats, apply_fn):
    """Batch statistics after a step whose batch comes in so many parts of two examples."""
    rng = np.random.default_rng(0)
    batch = Batch(rng.standard_normal((parts, 2, 6)).astype("f"), np.zeros((parts, 2), np.int32))
    state = TrainState(
        jnp.int32(0), {"w": jnp.ones((6, 4))}, stats, optax.EmptyState(), jax.random.key(0)
    )
    new, metrics = step_in_parts(kind, apply_fn)(state, batch)
    assert not metrics.diverged
    return new.batch_stats


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [2, 3, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("kind", KINDS_OF_PARTS)
def test_what_no_part_changes_keeps_its_bits(kind, parts, dtype):
    """Frozen statistics, and leaves of other types."""
    stats = odd_leaves(dtype)
    new = in_many_parts(kind, parts, stats, lookup)
    for name, old in stats.items():
        assert new[name].dtype == old.dtype
        assert np.asarray(new[name]).tobytes() == np.asarray(old).tobytes(), name


@pytest.mark.parametrize("parts", [2, 3, 6, 7])
@pytest.mark.parametrize("kind", KINDS_OF_PARTS)
def test_what_parts_change_moves_by_their_mean(kind, parts):
    """Floats in float64's eyes, counters by the one that each part adds, extremes from infinity."""

    def apply_fn(variables, images, train):
        logits, old = lookup(variables, images, train)
        new = {
            "mean": 0.9 * old["mean"] + 0.1 * jnp.mean(images),
            "half": (0.5 * old["half"] + 0.5 * jnp.mean(images)).astype(jnp.bfloat16),
            "largest": jnp.maximum(old["largest"], jnp.max(images)),
            "steps": old["steps"] + 1,
            "left": old["left"] - 1,
            "positive": old["positive"] + (jnp.mean(images) > 0),
            "begun": jnp.ones((), bool),
        }
        return logits, new

    stats = {
        "mean": jnp.asarray([3.0, -0.1]),
        "half": jnp.asarray([1.0], jnp.bfloat16),
        "largest": jnp.asarray(-jnp.inf),
        "steps": jnp.asarray(2**24 + 1),
        "left": jnp.asarray(5, jnp.uint32),
        "positive": jnp.asarray(3),
        "begun": jnp.zeros((), bool),
    }
    new = in_many_parts(kind, parts, stats, apply_fn)
    x = np.random.default_rng(0).standard_normal((parts, 2, 6)).astype("f").astype(np.float64)
    np.testing.assert_allclose(new["mean"], 0.9 * np.array([3, -0.1]) + 0.1 * x.mean(), rtol=1e-6)
    np.testing.assert_allclose(np.float32(new["half"]), 0.5 + 0.5 * x.mean(), rtol=2**-8)
    np.testing.assert_allclose(new["largest"], x.max((1, 2)).mean(), rtol=1e-6)
    assert new["positive"] == 3 + np.round(np.mean(x.mean((1, 2)) > 0))
    assert (new["steps"], new["left"], new["begun"]) == (2**24 + 2, 4, True)
    assert {name: leaf.dtype for name, leaf in new.items()} == {
        name: leaf.dtype for name, leaf in stats.items()
    }


@pytest.mark.parametrize("parts", [1, 4])
def test_statistics_in_half_precision_do_not_stall(parts):
    """A state that was cast to bfloat16: running statistics as in float32, in parts too."""
    optimizer = optax.sgd(0.0)
    accumulated = "microbatch" if parts > 1 else None
    step = jax.jit(make_train_step(with_bn, optimizer, accumulated_statistics=accumulated))

    def averages(dtype):
        state = create_train_state(bn_init, optimizer, jax.random.key(0))
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), state.batch_stats)
        state = state._replace(batch_stats=cast)
        for seed in range(60):
            batch = data(16, seed)
            if parts > 1:
                batch = jax.tree.map(lambda v: v.reshape(parts, -1, *v.shape[1:]), batch)
            state, _ = step(state, batch)
        return state.batch_stats

    cast, kept = averages(jnp.bfloat16), averages(jnp.float32)
    for a, b in zip(jax.tree.leaves(cast), jax.tree.leaves(kept), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulated", [None, "microbatch", "batch"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_network_where_jax_casts_nothing_by_itself(accumulated, masked, strict_arrays):
    """A whole step with weight decay runs under strict settings, with the numbers of lax ones."""
    model, optimizer = (
        CNN("c4 P f10", BatchNorm, "all"),
        create_optimizer("momentum", 0.1, weight_decay=1e-3),
    )
    image, label = data(8).image.repeat(4, 1).repeat(2, 2), np.arange(8, dtype=np.int32)
    batch = Batch(image, label, np.arange(8) < 6 if masked else None)
    if accumulated:
        batch = jax.tree.map(lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), batch)

    def apply_fn(variables, images, train, where=None):
        y, new = model.apply(variables, images, train=train, where=where, mutable=["batch_stats"])
        return y, new["batch_stats"]

    def step(_):
        def init(key):
            return model.init(key, image, train=True)

        state = create_train_state(init, optimizer, jax.random.key(0))
        run = make_train_step(apply_fn, optimizer, accumulated_statistics=accumulated)
        return run(state, batch)[0]._replace(key=None)

    strict = jax.jit(step)(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        same_bits(strict, jax.jit(step)(0))
