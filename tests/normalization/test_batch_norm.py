"""The transform and its gradient against closed forms in float64."""

import collections
import functools
import logging
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import collectives, spread
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads
from normalization.closed_forms import (
    RATIOS,
    close_per_feature,
    close_with_gradients,
    closed_form,
    compiled,
    copies,
    masked_give_bias,
    normal,
    normal_on_devices,
    weights,
    with_gradients,
)

from bn_research.normalization import (
    BatchStats,
    batch_norm,
    batch_renorm,
    merge_moments,
    normalize,
    update_batch_stats,
)

pytestmark = pytest.mark.usefixtures("strict_arrays")

BATCH, DEVICES = 16, 4
MODULE = sys.modules["bn_research.normalization.batch_norm"]  # its name is a function's too


@pytest.mark.parametrize(
    ("std", "epsilon"), [(1.0, 1e-5), (1.0, 0.0), (1e-18, 0.0), (1e-9, 0.0), (1e15, 0.0)]
)
def test_values_and_gradients_at_large_means(std, epsilon):
    x = normal((2048,), std=std)
    scale, bias = np.array([1.5, -2, 0.1, 3], np.float32), np.array([0, 1, -1, 4], np.float32)
    g = weights(x.shape)
    got = compiled(batch_norm, epsilon=epsilon)(x, scale, bias, g)
    close_with_gradients(got, closed_form(x, scale, bias, g, epsilon))


def test_two_million_elements_at_the_largest_spread():
    x = normal((2**21,), std=1e15, ratios=(0.0,))
    y, _ = jax.jit(functools.partial(batch_norm, epsilon=0.0))(x)
    assert abs(float(jnp.std(y)) - 1) < 1e-3


def hessian_vector_product(loss):
    return jax.jit(lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,))[1])


@pytest.mark.parametrize("std", [1.0, 1e-18, 1e15])
def test_hessian_vector_product(std):
    """Against differences of the closed-form gradient; at spread s it is 1/s² of that at 1."""
    x, v, g = (weights((16, 2), seed) for seed in (1, 2, 3))
    zero, one = np.zeros(2), np.ones(2)

    def gradient(x):
        return closed_form(x, one, zero, g, 0.0)[1]

    h = 1e-5
    expected = (gradient(x + h * v.astype(float)) - gradient(x - h * v.astype(float))) / (2 * h)
    x, v = (np.float32(std) * np.asarray(a, np.float32) for a in (x, v))
    hvp = hessian_vector_product(lambda x: jnp.sum(g * batch_norm(x, epsilon=0.0)[0]))
    close_per_feature(np.asarray(hvp(x, v), np.float64) * std, expected, 1e-4)


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        (dict(epsilon=0.0), False),
        (dict(), True),
        (dict(group_size=3, epsilon=0.0), True),
    ],
)
def test_derivatives_of_every_order_and_mode(options, masked):
    """First and second, forwards and backwards, against finite differences in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        x, scale, bias = rng.standard_normal((6, 2)), np.array([1.5, -0.5]), np.array([0.2, 3.0])
        where = np.array([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 1]], bool)

        @jax.jit
        def f(x, scale, bias):
            return batch_norm(x, scale, bias, where=where if masked else None, **options)[0]

        check_grads(f, (x, scale, bias), order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


def test_constant_feature_without_epsilon():
    """Gives bias and no gradient, beside a feature that varies."""
    x = np.stack([np.full(64, 0.1), np.arange(64), np.full(64, -3e4)], 1).astype(np.float32)
    scale, bias, g = weights(3, 5), weights(3, 6), weights((64, 3), 7)
    y, dx, dscale, _ = compiled(batch_norm, epsilon=0.0)(x, scale, bias, g)
    for j in (0, 2):
        np.testing.assert_array_equal(y[:, j], np.full(64, bias[j]))
        np.testing.assert_array_equal(dx[:, j], np.zeros(64))
        assert dscale[j] == 0
    assert np.all(np.isfinite(dx)) and np.abs(dx[:, 1]).max() > 0
    hvp = hessian_vector_product(lambda x: jnp.sum(g * batch_norm(x, epsilon=0.0)[0]))(x, g)
    np.testing.assert_array_equal(hvp[:, 0], np.zeros(64))


def test_constant_feature_with_epsilon():
    """Gives bias, and the gradient of a spread of √ε."""
    x, g = np.full((4, 1), 7.0, np.float32), np.arange(4, dtype=np.float32)[:, None]
    y, dx, dscale, _ = with_gradients(batch_norm, epsilon=0.01)(x, np.ones(1), np.full(1, 5.0), g)
    np.testing.assert_array_equal(y, np.full((4, 1), 5.0))
    np.testing.assert_allclose(dx, (g - 1.5) / 0.1, rtol=1e-6)
    np.testing.assert_array_equal(dscale, [0.0])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 3), {}),
        ((0, 3), {}),
        ((0, 2, 3), {}),
        ((4, 3), dict(group_size=1)),
        ((1, 3), dict(where=np.ones((1, 1), bool))),
    ],
)
def test_fewer_than_two_values(shape, options, caplog, monkeypatch):
    """Give bias and no gradient, and the log says so."""
    monkeypatch.setattr(MODULE, "_warned", set())
    x, bias = np.ones(shape, np.float32), weights(3)
    y, moments = batch_norm(x, None, bias, **options)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, shape))
    np.testing.assert_array_equal(moments.count, np.full(3, shape[0], np.float32))
    dx = jax.grad(lambda x: jnp.sum(jnp.square(batch_norm(x, **options)[0])))(x)
    np.testing.assert_array_equal(dx, np.zeros(shape))
    jax.effects_barrier()
    assert f"batch_norm of {min(shape[0], 1)} value" in caplog.text and __file__ in caplog.text


def traced(x):
    return batch_norm(x)[0]


@pytest.mark.parametrize(
    ("times", "run"),
    [
        (0, lambda x: jax.eval_shape(traced, x)),
        (0, lambda x: jax.make_jaxpr(jax.grad(lambda x: jnp.sum(traced(x))))(x)),
        (0, lambda x: jax.jit(traced).lower(x).compile()),
        (1, lambda x: [traced(x) for _ in range(3)]),
        (1, lambda x: [jax.jit(traced)(x) for _ in range(3)]),
        (1, lambda x: jax.jit(jax.grad(lambda x: jnp.sum(traced(x))))(x)),
        (1, lambda x: jax.lax.scan(lambda x, _: (traced(x), None), x, None, length=5)),
        (1, lambda x: jax.pmap(traced)(jnp.stack([x] * 8))),
        (1, lambda x: jax.vmap(traced)(jnp.stack([x] * 3))),
        (0, lambda x: traced(jnp.concatenate([x, x]))),
    ],
)
def test_a_single_value_is_told_once_and_where_numbers_are_computed(
    times, run, caplog, monkeypatch
):
    monkeypatch.setattr(MODULE, "_warned", set())
    with caplog.at_level(logging.WARNING, "bn_research"):
        run(jnp.ones((1, 3)))
        jax.effects_barrier()
    assert len(caplog.records) == times


@pytest.mark.parametrize("options", [{}, dict(epsilon=0.0)])
def test_a_batch_masked_everywhere(options):
    """Gives bias and no gradient, and leaves the running statistics their bits."""
    x, bias, g = normal((8,)), weights(4), weights((8, 4))
    run = with_gradients(batch_norm, **options)
    y, dx, dscale, dbias = run(x, np.ones(4), bias, g, np.zeros((8, 1), bool))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    np.testing.assert_array_equal(dx, np.zeros(x.shape))
    np.testing.assert_array_equal(dscale, np.zeros(4))
    np.testing.assert_allclose(dbias, g.sum(0), rtol=1e-6)
    stats = BatchStats(weights(4), weights(4) ** 2)
    moments = batch_norm(x, where=np.zeros((8, 1), bool), **options)[1]
    np.testing.assert_array_equal(update_batch_stats(stats, moments), stats)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group_size", [None, 4])
def test_a_bad_value_stays_in_its_feature_and_group(bad, group_size):
    """And is loud there: NaN for all who share statistics with it, in values and gradients."""
    x, g = weights((8, 3)), weights((8, 3), 1)
    x[6, 1] = bad
    hit = np.zeros(x.shape, bool)
    hit[0 if group_size is None else 4 :, 1] = True
    run = compiled(batch_norm, group_size=group_size)
    y, dx, *_ = run(x, np.ones(3), np.zeros(3), g)
    clean_y, clean_dx, *_ = run(np.where(hit, 0, x), np.ones(3), np.zeros(3), g)
    for got, clean in ((y, clean_y), (dx, clean_dx)):
        assert np.all(np.isnan(np.asarray(got)[hit]))
        np.testing.assert_array_equal(np.asarray(got)[~hit], np.asarray(clean)[~hit])
    moments = batch_norm(x, group_size=group_size)[1]
    np.testing.assert_array_equal(np.isnan(moments.m2), [False, True, False])


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_masked_elements(garbage):
    """Take no part, come out as bias, get no gradient; a feature may have none valid."""
    x = normal((1024,), seed=8, ratios=(*RATIOS, 0.0))
    where = np.random.default_rng(9).random(x.shape) < np.array([0.5, 0.2, 0.8, 0.5, 0.0])
    scale, bias, g = weights(5, 10), weights(5, 11), weights(x.shape, 12)
    dirty = np.where(where, x, np.float32(garbage))
    got = compiled(batch_norm)(dirty, scale, bias, g, where)
    masked_give_bias(got, bias, where)
    close_with_gradients(got, closed_form(x, scale, bias, g, where=where))


@pytest.mark.parametrize("axes", [-1, 1, (1, 3), (-4, 2)])
def test_feature_axes(axes):
    x, given = weights((3, 4, 2, 5)), (axes,) if isinstance(axes, int) else axes
    kept = sorted(axis % 4 for axis in given)
    reduced = tuple(axis for axis in range(4) if axis not in kept)
    shape = [x.shape[axis] for axis in kept]
    scale, bias = weights(shape, 13), weights(shape, 14)
    y, moments = jax.jit(functools.partial(batch_norm, feature_axes=axes))(x, scale, bias)
    x64 = x.astype(np.float64)
    mean, var = (f(reduced, keepdims=True) for f in (x64.mean, x64.var))
    expected = np.expand_dims(scale, reduced) * (x64 - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, expected + np.expand_dims(bias, reduced), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.mean, x64.mean(reduced), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moments.m2 / moments.count, x64.var(reduced), rtol=1e-5)


def grouped_closed_form(x, scale, bias, g, group_size, epsilon=1e-5, where=None):
    """A loop over groups of consecutive examples; and the means of their means and variances."""
    features, parts, means, variances = x.shape[-1], [], [], []
    for start in range(0, len(x), group_size):
        rows = slice(start, start + group_size)
        group = x[rows].reshape(-1, features).astype(np.float64)
        mask = None if where is None else where[rows].reshape(-1, features)
        part = closed_form(group, scale, bias, g[rows].reshape(-1, features), epsilon, mask)
        parts.append(part)
        means.append(group.mean(0))
        variances.append(group.var(0))
    y, dx = (np.concatenate([part[i] for part in parts]).reshape(x.shape) for i in (0, 1))
    dscale, dbias = (sum(part[i] for part in parts) for i in (2, 3))
    return y, dx, dscale, dbias, np.mean(means, 0), np.mean(variances, 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_groups_equal_a_loop_over_groups(group_size, masked):
    x = normal_on_devices((BATCH, 5), seed=15, ratios=(0.0, 1e2, 1e4))
    where = np.random.default_rng(16).random(x.shape) < 0.7 if masked else None
    scale, bias, g = weights(3, 17), weights(3, 18), weights(x.shape, 19)
    expected = grouped_closed_form(x, scale, bias, g, group_size, where=where)
    dirty = np.where(where, x, np.float32(np.nan)) if masked else x
    y, dx, dscale, _ = compiled(batch_norm, group_size=group_size)(dirty, scale, bias, g, where)
    close_per_feature(y, expected[0], 2e-5)
    close_per_feature(dx, expected[1], 2e-4)
    np.testing.assert_allclose(dscale, expected[2], rtol=1e-3, atol=1e-3)


def layer_step(**options):
    """On a device: y, gradients of the sum of all losses, running statistics after a step."""

    def run(x, scale, bias, g):
        def loss(x, scale, bias):
            y, moments = batch_norm(x, scale, bias, axis_name="batch", **options)
            return jnp.sum(g * y), (y, moments)

        (_, (y, moments)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        old = BatchStats(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]))
        stats = update_batch_stats(old, moments, momentum=0.9)
        return y, *grads, jax.lax.pmean(stats, "batch")

    return run


PLACES = [("pmap", d, g) for d in (1, 2, 4, 8) for g in (2, 4, 8, 16)]
PLACES += [("shard_map", 4, 8), ("vmap", 4, 8)]


@pytest.mark.parametrize(("kind", "devices", "group_size"), PLACES)
def test_groups_do_not_depend_on_the_number_of_devices(kind, devices, group_size):
    x = normal_on_devices((BATCH, 5), seed=20, ratios=(0.0, 1e2, 1e4))
    scale, bias, g = weights(3, 21), weights(3, 22), weights(x.shape, 23)
    y, dx, dscale, dbias, mean, var = grouped_closed_form(x, scale, bias, g, group_size)

    def split(a):
        return a.reshape(devices, BATCH // devices, *a.shape[1:])

    run = spread(kind, layer_step(group_size=group_size), devices)
    got = run(split(x), *copies((scale, bias), devices), split(g))
    close_per_feature(np.asarray(got[0]).reshape(x.shape), y, 2e-5)
    close_per_feature(np.asarray(got[1]).reshape(x.shape), dx, 2e-4)
    np.testing.assert_allclose(np.sum(got[2], 0), dscale, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.sum(got[3], 0), dbias, rtol=1e-4, atol=1e-4)
    for device in range(devices):  # new = 0.9·old + 0.1·batch from 0 and 1
        np.testing.assert_allclose(got[4].mean[device], 0.1 * mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[4].var[device], 0.9 + 0.1 * var, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "groups"), [("vmap", None), ("pmap", [[0, 3], [1, 2]]), ("shard_map", None)]
)
def test_synced_with_masks(kind, groups):
    """Devices with unequal counts, one with none, share the statistics of their union."""
    x = normal_on_devices((DEVICES, 32), seed=24, ratios=(0.0, 1e2, 1e4))
    where = np.random.default_rng(25).random(x.shape) < 0.6
    where[3] = False
    scale, bias, g = weights(3, 26), weights(3, 27), weights(x.shape, 28)
    dirty = np.where(where, x, np.float32(np.nan))
    run = spread(kind, with_gradients(batch_norm, axis_name="batch", axis_index_groups=groups))
    y, dx, _, _ = map(np.asarray, run(dirty, *copies((scale, bias), DEVICES), g, where))
    for group in groups or [list(range(DEVICES))]:
        flat = [a[group].reshape(-1, 3) for a in (x, g, where)]
        expected = closed_form(flat[0], scale, bias, flat[1], 1e-5, flat[2])
        close_per_feature(y[group].reshape(-1, 3), expected[0], 2e-5)
        close_per_feature(dx[group].reshape(-1, 3), expected[1], 2e-4)


@pytest.mark.parametrize("kind", ["pmap", "vmap"])
@pytest.mark.parametrize("std", [1e-18, 1e15])
def test_synced_at_extreme_spreads(kind, std):
    """Under vmap JAX itself differentiates every sum; nothing overflows all the same."""
    x, g = normal((DEVICES, 16), std=std, seed=29, ratios=(0.0, 3.0)), weights((DEVICES, 16, 2))
    one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    run = spread(kind, with_gradients(batch_norm, axis_name="batch", epsilon=0.0))
    y, dx, _, _ = run(x, *copies((one, zero), DEVICES), g)
    expected = closed_form(x.reshape(-1, 2), one, zero, g.reshape(-1, 2), 0.0)
    close_per_feature(np.asarray(y).reshape(-1, 2), expected[0], 1e-5)
    close_per_feature(np.asarray(dx).reshape(-1, 2), expected[1], 1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "least", "most"),
    [
        ("pmap", dict(group_size=2), 0, 0),  # groups within a device
        ("pmap", dict(group_size=4), 0, 0),  # a group is a device
        ("pmap", dict(group_size=8), 1, 2),
        ("pmap", dict(), 1, 2),
        ("shard_map", dict(group_size=4), 0, 0),
        ("shard_map", dict(group_size=16), 1, 2),
        ("shard_map", dict(axis_index_groups=[[0, 1], [2, 3]]), 1, 2),
    ],
)
def test_number_of_collectives(kind, options, least, most):
    """Forward and backward pass of a layer, counted in the compiled program."""
    run = spread(kind, with_gradients(batch_norm, axis_name="batch", **options))
    x, p = np.ones((DEVICES, BATCH // DEVICES, 3), np.float32), np.ones((DEVICES, 3), np.float32)
    found = collectives(run.lower(x, p, p, x).compile())
    assert least <= len(found) <= most and set(found) <= {"all-reduce"}, found


def test_traced_epsilon_equals_a_static_one_and_carries_no_gradient():
    x = normal((64,))

    def f(x, epsilon):
        return batch_norm(x, epsilon=epsilon)[0]

    traced = jax.jit(f)
    for epsilon in (0.3, 0.0):
        static = jax.jit(functools.partial(f, epsilon=epsilon))
        np.testing.assert_allclose(traced(x, epsilon), static(x), rtol=1e-6, atol=1e-7)
    assert jax.jit(jax.grad(lambda e: jnp.sum(x * f(x, e))))(0.3) == 0


@pytest.mark.parametrize("std", [1.0, 1e-15, 1e12])
@pytest.mark.parametrize("options", [{}, dict(epsilon=0.0), dict(group_size=4), dict(masked=True)])
def test_moments_carry_the_gradient_of_the_batch(options, std):
    """∂μ/∂x = 1/n and ∂m2/∂x = 2(x − μ), each about its own group's mean; a loss on both."""
    x, g = normal((8,), std=std, ratios=(0.0, 3.0)), weights((2, 2), 1)
    options = dict(options)
    where = np.arange(8)[:, None] < np.array([5, 8]) if options.pop("masked", False) else None

    def loss(x):
        _, moments = batch_norm(x, where=where, **options)
        return jnp.sum(g[0] * moments.mean) + jnp.sum(g[1] * moments.m2)

    keep = np.ones(x.shape, bool) if where is None else where
    size = options.get("group_size", 8)
    grouped, kept = (v.reshape(-1, size, 2).astype(np.float64) for v in (x, keep))
    mean = (grouped * kept).sum(1, keepdims=True) / kept.sum(1, keepdims=True)
    expected = kept * (g[0] / keep.sum(0) + 2 * g[1] * (grouped - mean))
    found = jax.jit(jax.grad(loss))(x)
    close_per_feature(found, expected.reshape(x.shape), 1e-4)


def test_a_loss_on_statistics_trains_its_input():
    """BN matching: images whose statistics approach given ones, by their gradient alone."""
    target = BatchStats(np.array([0.5, -1], np.float32), np.array([2.0, 0.3], np.float32))
    old = BatchStats(jnp.zeros(2), jnp.ones(2))

    def loss(x):
        new = update_batch_stats(old, batch_norm(x)[1], momentum=0.0)
        return sum(jnp.sum(jnp.square(a - b)) for a, b in zip(new, target, strict=True))

    x = jnp.asarray(weights((32, 2)))
    first = loss(x)
    x, _ = jax.lax.scan(lambda x, _: (x - jax.grad(loss)(x), None), x, None, length=200)
    assert loss(x) < 1e-4 * first
    np.testing.assert_allclose(jnp.mean(x, 0), target.mean, atol=1e-2)


@pytest.mark.parametrize("kind", ["jit", "pmap", "shard_map"])
def test_a_gradient_that_is_not_used_costs_nothing(kind):
    """A training step compiles to the same operations, collectives among them, when it is cut."""

    def step(stop_gradient):
        options = {} if kind == "jit" else dict(axis_name="batch")

        def run(x, scale, bias, g):
            def loss(x, scale, bias):
                y, moments = batch_norm(x, scale, bias, **options)
                old = BatchStats(jnp.zeros(3), jnp.ones(3))
                return jnp.sum(g * y), update_batch_stats(old, moments, stop_gradient=stop_gradient)

            (_, stats), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
            return grads, stats

        return run

    x, p = np.ones((4, 4, 3), np.float32), np.ones((4, 3), np.float32)
    args = (x[0], p[0], p[0], x[0]) if kind == "jit" else (x, p, p, x)

    def operations(stop_gradient):
        run = step(stop_gradient)
        mapped = jax.jit(run) if kind == "jit" else spread(kind, run)
        text = mapped.lower(*args).compile().as_text()
        return collections.Counter(re.findall(r"^ +(?:ROOT )?%\S+ = \S+ ([\w-]+)\(", text, re.M))

    carried, cut = operations(False), operations(True)
    assert carried == cut and sum(carried.values()) > 20
    assert carried["all-reduce"] <= 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options", [{}, {"group_size": 16}, {"where": jnp.arange(64)[:, None] < 60}]
)
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
def test_the_backward_pass_is_left_one_array(dtype, options, jit):
    """The input in its own dtype, its mask, and some numbers for each feature."""
    x, scale, bias = jnp.ones((64, 128), dtype), jnp.ones(128), jnp.zeros(128)

    @jit
    def closure(x, scale, bias):
        return jax.vjp(lambda *v: batch_norm(*v, **options)[0], x, scale, bias)[1]

    kept = jax.tree.leaves(closure(x, scale, bias))
    arrays = [v for v in kept if v.size == x.size and v.dtype != bool]
    assert [v.dtype for v in arrays] == [x.dtype]
    groups = 64 // options.get("group_size", 64)
    assert sum(v.nbytes for v in kept) <= x.nbytes + x.size + 8 * groups * scale.nbytes


def test_moments_of_groups_pool_about_each_group_mean():
    x = weights((6, 2)) + np.repeat(np.arange(2), 3)[:, None].astype(np.float32)
    _, moments = batch_norm(x, group_size=3)
    groups = x.astype(np.float64).reshape(2, 3, 2)
    np.testing.assert_array_equal(moments.count, [6, 6])
    np.testing.assert_allclose(moments.mean, groups.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(moments.m2, 3 * groups.var(1).sum(0), rtol=1e-5)


def test_normalize():
    x, mean, scale, bias = weights((4, 3, 2)), weights(3, 1), weights(3, 2), weights(3, 3)
    var = np.array([0.5, 2.0, 0.0], np.float32)
    options = dict(feature_axes=1, epsilon=0.0)
    y = normalize(x, mean, var, scale, bias, **options)
    m, v, s, b = (a.astype(np.float64)[:, None] for a in (mean, var, scale, bias))
    expected = np.where(v > 0, s * (x - m) / np.sqrt(np.where(v > 0, v, 1)), 0) + b
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        normalize(x, mean, var, feature_axes=1), (x - m) / np.sqrt(v + 1e-5), rtol=1e-5, atol=1e-6
    )
    gradient = jax.grad(lambda x: jnp.sum(normalize(x, mean, var, scale, bias, **options)))(x)
    assert np.all(np.isfinite(gradient)) and np.all(gradient[:, 2] == 0)


def test_normalize_at_large_means_in_half_precision():
    """Statistics of float32 are not rounded to the dtype of x."""
    x = jnp.full((1, 1), 100.5, jnp.bfloat16)
    y = normalize(x, np.array([100.3], np.float32), np.array([0.01], np.float32), epsilon=0.0)
    np.testing.assert_allclose(np.float64(y[0, 0]), 2.0, rtol=1e-2)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize("spec", [("data",), ("data", None, "model"), (None, "data"), (None, None)])
def test_a_sharded_batch_in_one_program(kind, spec):
    """With `jit` alone the statistics are those of the whole batch, wherever its parts lie."""
    axes = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=axes)
    x, g = (weights((32, 16, 6), seed) + 100 for seed in (1, 2))
    scale, bias = weights(6), weights(6, 1)
    expected = closed_form(x.reshape(-1, 6), scale, bias, g.reshape(-1, 6), 1e-5)
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(*spec))
        x, g = jax.device_put((x, g), sharding)
        y, dx, *_ = jax.jit(with_gradients(batch_norm))(x, scale, bias, g)
    close_per_feature(np.asarray(y).reshape(-1, 6), expected[0], 1e-5)
    close_per_feature(np.asarray(dx).reshape(-1, 6), expected[1], 1e-4)


@pytest.mark.parametrize("devices", range(2, 9))
def test_constant_features_on_devices_with_unequal_counts(devices):
    """Give bias without epsilon, though the devices' shares of the count are rounded."""
    values = np.array([0.1, -7e4, 3e7], np.float32)
    x = np.tile(values, (devices, 8, 1))
    where = np.arange(8)[None, :, None] < 1 + (3 * np.arange(devices)[:, None, None]) % 8

    def local(x, where):
        return batch_norm(x, None, np.ones(3), epsilon=0.0, where=where, axis_name="batch")

    y, moments = jax.jit(jax.vmap(local, axis_name="batch"))(x, where)
    np.testing.assert_array_equal(y, np.ones(x.shape))
    np.testing.assert_array_equal(moments.mean, x[:, 0])
    np.testing.assert_array_equal(moments.m2, np.zeros((devices, 3)))


def spelled_out(x, g):
    """Loss of BN, of its running statistics and of y, as anyone would write it."""
    flat = x.reshape(-1, x.shape[-1])
    mean = flat.mean(0)
    var = jnp.square(flat - mean[None]).mean(0)
    y = (x - mean[None, None]) / jnp.sqrt(var + 1e-5)[None, None]
    return jnp.sum(g * jnp.square(y)) + len(x) * jnp.sum(
        jnp.sin(0.1 * mean) + (0.9 + 0.1 * var) ** 2
    )


def on_a_device(x, g):
    """The part of that loss that one place of the axis "batch" sees."""
    y, moments = batch_norm(x, axis_name="batch")
    old = BatchStats(jnp.zeros(x.shape[-1], x.dtype), jnp.ones(x.shape[-1], x.dtype))
    new = update_batch_stats(old, moments, momentum=0.9)
    return jnp.sum(g * jnp.square(y)) + jnp.sum(jnp.sin(new.mean) + jnp.square(new.var))


def renormed(x, g):
    """Without bounds r and d are constants, so this is BN but for constants to the gradient."""
    stats = BatchStats(jnp.zeros(x.shape[-1], x.dtype), jnp.ones(x.shape[-1], x.dtype))
    y, moments = batch_renorm(x, stats, r_max=1.0, d_max=0.0, axis_name="batch")
    new = update_batch_stats(stats, moments, momentum=0.9)
    return jnp.sum(g * jnp.square(y)) + jnp.sum(jnp.sin(new.mean) + jnp.square(new.var))


def in_shard_map(mapped, x, g):
    """Two devices, each with all of it."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("device",))

    def local(x, g):
        return jax.lax.psum(jnp.sum(mapped(x[0], g[0])), "device") / 2

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=PartitionSpec("device"),
        out_specs=PartitionSpec(),
        check_vma=False,  # with it JAX itself sums over no vmapped axis
    )
    return run(jnp.stack([x, x]), jnp.stack([g, g]))


WRAPPERS = {
    "plain": lambda f, x, g: f(x, g),
    "jit": lambda f, x, g: jax.jit(f)(x, g),
    "checkpoint": lambda f, x, g: jax.checkpoint(f)(x, g),
    "scan": lambda f, x, g: jax.lax.scan(lambda c, _: (c + f(x, g), None), 0 * g[:, 0, 0], None, 1)[
        0
    ],
    "cond": lambda f, x, g: jax.lax.cond(x[0, 0, 0] < 9, f, lambda x, g: 0 * g[:, 0, 0], x, g),
    "jit of jit": lambda f, x, g: jax.jit(jax.jit(f))(x, g),
    "vmap of jit": lambda f, x, g: jax.vmap(jax.jit(f))(x[None], g[None]),
}


OUTSIDE = [("vmap", wrapper, on_a_device) for wrapper in WRAPPERS]
OUTSIDE += [(kind, "scan", on_a_device) for kind in ("pmap", "shard_map", "vmap in shard_map")]
OUTSIDE += [("vmap", "jit", renormed), ("vmap in shard_map", "jit", renormed)]


@pytest.mark.parametrize(("kind", "wrapper", "layer"), OUTSIDE)
def test_derivatives_from_outside_of_a_mapped_axis(kind, wrapper, layer):
    """The axis is bound inside; forward, reverse and forward over reverse are taken outside."""
    wrap = WRAPPERS[wrapper]
    with jax.enable_x64(True):
        x, g, v = (jnp.asarray(weights((4, 6, 3), seed), float) for seed in (1, 2, 3))
        if kind == "vmap in shard_map":
            mapped = jax.vmap(layer, axis_name="batch")

            def f(x):
                return in_shard_map(functools.partial(wrap, mapped), x, g)
        else:
            vmapped = jax.vmap(layer, axis_name="batch")
            mapped = vmapped if kind == "vmap" else spread(kind, layer)

            def f(x):
                return jnp.sum(wrap(mapped, x, g))

        def exact(x):
            return spelled_out(x, g)

        def derivatives(f):
            reverse = jax.grad(f)
            return f(x), reverse(x), jax.jvp(f, (x,), (v,))[1], jax.jvp(reverse, (x,), (v,))[1]

        both = jax.jit(lambda: (derivatives(f), derivatives(exact)))()
        for found, expected in zip(*both, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def complex_normal(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) + 2j * rng.standard_normal(shape) + 3 - 1j


def complex_batch_norm(x, scale, bias, where):
    mean = jnp.mean(x, (0, 1), where=where)
    var = jnp.mean(jnp.square(jnp.abs(x - mean[None, None])), (0, 1), where=where)
    y = (x - mean[None, None]) / jnp.sqrt(var + 1e-5)[None, None] * scale[None, None]
    return jnp.where(where, y + bias[None, None], bias[None, None])


@pytest.mark.parametrize("kind", ["alone", "vmap", "pmap"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", ["x", "x and bias", "scale"])
def test_complex_numbers(kind, masked, given):
    """Divided by the root of the mean of |x − μ|²; values and gradients, in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x, g = complex_normal((4, 6, 3)), weights((4, 6, 3))
        scale, bias = np.array([1.5, -2.0, 0.3]), np.array([0.1, 2.0, -1.0])
        if given == "scale":
            x, scale = x.real, scale + 1j * bias
        if given == "x and bias":
            bias = bias + 2j
        where = np.random.default_rng(3).random(x.shape) < (0.6 if masked else 2.0)

        def own(x, scale, bias):
            if kind == "alone":
                return batch_norm(x, scale, bias, where=where)[0]

            def local(x, where):
                return batch_norm(x, scale, bias, where=where, axis_name="batch")[0]

            return spread(kind, local)(x, where)

        def loss(f):
            def of(x, scale, bias):
                y = f(x, scale, bias)
                return jnp.sum(g * jnp.square(jnp.abs(y - 0.3j))) + jnp.sum(g * y.real), y

            return jax.value_and_grad(of, (0, 1, 2), has_aux=True)

        found = loss(own)(x, scale, bias)
        expected = loss(lambda *v: complex_batch_norm(*v, where))(x, scale, bias)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-11)


SIZES = {"batch": 9, "4*n": 16}


@pytest.mark.parametrize(
    ("batch", "options"),
    [("batch", {}), ("batch", dict(epsilon=0.0)), ("4*n", dict(group_size=4)), ("batch", "mask")],
)
@pytest.mark.parametrize("inner", ["", "5, ", "20, "])
def test_exported_with_a_symbolic_batch(batch, options, inner):
    """Forward and backward, with the numbers of the same shape known."""

    def run(x, g):
        where = x < 1 if options == "mask" else None
        more = {} if options == "mask" else options

        def loss(x):
            y, moments = batch_norm(x, where=where, **more)
            old = BatchStats(jnp.zeros(3), jnp.ones(3))
            return jnp.sum(g * y), (y, update_batch_stats(old, moments))

        return jax.value_and_grad(loss, has_aux=True)(x)

    shape = jax.export.symbolic_shape(f"{batch}, {inner}3")
    spec = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = jax.export.export(jax.jit(run))(spec, spec)
    known = (SIZES[batch], *map(int, inner.split(",")[:-1]), 3)
    args = weights(known, 1), weights(known, 2)
    pairs = zip(jax.tree.leaves(exported.call(*args)), jax.tree.leaves(run(*args)), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_symbolic_batch_that_no_group_is_known_to_divide():
    spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 3"), jnp.float32)
    with pytest.raises(ValueError, match=r"group_size=4 does not divide.*call a symbolic.*'4\*n'"):
        jax.export.export(jax.jit(functools.partial(batch_norm, group_size=4)))(spec)


def test_normalize_with_a_mask():
    """Masked elements come out as bias and have no gradient, whatever they hold."""
    x, where = weights((6, 3)), np.arange(6)[:, None] < np.array([6, 4, 0])
    bias, mean, var = weights(3, 1), weights(3, 2), np.ones(3, np.float32)
    dirty = np.where(where, x, np.float32(np.nan))

    def loss(x):
        y = normalize(x, mean, var, None, bias, where=where)
        return jnp.sum(y), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(dirty)
    expected = np.where(where, (x - mean) / np.sqrt(1 + 1e-5), 0) + bias
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, where / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize("spec", [("data",), ("data", None, "model"), (None, None, "model")])
@pytest.mark.parametrize("held", [(), ("model",)])
def test_statistics_of_sharded_features(kind, spec, held):
    """Running statistics keep their layout, so that a loop can carry them; numbers as in numpy."""
    mesh = jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2
    )
    x = weights((16, 4, 6)) + 3
    scale = weights(6, 1)

    def step(stats, _, x, scale):
        y, moments = batch_norm(x, scale)
        _, grouped = batch_norm(x, scale, group_size=4)
        both = merge_moments(moments, grouped)
        return update_batch_stats(stats, both, momentum=0.5), jnp.sum(jnp.square(y))

    @jax.jit
    def run(stats, x, scale):
        body = functools.partial(step, x=x, scale=scale)
        return jax.lax.scan(body, stats, None, length=2)[0]

    with jax.set_mesh(mesh):
        x_sharding, held = (
            jax.sharding.NamedSharding(mesh, PartitionSpec(*names)) for names in (spec, held)
        )
        stats = jax.device_put(BatchStats(jnp.zeros(6), jnp.ones(6)), held)
        new = run(stats, *jax.device_put((x, scale), (x_sharding, held)))
        if kind == "Explicit":
            layouts = [[jax.typeof(leaf).sharding.spec for leaf in v] for v in (new, stats)]
            assert layouts[0] == layouts[1]
    x = x.astype(float)
    inside = x.reshape(4, 4, 4, 6).var((1, 2)).mean(0)
    np.testing.assert_allclose(new.mean, 0.75 * x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(new.var, 0.25 + 0.375 * (x.var((0, 1)) + inside), rtol=1e-5)
