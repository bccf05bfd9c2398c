"""Moments against numpy in float64 of the same input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import spread
from normalization.closed_forms import RATIOS, normal, normal_on_devices

from bn_research.normalization import (
    Moments,
    batch_moments,
    batch_norm,
    merge_moments,
    sync_moments,
    variance,
)

pytestmark = pytest.mark.usefixtures("strict_arrays")

DEVICES = 4


def reference(x, where=None):
    """Count, mean, m2 of each feature of the last axis, in float64."""
    x = np.asarray(x).astype(np.float64).reshape(-1, x.shape[-1])
    where = np.ones(x.shape, bool) if where is None else where.reshape(x.shape)
    columns = [column[keep] for column, keep in zip(x.T, where.T, strict=True)]
    mean = [c.mean() if c.size else 0.0 for c in columns]
    m2 = [np.square(c - c.mean()).sum() if c.size else 0.0 for c in columns]
    return np.array([c.size for c in columns]), np.array(mean), np.array(m2)


def assert_moments(moments, count, mean, m2, *, rtol=1e-5):
    std = np.sqrt(m2 / np.maximum(count, 1))
    np.testing.assert_array_equal(moments.count, count)
    error = np.abs(np.asarray(moments.mean, np.float64) - mean)
    np.testing.assert_array_less(error, 1e-6 * np.abs(mean) + 1e-5 * std + 1e-45)
    np.testing.assert_allclose(moments.m2, m2, rtol=rtol)


every_kind = pytest.mark.parametrize("kind", ["vmap", "pmap", "shard_map"])

moments_of = jax.jit(batch_moments)
masked_moments_of = jax.jit(lambda x, where: batch_moments(x, where=where))


@jax.jit
def variance_gradient(x):
    return jax.grad(lambda x: jnp.sum(variance(batch_moments(x))))(x)


@pytest.mark.parametrize("std", [1.0, 1e-18, 1e15])
def test_accuracy_at_large_means(std):
    """Variance within 1e-5 of float64, its gradient 2(x − μ)/n within 1e-4."""
    x = normal((4096,), std=std)
    count, mean, m2 = reference(x)
    moments = moments_of(x)
    assert_moments(moments, count, mean, m2)
    np.testing.assert_allclose(variance(moments), m2 / count, rtol=1e-5)
    np.testing.assert_allclose(variance(moments, unbiased=True), m2 / (count - 1), rtol=1e-5)
    expected = 2 * (x.astype(np.float64) - mean) / count
    error = np.abs(variance_gradient(x) - expected).max(0)
    np.testing.assert_array_less(error, 1e-4 * np.abs(expected).max(0))


def test_two_million_elements_at_the_largest_spread():
    """An early layer reduces millions of elements: their m2 of 2e36 fits float32."""
    x = normal((2**21,), std=1e15, ratios=(0.0,))
    np.testing.assert_allclose(moments_of(x).m2, reference(x)[2], rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_first_or_largest_element_far_from_the_mean(masked):
    """500 standard deviations away: a shift by one element alone would lose five digits."""
    x = normal((2**18,), seed=1, ratios=(0.0, 1e2))
    x[0] += 512
    where = np.ones(x.shape, bool)
    moments = masked_moments_of(x, where) if masked else moments_of(x)
    assert_moments(moments, *reference(x))


def test_a_sorted_batch():
    """The part that gives the shift lies as far from the mean as it can: σ·√15."""
    x = normal((2**14,), seed=2)
    x[: 2**10] += 64 * np.array(RATIOS, np.float32) + 64
    assert_moments(moments_of(x), *reference(x))


def test_gradient_of_the_mean():
    x = normal((32,))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(batch_moments(x).mean)))(x)
    np.testing.assert_allclose(gradient, np.full(x.shape, 1 / 32), rtol=1e-6)


def test_constant_features_are_exact():
    values = np.array([0.1, -7e4, 1e-30, 3e7, 0.0], np.float32)
    moments = moments_of(np.tile(values, (100_000, 1)))
    np.testing.assert_array_equal(moments.mean, values)
    np.testing.assert_array_equal(moments.m2, 0)
    np.testing.assert_array_equal(moments.count, 100_000)


@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [("bfloat16", 100, 1), ("bfloat16", 3e3, 8), ("float16", 1e3, 1), ("float16", 6e4, 1e3)],
)
def test_half_precision_is_reduced_in_float32(dtype, mean, std):
    noise = np.random.default_rng(1).standard_normal((2048, 2))
    x = jnp.asarray(np.minimum(mean + std * noise, 6.5e4), dtype)
    moments = moments_of(x)
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
    assert_moments(moments, *reference(x))
    where = noise < 0.5
    masked = masked_moments_of(x, where)
    assert {leaf.dtype for leaf in masked} == {jnp.dtype("float32")}
    assert_moments(masked, *reference(x, where))


def test_float64_is_reduced_in_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(2).standard_normal((512, 3)) + 1e6
        moments = batch_moments(x)
        assert [leaf.dtype for leaf in moments] == ["float64"] * 3
        count, mean, m2 = reference(x)
        np.testing.assert_allclose(moments.mean, mean, rtol=1e-15)
        np.testing.assert_allclose(moments.m2, m2, rtol=1e-12)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_masked_elements_are_as_if_absent(garbage):
    """Values and gradients, each feature with its own count, one with none at all."""
    x = normal((2048,), seed=3, ratios=(*RATIOS, 5.0))
    where = np.random.default_rng(4).random(x.shape) < np.array([0.5, 0.1, 0.9, 0.5, 0.0])
    count, mean, m2 = reference(x, where)
    dirty = np.where(where, x, np.float32(garbage))
    moments = masked_moments_of(dirty, where)
    assert_moments(moments, count, mean, m2)
    assert moments.count[-1] == moments.mean[-1] == moments.m2[-1] == 0
    gradient = jax.jit(
        jax.grad(lambda x, w: jnp.sum(variance(batch_moments(x, where=w)))),
    )(dirty, where)
    expected = np.where(where, 2 * (x.astype(np.float64) - mean) / np.maximum(count, 1), 0)
    assert np.all(np.asarray(gradient)[~where] == 0)
    np.testing.assert_array_less(
        np.abs(gradient - expected).max(0)[:-1], 1e-4 * np.abs(expected).max(0)[:-1]
    )


def test_mask_of_examples_broadcasts():
    x = normal((6, 2))
    where = np.array([1, 1, 0, 1, 0, 1], bool)
    x[~where] = np.nan
    assert_moments(batch_moments(x, where=where[:, None, None]), *reference(x[where]))


def test_without_any_element():
    moments = batch_moments(np.zeros((0, 3), np.float32))
    np.testing.assert_array_equal(moments, np.zeros((3, 3)))
    np.testing.assert_array_equal(variance(moments, unbiased=True), np.zeros(3))


def test_one_element_has_no_variance():
    moments = batch_moments(np.full((1, 2), 3.5, np.float32))
    np.testing.assert_array_equal(moments.mean, [3.5, 3.5])
    for unbiased in (False, True):
        np.testing.assert_array_equal(variance(moments, unbiased=unbiased), [0, 0])


@pytest.mark.parametrize("axes", [-1, 0, (1,), (2, 0), (-3, -1), [1, 2], (0, 1, 2)])
def test_feature_axes(axes):
    """Statistics have the shape of the feature axes in ascending order."""
    x = np.random.default_rng(5).standard_normal((3, 4, 5)).astype(np.float32)
    given = (axes,) if isinstance(axes, int) else axes
    kept = sorted(axis % 3 for axis in given)
    reduced = tuple(axis for axis in range(3) if axis not in kept)
    moments = jax.jit(functools.partial(batch_moments, feature_axes=axes))(x)
    x64 = x.astype(np.float64)
    np.testing.assert_array_equal(
        moments.count, np.full(x64.mean(reduced).shape, x.size / x64.mean(reduced).size)
    )
    np.testing.assert_allclose(moments.mean, x64.mean(reduced), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(variance(moments), x64.var(reduced), rtol=1e-5)


@pytest.mark.parametrize("std", [1.0, 1e-18])
@pytest.mark.parametrize("cut", [0, 1, 300, 511, 512])
def test_merge_equals_the_union(cut, std):
    x = normal((512,), std=std, seed=6, ratios=(0.0, 3.0, 1e2))
    merged = merge_moments(batch_moments(x[:cut]), batch_moments(x[cut:]))
    assert_moments(merged, *reference(x))


@pytest.mark.parametrize("some", [normal((33,), std=1e15), np.zeros((0, 4), np.float32)])
def test_merge_with_nothing_keeps_the_bits(some):
    some, nothing = batch_moments(some), Moments(*(np.zeros(4, np.float32),) * 3)
    for merged in (merge_moments(some, nothing), merge_moments(nothing, some)):
        jax.tree.map(np.testing.assert_array_equal, merged, some)


@every_kind
def test_sync_equals_the_union_of_unequal_devices(kind):
    """Counts differ between devices; the third has none, and NaN in their place."""
    x = normal_on_devices((DEVICES, 64), seed=7, ratios=(0.0, 2.0, 1e2))
    where = np.random.default_rng(8).random(x.shape) < 0.6
    where[2] = False
    x = np.where(where, x, np.nan)
    count, mean, m2 = reference(x, where)

    def synced(x, where):
        return sync_moments(batch_moments(x, where=where), "batch")

    moments = spread(kind, synced)(x, where)
    for device in range(DEVICES):
        assert_moments(Moments(*(np.asarray(leaf)[device] for leaf in moments)), count, mean, m2)


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("vmap", [[0, 1], [2, 3]]),
        ("pmap", [[3, 0], [1, 2]]),
        ("pmap", [[0, 2, 3], [1]]),
        ("shard_map", [[3, 0], [1, 2]]),
    ],
)
def test_sync_within_groups(kind, groups):
    """Also groups of unequal sizes; NaN in one group stays there."""
    x = normal_on_devices((DEVICES, 16), seed=9, ratios=(0.0, 2.0))
    x[1, 0] = np.nan

    def synced(x):
        return sync_moments(batch_moments(x), "batch", axis_index_groups=groups)

    moments = spread(kind, synced)(x)
    for group in groups:
        for device in group:
            got = Moments(*(np.asarray(leaf)[device] for leaf in moments))
            if 1 in group:
                assert np.all(np.isnan(got.mean))
            else:
                assert_moments(got, *reference(x[group]))


@every_kind
@pytest.mark.parametrize("std", [1e-18, 1e15])
def test_sync_at_extreme_spreads(kind, std):
    x = normal((DEVICES, 64), std=std, seed=10, ratios=(0.0, 1.0, 10.0))
    moments = spread(kind, lambda x: sync_moments(batch_moments(x), "batch"))(x)
    assert_moments(Moments(*(np.asarray(leaf)[0] for leaf in moments)), *reference(x))


@every_kind
def test_gradient_through_sync(kind):
    """Every device holds the variance of all: summed over devices its gradient is D·2(x − μ)/N."""
    x = normal_on_devices((DEVICES, 8), seed=11, ratios=(0.0, 2.0))
    synced = spread(kind, lambda x: variance(sync_moments(batch_moments(x), "batch")))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(synced(x))))(x)
    count, mean, _ = reference(x)
    np.testing.assert_allclose(gradient, DEVICES * 2 * (x - mean) / count, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [(3, 7), (1, 1, 1), (10, 0, 5), (12, 8, 31)])
def test_float64_merges_to_the_last_digits(sizes):
    """Counts of float32 would leave seven: of merges, of groups, and over a mapped axis."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        parts = [rng.standard_normal((n, 2)) * 3 + 10 for n in sizes]
        union = np.concatenate(parts)
        merged = functools.reduce(merge_moments, map(batch_moments, parts))
        np.testing.assert_allclose(merged.mean, union.mean(0), rtol=2e-15)
        np.testing.assert_allclose(merged.m2, union.var(0) * len(union), rtol=4e-15)

        longest = max(sizes)
        padded = np.stack([np.pad(part, [(0, longest - len(part)), (0, 0)]) for part in parts])
        where = np.arange(longest)[None, :, None] < np.array(sizes)[:, None, None]
        synced = jax.vmap(lambda x, w: sync_moments(batch_moments(x, where=w), "i"), axis_name="i")(
            padded, where
        )
        np.testing.assert_allclose(synced.mean[0], union.mean(0), rtol=2e-15)
        np.testing.assert_allclose(synced.m2[0], union.var(0) * len(union), rtol=1e-14)

        flat, mask = padded.reshape(-1, 2), where.reshape(-1, 1)
        _, pooled = batch_norm(flat, where=mask, group_size=longest)
        np.testing.assert_allclose(pooled.mean, union.mean(0), rtol=2e-15)
        inside = sum(part.var(0) * len(part) for part in parts if len(part))
        np.testing.assert_allclose(pooled.m2, inside, rtol=1e-14, atol=1e-28)


def test_complex_numbers():
    """The mean is complex, m2 = Σ|x − mean|², at a large mean, masked, merged and synced alike."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((4, 30, 3)) + 2j * rng.standard_normal((4, 30, 3)) + 1e4 * (1 - 2j)
    x = x.astype(np.complex64)
    where = rng.random(x.shape) < 0.6
    flat, mask = x.reshape(-1, 3).astype(complex), where.reshape(-1, 3)
    mean = flat.mean(0, where=mask)
    m2 = np.sum(np.abs(flat - mean) ** 2, 0, where=mask)
    alone = batch_moments(x, where=where)
    parts = [batch_moments(part, where=w) for part, w in zip(x, where, strict=True)]
    merged = functools.reduce(merge_moments, parts)
    synced = jax.vmap(lambda x, w: sync_moments(batch_moments(x, where=w), "i"), axis_name="i")(
        x, where
    )
    for found in (alone, merged, jax.tree.map(lambda leaf: leaf[0], synced)):
        assert [leaf.dtype for leaf in found] == ["float32", "complex64", "float32"]
        np.testing.assert_array_equal(found.count, mask.sum(0))
        np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(found.m2, m2, rtol=1e-4)
