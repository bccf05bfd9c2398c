"""Batch renormalization against its closed form in float64, and against its two limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from bn_research.normalization import BatchStats, batch_norm, normalize
from bn_research.normalization.renorm import batch_renorm

pytestmark = pytest.mark.usefixtures("strict_arrays")

RATIOS = (0.0, 1e2, 1e3, 1e4)  # mean/std, one per feature
DEVICES = 4
INF = float("inf")
UNBOUNDED = dict(r_max=INF, d_max=INF)
BATCH_NORM = dict(r_max=1.0, d_max=0.0)
PAPER = dict(r_max=3.0, d_max=5.0)
# Running minus batch mean and running over batch deviation, in units of the batch deviation, one
# per feature: both bounded, only d bounded, r bounded from below, free.
MEAN_OFF, STD_OFF = np.array([-200.0, 8.0, -1.0, 0.3]), np.array([0.2, 0.7, 5.0, 1.2])


def normal(shape, *, std=1.0, seed=0, ratios=RATIOS):
    noise = np.random.default_rng(seed).standard_normal((*shape, len(ratios)))
    return ((noise + np.array(ratios)) * std).astype(np.float32)


def weights(shape, seed=100):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def running(x, dtype=np.float32, mean_off=MEAN_OFF, std_off=STD_OFF):
    """Running statistics off those of x, whose features are on the last axis."""
    axes = tuple(range(x.ndim - 1))
    std = x.std(axes, dtype=np.float64)
    mean = x.mean(axes, dtype=np.float64) + mean_off * std
    return BatchStats(mean.astype(dtype), np.square(std_off * std).astype(dtype))


def correction(v, mean, var, r_max, d_max, epsilon):
    """Both corrections, r and d, of one feature, whose valid elements are v; 1/0 is 0."""
    sigma = np.sqrt(var + epsilon)
    inverse = 1 / sigma if sigma > 0 else 0.0
    r = np.clip(np.sqrt(v.var() + epsilon) * inverse, 1 / r_max, r_max)
    return r, np.clip((v.mean() - mean) * inverse, -d_max, d_max)


def closed_form(x, stats, scale, bias, g, *, r_max, d_max, epsilon=1e-5, where=None):
    """Values and gradients of Σ g·y in x, scale and bias; x of shape (elements, features)."""
    x, scale, bias, g, *stats = (np.asarray(v, np.float64) for v in (x, scale, bias, g, *stats))
    where = np.ones(x.shape, bool) if where is None else where
    y, dx = np.broadcast_to(bias, x.shape).copy(), np.zeros(x.shape)
    dscale = np.zeros(x.shape[1])
    for j, keep in enumerate(where.T):
        v = x[keep, j]
        if not v.size:
            continue
        r, d = correction(v, stats[0][j], stats[1][j], r_max, d_max, epsilon)
        spread = v.var() + epsilon
        rstd = 1 / np.sqrt(spread) if spread > 0 else 0.0
        x_hat, dx_hat = (v - v.mean()) * rstd, g[keep, j] * scale[j] * r
        y[keep, j] += scale[j] * (x_hat * r + d)
        dx[keep, j] = rstd * (dx_hat - dx_hat.mean() - x_hat * np.mean(x_hat * dx_hat))
        dscale[j] = np.sum(g[keep, j] * (x_hat * r + d))
    return y, dx, dscale, g.sum(0)


def close_per_feature(got, expected, rtol):
    """Largest error of each feature (last axis), relative to its largest entry."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected)
    axes = tuple(range(expected.ndim - 1))
    error, size = np.abs(got - expected).max(axes), np.abs(expected).max(axes)
    assert np.all(error <= rtol * size), f"relative errors {error / size}"


def with_gradients(**options):
    """(x, stats, scale, bias, g, where, r_max, d_max) -> y, gradients of Σ g·y in x, γ and β."""

    def run(x, stats, scale, bias, g, where=None, r_max=3.0, d_max=5.0):
        def loss(x, scale, bias):
            bounds = dict(r_max=r_max, d_max=d_max)
            y, _ = batch_renorm(x, stats, scale, bias, where=where, **bounds, **options)
            return jnp.sum(g * y), y

        (_, y), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return (y, *grads)

    return run


default_run = jax.jit(with_gradients())
bare_run = jax.jit(with_gradients(epsilon=0.0))


@pytest.mark.parametrize("bounds", [BATCH_NORM, dict(r_max=1.1, d_max=0.2), PAPER, UNBOUNDED])
@pytest.mark.parametrize(("std", "epsilon"), [(1.0, 1e-5), (1e-18, 0.0), (1e15, 0.0)])
def test_values_and_gradients_at_large_means(std, epsilon, bounds):
    x = normal((2048,), std=std)
    stats, scale, bias, g = running(x), weights(4, 1), weights(4, 2), weights(x.shape, 3)
    run = default_run if epsilon else bare_run
    y, dx, dscale, dbias = run(x, stats, scale, bias, g, **bounds)
    expected = closed_form(x, stats, scale, bias, g, epsilon=epsilon, **bounds)
    close_per_feature(y, expected[0], 1e-5)
    close_per_feature(dx, expected[1], 1e-4)
    np.testing.assert_allclose(dscale, expected[2], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(dbias, expected[3], rtol=1e-4, atol=1e-3)


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
    y, dx, dscale, dbias = default_run(dirty, stats, scale, bias, g, where)
    np.testing.assert_array_equal(np.asarray(y)[~where], np.broadcast_to(bias, x.shape)[~where])
    assert np.all(np.asarray(dx)[~where] == 0)
    expected = closed_form(x, stats, scale, bias, g, where=where, **PAPER)
    close_per_feature(y, expected[0], 1e-5)
    close_per_feature(dx, expected[1], 1e-4)
    np.testing.assert_allclose(dscale, expected[2], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(dbias, expected[3], rtol=1e-4, atol=1e-3)


def spread(kind, fn):
    """Maps fn over a leading axis of devices, named "batch"."""
    if kind == "vmap":
        return jax.jit(jax.vmap(fn, axis_name="batch"))
    assert jax.device_count() >= DEVICES
    devices = jax.devices()[:DEVICES]
    if kind == "pmap":
        return jax.pmap(fn, axis_name="batch", devices=devices)

    def local(*args):
        one = jax.tree.map(lambda leaf: leaf[0], args)
        return jax.tree.map(lambda leaf: leaf[None], fn(*one))

    mesh, spec = Mesh(np.array(devices), ("batch",)), PartitionSpec("batch")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))


@pytest.mark.parametrize(
    ("kind", "groups"), [("vmap", None), ("pmap", [[0, 3], [1, 2]]), ("shard_map", None)]
)
def test_synced_with_masks(kind, groups):
    """Devices with unequal counts, one with none, are corrected by the statistics of all."""
    x = normal((DEVICES, 32), seed=17)
    x += np.arange(DEVICES, dtype=np.float32)[:, None, None]
    where = np.random.default_rng(18).random(x.shape) < 0.6
    where[3] = False
    stats, scale, bias, g = running(x), weights(4, 19), weights(4, 20), weights(x.shape, 21)
    dirty = np.where(where, x, np.float32(np.nan))
    copies = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (DEVICES, 4)), (stats, scale, bias))
    run = spread(kind, with_gradients(axis_name="batch", axis_index_groups=groups))
    y, dx, _, _ = (np.asarray(a) for a in run(dirty, *copies, g, where))
    for group in groups or [range(DEVICES)]:
        group = list(group)
        flat = [a[group].reshape(-1, 4) for a in (x, g, where)]
        expected = closed_form(flat[0], stats, scale, bias, flat[1], where=flat[2], **PAPER)
        close_per_feature(y[group].reshape(-1, 4), expected[0], 2e-5)
        close_per_feature(dx[group].reshape(-1, 4), expected[1], 2e-4)


@pytest.mark.parametrize("bounds", [PAPER, UNBOUNDED])
def test_features_without_spread_and_without_epsilon(bounds):
    """Constant in the batch, of running variance 0, and both; beside one that varies."""
    line = np.arange(64) / 64
    x = np.stack([np.full(64, 0.1), line, np.full(64, -3e4), line], 1).astype(np.float32)
    stats = BatchStats(np.array([0.4, 2, 7, 0.3], np.float32), np.array([4, 0, 0, 0.2], np.float32))
    scale, bias, g = weights(4, 22), weights(4, 23), weights(x.shape, 24)
    y, dx, dscale, _ = bare_run(x, stats, scale, bias, g, **bounds)
    expected = closed_form(x, stats, scale, bias, g, epsilon=0.0, **bounds)
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
        expected = closed_form(x, stats, one, zero, g, r_max=r_max, d_max=d_max)[0]
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


@pytest.mark.parametrize(
    ("x", "scale", "dtype", "expected"),
    [
        ("bfloat16", None, None, "bfloat16"),
        ("bfloat16", "float32", None, "float32"),
        ("float32", "float32", "bfloat16", "bfloat16"),
    ],
)
def test_dtype_of_the_result(x, scale, dtype, expected):
    """Promotion of x, scale and bias, unless dtype says otherwise; statistics do not count."""
    x = jnp.asarray(weights((8, 2)), x)
    params = (None, None) if scale is None else (jnp.ones(2, scale), jnp.zeros(2, scale))
    stats = BatchStats(jnp.zeros(2), jnp.ones(2))
    renorm = functools.partial(batch_renorm, dtype=dtype, **PAPER)
    y, moments = jax.eval_shape(renorm, x, stats, *params)
    assert y.dtype == expected and moments.mean.dtype == moments.m2.dtype == jnp.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(r_max=0.99), "r_max=0.99 is not allowed: it must be ≥ 1"),
        (dict(r_max=float("nan")), "r_max=nan is not allowed"),
        (dict(d_max=-1e-9), "d_max=-1e-09 is not allowed: it must be ≥ 0"),
        (dict(stats=BatchStats(np.zeros(2), np.ones(3))), r"stats.mean has shape \(2,\).*\(3,\)"),
        (dict(stats=BatchStats(np.zeros(3), np.ones((3, 1)))), r"stats.var has shape \(3, 1\)"),
        (dict(x=np.ones((6, 3), np.complex64)), "x has dtype complex64: allowed are real"),
        (dict(feature_axes=2), "feature_axes=2 is out of range.*-2 to 1"),
        (dict(epsilon=-1.0), "epsilon=-1.0 is not allowed: it must be ≥ 0"),
        (dict(scale=np.ones(4, np.float32)), r"scale has shape \(4,\).*\(3,\)"),
        (dict(where=np.ones((3, 6), bool)), r"where has shape \(3, 6\).*\(6, 3\)"),
        (dict(axis_index_groups=[[0]]), r"axis_index_groups=\[\[0\]\] needs axis_name"),
    ],
)
def test_bad_arguments(kwargs, message):
    stats = BatchStats(np.zeros(3, np.float32), np.ones(3, np.float32))
    kwargs = dict(x=np.ones((6, 3), np.float32), stats=stats, **PAPER) | kwargs
    with pytest.raises(ValueError, match=message):
        batch_renorm(**kwargs)
