"""Keras' tests of its batch norm, asked of ours, and both layers side by side on JAX.

The tests followed are those of keras/src/layers/normalization/batch_normalization_test.py. Keras'
epsilon is 1e-3 by default, its momentum is ours, its running variance the biased one.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import steps
from conformance.steps import exact, fresh
from flax import nnx

from bn_research.layers import linen
from bn_research.layers import nnx as own_nnx
from bn_research.normalization import BatchStats, batch_norm, update_batch_stats
from bn_research.normalization.renorm import batch_renorm

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "jax":
    pytest.skip("keras runs on another backend", allow_module_level=True)

EPSILON = 1e-3
inference = functools.partial(steps.inference, epsilon=EPSILON)
KEY = jax.random.key(0)


def normal(shape, seed=0, mean=5.0, std=10.0):
    return np.random.default_rng(seed).normal(mean, std, shape).astype(np.float32)


def training(x, stats, bias=None, mask=None, **options):
    """Output and running statistics."""
    y, *_, new = steps.training(x, None, bias, stats, where=mask, epsilon=EPSILON, **options)
    return y, new


def peer(shape, **options):
    layer = keras.layers.BatchNormalization(**options)
    layer.build(shape)
    return layer


def moving(layer):
    """Keras' running mean and variance, copied."""
    return BatchStats(*(np.array(v.value) for v in (layer.moving_mean, layer.moving_variance)))


def close(own, peer, rtol=1e-5, atol=1e-5):
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(peer), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("shape", "affine"), [((2, 3), True), ((2, 3), False), ((2, 4, 4, 3), True)]
)
def test_basics(shape, affine):
    """Follows test_bn_basics: shapes, and how many weights there are of each kind."""
    theirs = peer(shape, center=affine, scale=affine)
    options = dict(use_scale=affine, use_bias=affine)
    variables = linen.BatchNorm(**options).init(KEY, np.ones(shape, np.float32), True)
    layer = own_nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    expected = [w.shape for w in theirs.trainable_weights]
    assert [w.shape for w in jax.tree.leaves(variables.get("params", {}))] == expected
    assert [w.shape for w in jax.tree.leaves(nnx.state(layer, nnx.Param))] == expected
    expected = [w.shape for w in theirs.non_trainable_weights]
    assert [w.shape for w in jax.tree.leaves(variables["batch_stats"])] == expected
    assert [w.shape for w in jax.tree.leaves(nnx.state(layer, nnx.BatchStat))] == expected


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 3, 3, 2)])
@pytest.mark.parametrize(("mean", "var"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_correctness(axis, shape, mean, var):
    """Follows test_correctness, from every start of the running statistics.

    Normalized three times over, x has mean 0 and deviation 1, and with momentum=0 so have the
    running statistics; inference differs before a training step and is the same after it.
    """
    x, features = normal(shape), shape[axis]
    stats = BatchStats(jnp.full(features, mean), jnp.full(features, var))
    y = x
    for _ in range(3):
        y, stats = training(y, stats, axis=axis, momentum=0.0)
    reduced = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    np.testing.assert_allclose(np.mean(y, reduced), np.zeros(features), atol=1e-3)
    np.testing.assert_allclose(np.std(y, reduced), np.ones(features), atol=1e-3)
    close(stats, fresh(features), rtol=0, atol=1e-3)

    y, after = training(x, stats, axis=axis, momentum=0.0)
    assert np.abs(inference(x, None, None, stats, axis=axis)[0] - y).max() > 0.1
    close(inference(x, None, None, after, axis=axis)[0], y, atol=1e-4)


def test_mask_in_inference():
    """Follows the end of test_correctness: a mask changes training, and nothing in inference."""
    x, mask = normal((5, 3, 2)), np.array([1, 0, 1], bool)
    x[:, 1] = 0
    variables = linen.BatchNorm().init(KEY, x, True)

    @jax.jit
    def run(x):
        outputs = []
        for evaluate in (True, False):
            layer = linen.BatchNorm(use_running_average=evaluate, epsilon=EPSILON)
            for given in (None, mask[:, None]):
                y, _ = layer.apply(variables, x, mask=given, mutable=["batch_stats"])
                outputs.append(y)
        return outputs

    evaluated, masked, trained, trained_masked = run(x)
    np.testing.assert_array_equal(masked, evaluated)
    assert np.abs(trained - trained_masked)[:, mask].max() > 0.1
    theirs = peer(x.shape)
    close(evaluated, theirs(keras.layers.Masking()(x), training=False), atol=1e-4)
    expected = np.array(theirs(x, mask=np.tile(mask, (5, 1)), training=True))
    close(trained_masked[:, mask], expected[:, mask])


def test_input_fully_masked():
    """Follows test_input_fully_masked: zeros come out.

    Ours come out as bias and keep the running statistics; Keras' averages in a mean and a variance
    of 0 that nothing had.
    """
    x, mask = np.full((4, 5), 3.0, np.float32), np.zeros(4, np.float32)
    theirs = peer((4, 5), scale=False, center=False)
    np.testing.assert_array_equal(theirs(x * 0, mask=mask, training=True), np.zeros((4, 5)))
    np.testing.assert_allclose(moving(theirs).var, np.full(5, 0.99), rtol=1e-6)
    bias = np.arange(5, dtype=np.float32)
    y, stats = training(x, fresh(5), bias, mask[:, None])
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    np.testing.assert_array_equal(stats, fresh(5))


@pytest.mark.parametrize("padding", [0.0, 0.1, 1.0])
def test_masked_values_are_ignored(padding):
    """Follows test_bachnorm_ignore_masked_values: mean 1.5 and 5, variance 0.25 and 0.

    The unmasked come out alike; the masked as bias here, normalized by Keras. A NaN under the mask
    does no harm here, and passes through Keras.
    """
    values = [[1, 5], [2, 5], [padding, padding], [padding, padding]]
    x = np.float32([values] * 10)
    kept = np.any(x != padding, -1)
    theirs = peer(x.shape, momentum=0.0)
    expected = theirs(x, mask=kept, training=True)
    bias = np.float32([2, 3])
    theirs.beta.assign(bias)
    own, stats = training(x, fresh(2), bias, kept[..., None], momentum=0.0)
    close(stats, tuple(np.float32([[1.5, 5.0], [0.25, 0.0]])))
    close(stats, moving(theirs))
    close(own[kept], np.array(expected)[kept] + bias)
    np.testing.assert_array_equal(own[~kept], np.broadcast_to(bias, (20, 2)))
    assert np.abs(np.array(expected)[~kept]).max() > 1

    dirty = np.where(kept[..., None], x, np.nan)
    again, _ = training(dirty, fresh(2), bias, kept[..., None], momentum=0.0)
    np.testing.assert_array_equal(again, own)
    assert np.all(np.isnan(np.array(theirs(dirty, mask=kept, training=True))[~kept]))


def test_mask_of_lower_rank():
    """Follows test_masked_broadcast_normalization; the mask has an axis less there, none here."""
    x, mask = np.ones((1, 2, 3, 4), np.float32), np.ones((1, 2, 1), np.float32)
    y, stats = training(x, fresh(4), None, mask[..., None], momentum=0.0)
    np.testing.assert_array_equal(y, np.zeros(x.shape))
    np.testing.assert_array_equal(stats, (np.ones(4), np.zeros(4)))
    theirs = peer(x.shape, momentum=0.0)
    close(y, theirs(x, mask=mask, training=True), atol=1e-6)
    close(stats, moving(theirs), atol=1e-6)


def test_bad_mask():
    """Keras wants one axis less than the input has, ours what broadcasts to the input."""
    x, mask = np.ones((3, 4, 5), np.float32), np.ones((2, 4, 1), bool)
    with pytest.raises(ValueError, match="one dimension less"):
        peer(x.shape)(x, mask=mask, training=True)
    with pytest.raises(ValueError, match=r"where has shape \(2, 4, 1\): it must broadcast"):
        batch_norm(x, where=mask)


@pytest.mark.parametrize("axis", [3, -4])
def test_bad_axis(axis):
    """Keras' compute_output_shape and ours name the axis."""
    with pytest.raises(ValueError, match=f"Axis {axis} is out of bounds"):
        keras.layers.BatchNormalization(axis=axis).compute_output_shape((3, 4, 5))
    with pytest.raises(ValueError, match=f"feature_axes={axis} is out of range"):
        batch_norm(np.ones((3, 4, 5), np.float32), feature_axes=axis)


def test_trainable():
    """Follows test_trainable_behavior: frozen, then trained on the same batch ten times.

    Keras' trainable=False is `frozen` of our linen layer and `freeze_batch_norm` of our nnx one:
    inference although training is asked for.
    """
    x = normal((200, 4, 4, 3))
    theirs = peer((1, 4, 4, 3), momentum=0.8, epsilon=1e-7)
    theirs.trainable = False
    options = dict(momentum=0.8, epsilon=1e-7)
    layer = own_nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    own_nnx.freeze_batch_norm(layer, lambda path: True)
    frozen = linen.BatchNorm(frozen=lambda path: True, **options)
    variables = jax.jit(frozen.init, static_argnums=2)(KEY, x[:1], False)
    y, new = frozen.apply(variables, x, False, mutable=["batch_stats"])
    for output in (theirs(x, training=True), y, layer(x)):
        np.testing.assert_allclose(output, x, rtol=1e-5)
    for stats in (moving(theirs), new["batch_stats"], nnx.state(layer, nnx.BatchStat)):
        for value, start in zip(jax.tree.leaves(stats), fresh(3), strict=True):
            np.testing.assert_array_equal(value, start)

    theirs.trainable = True
    layer.set_attributes(own_nnx.BatchNorm, frozen=False)
    thawed = linen.BatchNorm(**options)

    @nnx.jit
    def nnx_step(layer, x):
        return layer(x)

    @jax.jit
    def linen_step(variables, x):
        return thawed.apply(variables, x, False, mutable=["batch_stats"])

    for _ in range(10):
        expected, nnx_y = theirs(x, training=True), nnx_step(layer, x)
        y, new = linen_step(variables, x)
        variables = {**variables, **new}
    assert len(theirs.trainable_weights) == len(theirs.non_trainable_weights) == 2
    for output in (y, nnx_y):
        np.testing.assert_allclose(np.mean(output, (0, 1, 2)), np.zeros(3), atol=1e-4)
        np.testing.assert_allclose(np.std(output, (0, 1, 2)), np.ones(3), atol=1e-4)
        close(output, expected)
    stats = tuple(new["batch_stats"][leaf] for leaf in ("mean", "var"))
    close(stats, moving(theirs))
    close((layer.mean[...], layer.var[...]), stats)


def test_running_statistics_converge():
    """Momentum lets them reach the data's, from whatever start, at the rate 0.8ᵏ; as Keras'."""
    theirs = peer((500, 2), momentum=0.8)
    stats, share = fresh(2), 1.0
    x = normal((500, 2))
    for _ in range(40):
        theirs(x, training=True)
        _, stats = training(x, stats, momentum=0.8)
        share *= 0.8
    mean, var = (f(x.astype(np.float64), axis=0) for f in (np.mean, np.var))
    close(stats, ((1 - share) * mean, share + (1 - share) * var))
    close(stats, (mean, var), rtol=1e-3)
    close(stats, moving(theirs))


def test_variance_beyond_float16():
    """Follows test_large_value_within_autocast_scope: a variance of 90000 in half precision.

    The running variance is float32 and so is the reduction that leads to it, as in Keras.
    """
    x = np.repeat(np.float16([-300, 300]), 8)[:, None]
    layer = linen.BatchNorm(dtype=jnp.float16, momentum=0.0)

    @jax.jit
    def run(x):
        variables = layer.init(KEY, x, False)
        y, new = layer.apply(variables, x, False, mutable=["batch_stats"])
        return y, layer.apply({**variables, **new}, x, True), new["batch_stats"]["var"]

    *outputs, var = run(x)
    theirs = peer(x.shape, momentum=0.0, dtype="mixed_float16")
    for y in (*outputs, theirs(x, training=True)):
        assert y.dtype == jnp.float16
        np.testing.assert_allclose(y, np.sign(x), rtol=1e-3)
    for v in (var, moving(theirs).var):
        assert v.dtype == jnp.float32
        np.testing.assert_allclose(v, [90000], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "masked"),
    [((4, 5, 3), -1, True), ((4, 3, 5, 2), 1, False)],
)
def test_side_by_side(shape, axis, masked):
    """Outputs, gradients and statistics of Keras' layer over three steps, then its evaluation."""
    features = shape[axis]
    theirs = peer(shape, axis=axis, momentum=0.9)
    scale, bias = normal(features, 1, 1, 0.5), normal(features, 2, 0, 1)
    mask = np.random.default_rng(3).random(shape[:-1]) < 0.7 if masked else None

    @jax.jit
    def keras_step(weights, stats, x, g):
        def loss(weights, x):
            # What Keras makes of a masked element is another matter; no loss looks at it.
            y, new = theirs.stateless_call(weights, stats, x, training=True, mask=mask)
            return jnp.sum(g * y), (y, new)

        (_, aux), (grads, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, x)
        return *aux, dx, *grads

    where = None if mask is None else mask[..., None]
    options = dict(axis=axis, momentum=0.9, epsilon=EPSILON)
    stats, keras_stats = fresh(features), [np.zeros(features), np.ones(features)]
    keep = np.ones(shape, bool) if mask is None else np.broadcast_to(mask[..., None], shape)
    for step in range(3):
        x = normal(shape, 10 + step, step, 2)
        g = np.where(keep, normal(shape, 20 + step, 0, 1), 0)
        y, *grads, stats = steps.training(x, scale, bias, stats, g, where, **options)
        expected, keras_stats, *keras_grads = keras_step([scale, bias], keras_stats, x, g)
        close(y[keep], expected[keep], atol=2e-5)
        for a, b in zip(grads, keras_grads, strict=True):
            close(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))
        close(stats, keras_stats)
    expected, _ = theirs.stateless_call([scale, bias], keras_stats, x, training=False)
    close(inference(x, scale, bias, stats, axis=axis)[0], expected, atol=2e-5)


def test_large_mean():
    """At 1e4 standard deviations Keras' output, x·a + b, is off by 1e-3 and ours by 1e-5."""
    x = normal((256, 3), 0, 1e5, 10)
    own, _ = training(x, fresh(3))
    assert np.abs(own - exact(x, EPSILON)).max() < 2e-5
    assert np.abs(peer(x.shape)(x, training=True) - exact(x, EPSILON)).max() > 2e-4


# Batch renormalization, `renorm=True` there. Keras keeps running standard deviations with epsilon
# in them, ours variances without: var = stddev² − epsilon carries one over to the other.

RENORM_X = np.float32([[4, 6, 2], [8, -2, 5], [6, 4, 3]])


def renorm_start():
    """Keras' five running statistics, scale and bias, away from the initial ones."""
    rng = np.random.default_rng(1337)
    values = rng.standard_normal((4, 3))
    spreads = rng.uniform(0.5, 1.5, (2, 3))
    names = ("moving_mean", "renorm_mean", "gamma", "beta", "moving_stddev", "renorm_stddev")
    start = dict(zip(names, np.float32([*values, *spreads]), strict=True))
    start["moving_variance"] = start["moving_stddev"] ** 2 - np.float32(EPSILON)
    return start


def renorm_peer(start, clipping):
    theirs = peer(
        (None, 3), momentum=0.9, renorm=True, renorm_momentum=0.8, renorm_clipping=clipping
    )
    for name, value in start.items():
        getattr(theirs, name).assign(value)
    return theirs


@pytest.mark.parametrize(
    ("r_max", "d_max", "clipping"),
    [
        (np.inf, np.inf, None),
        (1.2, 0.5, dict(rmax=1.2, rmin=1 / 1.2, dmax=0.5)),
        (1.0, 0.0, dict(rmax=1.0, rmin=1.0, dmax=0.0)),
    ],
)
def test_renorm_correctness(r_max, d_max, clipping):
    """Follows test_renorm_correctness: the corrected output, and the statistics after it.

    Keras averages deviations and squares them, ours average variances as everywhere else: the
    means agree, the variances are each their own closed form.
    """
    start = renorm_start()
    theirs = renorm_peer(start, clipping)
    expected = theirs(RENORM_X, training=True)
    stats = BatchStats(start["renorm_mean"], start["renorm_stddev"] ** 2 - EPSILON)

    @jax.jit
    def run(x, stats, scale, bias):
        y, moments = batch_renorm(x, stats, scale, bias, r_max=r_max, d_max=d_max, epsilon=EPSILON)
        return y, update_batch_stats(stats, moments, momentum=0.8)

    y, new = run(RENORM_X, stats, start["gamma"], start["beta"])
    close(y, expected)

    x64 = RENORM_X.astype(np.float64)
    mean, std = x64.mean(0), np.sqrt(x64.var(0) + EPSILON)
    r = np.clip(std / start["renorm_stddev"], 1 / r_max, r_max)
    d = np.clip((mean - start["renorm_mean"]) / start["renorm_stddev"], -d_max, d_max)
    corrected = (x64 - mean) / std * r + d
    close(y, corrected * start["gamma"] + start["beta"])

    close(new.mean, theirs.renorm_mean.value)
    close(new.var, 0.8 * stats.var + 0.2 * x64.var(0))
    close(theirs.renorm_stddev.value, 0.8 * start["renorm_stddev"] + 0.2 * std)
    assert np.abs(new.var - (np.array(theirs.renorm_stddev.value) ** 2 - EPSILON)).max() > 0.1


def test_renorm_gradients():
    """Keras' too: r and d are constants to them."""
    start = renorm_start()
    theirs = renorm_peer(start, dict(rmax=1.5, rmin=1 / 1.5, dmax=0.5))
    g = normal((3, 3), 1, 0, 1)
    weights = [start["gamma"], start["beta"]]
    rest = [w.value for w in theirs.non_trainable_weights]
    stats = BatchStats(start["renorm_mean"], start["renorm_stddev"] ** 2 - EPSILON)

    def peer_loss(x, scale, bias):
        y, _ = theirs.stateless_call([scale, bias], rest, x, training=True)
        return jnp.sum(g * y)

    def own_loss(x, scale, bias):
        y, _ = batch_renorm(x, stats, scale, bias, r_max=1.5, d_max=0.5, epsilon=EPSILON)
        return jnp.sum(g * y)

    own, expected = (
        jax.jit(jax.grad(loss, (0, 1, 2)))(RENORM_X, *weights) for loss in (own_loss, peer_loss)
    )
    close(own, expected)


def test_renorm_inference():
    """Follows test_renorm_inference: the same as that of batch normalization, and as ours."""
    values = dict(gamma=normal(10, 1, 0, 1), beta=normal(10, 2, 0, 1))
    values |= dict(moving_mean=normal(10, 3, 0, 1), moving_variance=normal(10, 4, 0, 1) ** 2)
    layers = [peer((None, 10), renorm=renorm) for renorm in (False, True)]
    for layer in layers:
        for name, value in values.items():
            getattr(layer, name).assign(value)
    x = normal((4, 10), 5, 0, 1)
    stats = values["moving_mean"], values["moving_variance"]
    own, *_ = inference(x, values["gamma"], values["beta"], stats)
    for layer in layers:
        close(own, layer(x, training=False))


@pytest.mark.parametrize(
    ("clipping", "options", "message"),
    [
        (dict(rmax=0.0, rmin=1.0), dict(r_max=0.0, d_max=1.0), "r_max=0.0 is not allowed"),
        (dict(rmax=1.0, dmax=-1.0), dict(r_max=1.0, d_max=-1.0), "d_max=-1.0 is not allowed"),
    ],
)
def test_renorm_clipping(clipping, options, message):
    """Follows test_renorm_invalid_clipping_keys; here rmin is 1/r_max, as in the paper."""
    with pytest.raises(ValueError, match="rmax should be|dmax should be non-negative"):
        keras.layers.BatchNormalization(renorm=True, renorm_clipping=clipping)
    with pytest.raises(ValueError, match=message):
        batch_renorm(RENORM_X, fresh(3), **options)
