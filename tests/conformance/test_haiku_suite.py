"""Haiku's tests of its batch norm, asked of ours, and both layers side by side.

The tests followed are those of haiku/_src/batch_norm_test.py. Haiku's decay_rate is our momentum;
its averages start at 0 and are divided by 1 − decay_rateᵏ after k steps, so that a run's first
evaluation is that of the first batch, while Flax's (and ours) start at 0 and 1 and forget them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance.steps import exact, fresh, training
from flax import nnx

from bn_research.layers import linen
from bn_research.layers import nnx as own_nnx
from bn_research.normalization import BatchStats, batch_norm, normalize, update_batch_stats

hk = pytest.importorskip("haiku")

KEY = jax.random.key(0)


def by_function(x, scale, bias, *, axis=-1, momentum=0.9, axis_name=None, axis_index_groups=None):
    """Output of a training step from fresh statistics, then that of inference."""
    y, moments = batch_norm(
        x,
        scale,
        bias,
        feature_axes=axis,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    stats = update_batch_stats(fresh(moments.mean.shape), moments, momentum=momentum)
    return y, normalize(x, *stats, scale, bias, feature_axes=axis)


def given(value):
    return lambda key, shape, dtype: jnp.asarray(value, dtype).reshape(shape)


def by_linen(x, scale, bias, **options):
    layer = linen.BatchNorm(
        use_scale=scale is not None,
        use_bias=bias is not None,
        scale_init=given(scale),
        bias_init=given(bias),
        **{"momentum": 0.9, **options},
    )
    variables = layer.init(KEY, x, False)
    y, new = layer.apply(variables, x, False, mutable=["batch_stats"])
    return y, layer.apply({**variables, **new}, x, True)


def by_nnx(x, scale, bias, *, axis=-1, **options):
    layer = own_nnx.BatchNorm(
        x.shape[axis],
        axis=axis,
        use_scale=scale is not None,
        use_bias=bias is not None,
        scale_init=given(scale),
        bias_init=given(bias),
        rngs=nnx.Rngs(0),
        **{"momentum": 0.9, **options},
    )
    return layer(x), layer(x, use_running_average=True)


SURFACES = [by_function, by_linen, by_nnx]
every_surface = pytest.mark.parametrize("surface", SURFACES)


def haiku_layer(*, create=True, decay_rate=0.9, **options):
    """(init, apply) of hk.BatchNorm as a function of x, is_training and given scale and offset."""

    def forward(x, is_training=True, **given):
        return hk.BatchNorm(create, create, decay_rate, **options)(x, is_training, **given)

    return hk.transform_with_state(forward)


def haiku_step(x, **options):
    """hk.BatchNorm's first training output on x, jitted."""
    layer = haiku_layer(create=False, **options)
    return jax.jit(lambda x: layer.apply(*layer.init(KEY, x), None, x)[0])(x)


def normal(shape, seed=0, shift=1.0):
    x = np.random.default_rng(seed).standard_normal(shape) * 2 + shift
    return x.astype(np.float32)


@every_surface
def test_basic(surface):
    """Follows test_basic: features that differ by a constant come out alike, and evaluate alike.

    Haiku's average is the batch's own after one step; momentum=0 gives that here.
    """
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    y, evaluated = jax.jit(functools.partial(surface, momentum=0.0))(x, np.ones(4), np.zeros(4))
    np.testing.assert_array_equal(y, np.broadcast_to(y[..., :1], y.shape))
    np.testing.assert_allclose(evaluated, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, haiku_step(x), rtol=1e-4, atol=1e-5)


@every_surface
@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 3, 5), -1), ((2, 5, 3, 3), 1)])
def test_simple_training(surface, shape, axis):
    """Follows test_simple_training and test_simple_training_nchw: constants give the offset.

    There scale and offset broadcast against x, shape (5, 1, 1); here they have the features' shape.
    """
    step = jax.jit(functools.partial(surface, axis=axis))
    y, _ = step(np.ones(shape, np.float32), np.full(5, 0.5), np.full(5, 2.0))
    np.testing.assert_array_equal(y, np.full(shape, 2.0))


@every_surface
def test_no_scale_and_offset(surface):
    """Follows test_no_scale_and_offset: constants give 0."""
    x = np.ones((2, 5, 3, 3, 3), np.float32)
    np.testing.assert_array_equal(jax.jit(surface)(x, None, None)[0], np.zeros(x.shape))


@every_surface
def test_normalized_axes(surface):
    """Follows test_simple_training_normalized_axes: there axis is what is reduced, here kept."""
    x = np.stack([np.full((5, 3, 3), 2.0), np.ones((5, 3, 3))], 1).astype(np.float32)
    y, _ = jax.jit(functools.partial(surface, axis=1))(x, None, None)
    np.testing.assert_array_equal(y, np.zeros(x.shape))
    if surface is by_function:
        np.testing.assert_array_equal(haiku_step(x, axis=[0, 2, 3]), np.zeros(x.shape))


@every_surface
def test_cross_replica_axis(surface):
    """Follows test_simple_training_cross_replica_axis, whose expectation is numpy's.

    Its input are integers, which ours takes as float32.
    """
    devices = jax.local_device_count()
    assert devices == 8
    x = np.arange(devices * 4).reshape(devices, 4)
    expected = (x - x.mean(0)) / x.std(0)
    y = jax.pmap(lambda x: surface(x, None, None, axis_name="i")[0], axis_name="i")(x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@every_surface
def test_cross_replica_axis_index_groups(surface):
    """Follows test_simple_training_cross_replica_axis_index_groups: pairs of devices."""
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    pairs = x.reshape(4, 2, 4)
    expected = (pairs - pairs.mean(1, keepdims=True)) / pairs.std(1, keepdims=True)
    options = dict(axis_name="i", axis_index_groups=groups)
    y = jax.pmap(lambda x: surface(x, None, None, **options)[0], axis_name="i")(x)
    np.testing.assert_allclose(y, expected.reshape(8, 4), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`cross_replica_axis` name must be specified"):
        hk.testing.transform_and_run(
            lambda: hk.BatchNorm(True, True, 0.9, cross_replica_axis_index_groups=groups)
        )()
    with pytest.raises(ValueError, match="needs axis_name"):
        surface(x, None, None, axis_index_groups=groups)


@pytest.mark.parametrize("name", ["scale", "offset"])
def test_an_initializer_of_what_is_not_created(name):
    """Follows test_no_scale_and_init_provided and test_no_offset_beta_init_provided.

    Haiku refuses it; Flax ignores it, and so does ours, which takes the place of Flax's.
    """
    flags = (False, True) if name == "scale" else (True, False)
    with pytest.raises(ValueError, match=f"Cannot set `{name}_init`"):
        hk.testing.transform_and_run(
            lambda: hk.BatchNorm(*flags, 0.9, **{f"{name}_init": jnp.ones})
        )()
    leaf = {"scale": "scale", "offset": "bias"}[name]
    options = {f"use_{leaf}": False, f"{leaf}_init": given(7.0)}
    variables = linen.BatchNorm(**options).init(KEY, np.ones((2, 3), np.float32), True)
    assert leaf not in variables["params"]
    assert getattr(own_nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options), leaf) is None


def test_epsilon_keeps_the_dtype():
    """Follows test_eps_cast_to_var_dtype: everything bfloat16, and a Python float for epsilon.

    Haiku takes an array of rank 0, one feature without a feature axis; ours needs the axis.
    """
    x = np.ones((), jnp.bfloat16)
    layer = haiku_layer(eps=0.1)
    params, state = jax.device_get(jax.jit(layer.init)(KEY, x))
    assert layer.apply(params, state, None, x, False)[0].dtype == jnp.bfloat16
    one, zero = np.ones(1, jnp.bfloat16), np.zeros(1, jnp.bfloat16)
    assert normalize(one, zero, one, one, zero, epsilon=0.1).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="out of range for an array of rank 0"):
        normalize(x, zero, one, epsilon=0.1)


def test_no_type_promotion():
    """Follows test_no_type_promotion: trained in float32, evaluated in bfloat16.

    Haiku casts its variables with a getter. Ours may stay float32 when the layer's dtype is
    bfloat16, and may be cast as well; statistics keep their dtype through a step either way.
    """
    x, layer, own = normal((100, 5)), haiku_layer(decay_rate=0.99), linen.BatchNorm()

    @jax.jit
    def train(x):
        output, state = layer.apply(*layer.init(KEY, x), None, x)
        variables = own.init(KEY, x, False)
        y, new = own.apply(variables, x, False, mutable=["batch_stats"])
        return (output, y), state, {**variables, **new}

    outputs, state, variables = train(x)
    leaves = jax.tree.leaves((outputs, state, variables))
    assert {leaf.dtype for leaf in leaves if leaf.ndim} == {np.dtype("float32")}

    @jax.jit
    def evaluate(variables, x):
        half = x.astype(jnp.bfloat16)
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
        mixed = linen.BatchNorm(dtype=jnp.bfloat16).apply(variables, half, True)
        return mixed, own.apply(low, half, True), own.apply(variables, x, True)

    *halves, expected = evaluate(variables, x)
    for y in halves:
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=0.02, atol=0.03)


SIDE_BY_SIDE = [((6, 4), "channels_last"), ((4, 3, 5), "N...C"), ((4, 5, 3, 3), "channels_first")]


@pytest.mark.parametrize(("shape", "data_format"), SIDE_BY_SIDE)
def test_side_by_side(shape, data_format):
    """Outputs, gradients and averages of hk.BatchNorm over three steps, then its evaluation."""
    axis = 1 if data_format == "channels_first" else -1
    features = shape[axis]
    layer = haiku_layer(eps=1e-4, data_format=data_format)
    params, state = jax.jit(layer.init)(KEY, normal(shape))
    kept = params["batch_norm"]["scale"].shape
    scale, bias = normal(features, 1), normal(features, 2)
    params = {"batch_norm": {"scale": scale.reshape(kept), "offset": bias.reshape(kept)}}

    @jax.jit
    def theirs(params, state, x, g):
        def loss(params, x):
            y, new = layer.apply(params, state, None, x)
            return jnp.sum(g * y), (y, new)

        (_, aux), (grads, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return *aux, dx, grads["batch_norm"]["scale"], grads["batch_norm"]["offset"]

    own = functools.partial(training, axis=axis, momentum=0.9, epsilon=1e-4)
    stats = BatchStats(jnp.zeros(features), jnp.zeros(features))  # Haiku's start
    for step in range(1, 4):
        x, g = normal(shape, 10 + step, shift=step), normal(shape, 20 + step, shift=0)
        y, *grads, stats = own(x, scale, bias, stats, g)
        hk_y, state, *hk_grads = theirs(params, state, x, g)
        for a, b in zip((y, *grads), (hk_y, *hk_grads), strict=True):
            b = np.reshape(b, a.shape)
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))
        for leaf, ema in (("mean", "mean_ema"), ("var", "var_ema")):
            hidden = np.reshape(state[f"batch_norm/~/{ema}"]["hidden"], features)
            average = np.reshape(state[f"batch_norm/~/{ema}"]["average"], features)
            np.testing.assert_allclose(getattr(stats, leaf), hidden, rtol=1e-5, atol=1e-6)
            debiased = getattr(stats, leaf) / (1 - 0.9**step)
            np.testing.assert_allclose(debiased, average, rtol=1e-5, atol=1e-5)

    debiased = (v / (1 - 0.9**3) for v in stats)
    evaluated = normalize(x, *debiased, scale, bias, feature_axes=axis, epsilon=1e-4)
    expected, _ = jax.jit(layer.apply, static_argnums=4)(params, state, None, x, False)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-4, atol=2e-5)


def test_large_mean():
    """Haiku's E[x²] − E[x]² has no digits left, and may be negative (NaN); ours is exact."""
    x = normal((512, 3), shift=2e4)
    np.testing.assert_allclose(jax.jit(batch_norm)(x)[0], exact(x), atol=2e-5)
    assert not np.abs(haiku_step(x) - exact(x)).max() < 0.1
