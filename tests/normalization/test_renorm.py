"""Batch renormalization against its closed form in float64, and against its two limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import spread
from normalization.closed_forms import (
    close_per_feature,
    close_with_gradients,
    closed_form,
    compiled,
    copies,
    correction,
    masked_give_bias,
    normal,
    normal_on_devices,
    weights,
    with_gradients,
)

from bn_research.normalization import BatchStats, batch_norm, normalize
from bn_research.normalization.renorm import batch_renorm

pytestmark = pytest.mark.usefixtures("strict_arrays")

DEVICES = 4
INF = float("inf")
UNBOUNDED = dict(r_max=INF, d_max=INF)
BATCH_NORM = dict(r_max=1.0, d_max=0.0)
PAPER = dict(r_max=3.0, d_max=5.0)
# Running minus batch mean and running over batch deviation, in units of the batch deviation, one
# per feature: both bounded, only d bounded, r bounded from below, free.
MEAN_OFF, STD_OFF = np.array([-200.0, 8.0, -1.0, 0.3]), np.array([0.2, 0.7, 5.0, 1.2])


def running(x, dtype=np.float32, mean_off=MEAN_OFF, std_off=STD_OFF):
    """Running statistics off those of x, whose features are on the last axis."""
    axes = tuple(range(x.ndim - 1))
    std = x.std(axes, dtype=np.float64)
    mean = x.mean(axes, dtype=np.float64) + mean_off * std
    return BatchStats(mean.astype(dtype), np.square(std_off * std).astype(dtype))


@pytest.mark.parametrize("bounds", [BATCH_NORM, dict(r_max=1.1, d_max=0.2), PAPER, UNBOUNDED])
@pytest.mark.parametrize(("std", "epsilon"), [(1.0, 1e-5), (1e-18, 0.0), (1e15, 0.0)])
def test_values_and_gradients_at_large_means(std, epsilon, bounds):
    x = normal((2048,), std=std)
    stats, scale, bias, g = running(x), weights(4, 1), weights(4, 2), weights(x.shape, 3)
    got = compiled(batch_renorm, epsilon=epsilon)(x, scale, bias, g, stats=stats, **bounds)
    close_with_gradients(got, closed_form(x, scale, bias, g, epsilon, stats=stats, **bounds))


def test_the_running_statistics_are_off_by_enough_to_meet_each_bound():
    x = normal((2048,)).astype(np.float64)
    corrections = [
        correction(v, *s, **PAPER, epsilon=0) for v, *s in zip(x.T, *running(x), strict=True)
    ]
    r, d = np.transpose(corrections)
    np.testing.assert_allclose(r, [3, 1 / 0.7, 1 / 3, 1 / 1.2], rtol=1e-2)
    np.testing.assert_allclose(d, [5, -5, 0.2, -0.3 / 1.2], rtol=1e-2)


def test_without_bounds_equals_normalize():
    with jax.enable_x64(True):
        x = np.random.default_rng(4).standard_normal((3, 16, 4)) + np.array([0, 1, 10, -100])
        stats, scale, bias = running(x, np.float64), weights(4, 5), weights(4, 6)
        y, _ = batch_renorm(x, stats, scale, bias, **UNBOUNDED)
        expected = normalize(x, *stats, scale, bias)
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_with_the_tightest_bounds_is_batch_norm(masked):
    x, scale, bias, g = normal((64,)), weights(4, 7), weights(4, 8), weights((64, 4), 9)
    where = np.random.default_rng(10).random(x.shape) < 0.7 if masked else None
    renorm = functools.partial(batch_renorm, stats=running(x), **BATCH_NORM)

    def run(transform):
        def loss(x, scale, bias):
            y, moments = transform(x, scale=scale, bias=bias, where=where)
            return jnp.sum(g * y), (y, moments)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)

    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)
    jax.tree.map(close, run(renorm), run(batch_norm))


def test_gradient_and_hessian_vector_product_hold_r_and_d_constant():
    """Against differences in float64 of values with r and d frozen; one feature free, one not."""
    rng = np.random.default_rng(11)
    x, v, g = (rng.standard_normal((8, 2)) for _ in range(3))
    scale, bias = np.array([1.5, -0.5]), np.array([0.2, 3.0])
    stats = running(x, np.float64, mean_off=[0.4, 9.0], std_off=[1.3, 0.2])
    frozen = np.transpose(
        [correction(*column, **PAPER, epsilon=1e-5) for column in zip(x.T, *stats, strict=True)]
    )

    def value(x):
        x_hat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        return np.sum(g * (scale * (x_hat * frozen[0] + frozen[1]) + bias))

    def gradient(x, h=1e-5):
        steps = h * np.eye(x.size).reshape(-1, *x.shape)
        differences = [(value(x + step) - value(x - step)) / (2 * h) for step in steps]
        return np.reshape(differences, x.shape)

    h = 1e-4
    expected = gradient(x), (gradient(x + h * v, h) - gradient(x - h * v, h)) / (2 * h)
    with jax.enable_x64(True):

        def loss(x):
            return jnp.sum(g * batch_renorm(x, stats, scale, bias, **PAPER)[0])

        got = jax.jit(lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,)))(x, v)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_statistics_bounds_and_epsilon_carry_no_gradient():
    x = weights((8, 2))
    args = BatchStats(np.full(2, 0.1, np.float32), np.full(2, 1.2, np.float32)), 3.0, 5.0, 1e-3

    def loss(stats, r_max, d_max, epsilon):
        y, moments = batch_renorm(x, stats, r_max=r_max, d_max=d_max, epsilon=epsilon)
        return jnp.sum(x * y) + sum(map(jnp.sum, moments))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*args)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_moments_carry_the_gradient_of_the_batch():
    """∂Σμ/∂x = 1/n, ∂Σm2/∂x = 2(x − μ)."""
    x, stats = weights((8, 2)), BatchStats(np.full(2, 0.1, np.float32), np.ones(2, np.float32))
    gradient = jax.grad(lambda x: sum(map(jnp.sum, batch_renorm(x, stats, **PAPER)[1])))(x)
    np.testing.assert_allclose(gradient, 1 / 8 + 2 * (x - x.mean(0)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_masked_elements(garbage):
    """Take no part, come out as bias, get no gradient; a feature may have none valid."""
    x = normal((1024,), seed=12)
    stats = running(x)
    where = np.random.default_rng(13).random(x.shape) < np.array([0.5, 0.2, 0.8, 0.0])
    scale, bias, g = weights(4, 14), weights(4, 15), weights(x.shape, 16)
    dirty = np.where(where, x, np.float32(garbage))
    got = compiled(batch_renorm)(dirty, scale, bias, g, where, stats=stats, **PAPER)
    masked_give_bias(got, bias, where)
    close_with_gradients(got, closed_form(x, scale, bias, g, where=where, stats=stats, **PAPER))


@pytest.mark.parametrize(
    ("kind", "groups"), [("vmap", None), ("pmap", [[0, 3], [1, 2]]), ("shard_map", None)]
)
def test_synced_with_masks(kind, groups):
    """Devices with unequal counts, one with none, are corrected by the statistics of all."""
    x = normal_on_devices((DEVICES, 32), seed=17)
    where = np.random.default_rng(18).random(x.shape) < 0.6
    where[3] = False
    stats, scale, bias, g = running(x), weights(4, 19), weights(4, 20), weights(x.shape, 21)
    dirty = np.where(where, x, np.float32(np.nan))
    options = dict(stats=stats, axis_name="batch", axis_index_groups=groups, **PAPER)
    run = spread(kind, with_gradients(batch_renorm, **options))
    y, dx, _, _ = map(np.asarray, run(dirty, *copies((scale, bias), DEVICES), g, where))
    for group in groups or [list(range(DEVICES))]:
        flat = [a[group].reshape(-1, 4) for a in (x, g, where)]
        bounds = dict(where=flat[2], stats=stats, **PAPER)
        expected = closed_form(flat[0], scale, bias, flat[1], **bounds)
        close_per_feature(y[group].reshape(-1, 4), expected[0], 2e-5)
        close_per_feature(dx[group].reshape(-1, 4), expected[1], 2e-4)


@pytest.mark.parametrize("bounds", [PAPER, UNBOUNDED])
def test_features_without_spread_and_without_epsilon(bounds):
    """Constant in the batch, of running variance 0, and both; beside one that varies."""
    line = np.arange(64) / 64
    x = np.stack([np.full(64, 0.1), line, np.full(64, -3e4), line], 1).astype(np.float32)
    stats = BatchStats(np.array([0.4, 2, 7, 0.3], np.float32), np.array([4, 0, 0, 0.2], np.float32))
    scale, bias, g = weights(4, 22), weights(4, 23), weights(x.shape, 24)
    bare = compiled(batch_renorm, epsilon=0.0)
    y, dx, dscale, _ = bare(x, scale, bias, g, stats=stats, **bounds)
    expected = closed_form(x, scale, bias, g, 0.0, stats=stats, **bounds)
    for got, reference in zip((y, dx, dscale), expected[:3], strict=True):
        np.testing.assert_allclose(got, reference, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(y[:, 2], np.full(64, bias[2]))
    np.testing.assert_array_equal(np.asarray(dx)[:, [0, 2]], np.zeros((64, 2)))
    if bounds is UNBOUNDED:
        limit = normalize(x, *stats, scale, bias, epsilon=0.0)
        np.testing.assert_allclose(y, limit, rtol=1e-5, atol=1e-6)


def test_a_schedule_of_bounds_compiles_once():
    """The paper's: no correction at first, then more and more of it."""
    x, compilations = normal((64,)), 0
    stats = running(x)

    @jax.jit
    def step(x, r_max, d_max):
        nonlocal compilations
        compilations += 1
        return batch_renorm(x, stats, r_max=r_max, d_max=d_max)[0]

    one, zero, g = np.ones(4), np.zeros(4), np.zeros(x.shape)
    for r_max, d_max in ((1.0, 0.0), (1.5, 2.0), (3.0, 5.0), (INF, INF)):
        expected = closed_form(x, one, zero, g, stats=stats, r_max=r_max, d_max=d_max)[0]
        close_per_feature(step(x, r_max, d_max), expected, 1e-5)
    assert compilations == 1


def test_feature_axes():
    x, shape = weights((3, 4, 2, 5)), (4, 5)
    mean, var = weights(shape, 25), np.square(weights(shape, 26)) + 0.5
    scale, bias = weights(shape, 27), weights(shape, 28)
    stats = BatchStats(mean, var)
    y, moments = batch_renorm(x, stats, scale, bias, feature_axes=(3, 1), **UNBOUNDED)
    m, v, s, b = (a[:, None, :] for a in (mean, var, scale, bias))
    np.testing.assert_allclose(y, s * (x - m) / np.sqrt(v + 1e-5) + b, rtol=1e-4, atol=1e-5)
    expected = batch_norm(x, feature_axes=(1, 3))[1]
    jax.tree.map(np.testing.assert_array_equal, moments, expected)
