"""Running and population statistics against arithmetic by hand and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.normalization import (
    BatchStats,
    Moments,
    batch_moments,
    batch_norm,
    cumulative_momentum,
    population_stats,
    update_batch_stats,
)

pytestmark = pytest.mark.usefixtures("strict_arrays")


def stats_of(mean, var, dtype="float32"):
    return BatchStats(jnp.asarray(mean, dtype), jnp.asarray(var, dtype))


def moments_of(count, mean, m2, dtype="float32"):
    return Moments(jnp.asarray(count, "float32"), jnp.asarray(mean, dtype), jnp.asarray(m2, dtype))


def test_two_steps_by_hand():
    """From mean 0 and var 1, twice the batch of mean 3, m2 8 over 4 elements, momentum 0.9.

    mean: 0.9·0 + 0.1·3 = 0.3, then 0.9·0.3 + 0.1·3 = 0.57 = 0.19·3
    var:  m2/n = 2; 0.9·1 + 0.1·2 = 1.1, then 0.9·1.1 + 0.1·2 = 1.19 = 0.81·1 + 0.19·2
    """
    stats, batch = stats_of([0.0], [1.0]), moments_of([4.0], [3.0], [8.0])
    stats = update_batch_stats(stats, batch, momentum=0.9)
    np.testing.assert_allclose(stats, [[0.3], [1.1]], rtol=1e-6)
    stats = update_batch_stats(stats, batch, momentum=0.9)
    np.testing.assert_allclose(stats, [[0.57], [1.19]], rtol=1e-6)


def test_unbiased_and_the_default_momentum():
    """m2/(n − 1) = 8/3; 0.99·1 + 0.01·8/3 = 1.016667. One element has no variance: 1 stays."""
    batch = moments_of([4.0, 1.0], [3.0, 3.0], [8.0, 0.0])
    stats = update_batch_stats(stats_of([0, 0], [1, 1]), batch, unbiased=True)
    np.testing.assert_allclose(stats.mean, [0.03, 0.03], rtol=1e-6)
    np.testing.assert_allclose(stats.var, [0.99 + 0.01 * 8 / 3, 1.0], rtol=1e-6)


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 3.0), (1.0, 7.0)])
def test_ends_of_momentum(momentum, expected):
    stats = update_batch_stats(
        stats_of([7.0], [7.0]), moments_of([1.0], [3.0], [3.0]), momentum=momentum
    )
    np.testing.assert_array_equal(stats, [[expected], [expected]])


def test_traced_momentum():
    stats, batch = stats_of([0.0], [1.0]), moments_of([4.0], [3.0], [8.0])
    traced = jax.jit(lambda m: update_batch_stats(stats, batch, momentum=m))(0.9)
    np.testing.assert_allclose(traced, [[0.3], [1.1]], rtol=1e-6)


def test_cumulative_average_is_the_mean_of_all_batches():
    """Whatever the statistics start with; traced, as a scan over steps has it."""
    values = np.random.default_rng(0).standard_normal((50, 2, 4)).astype(np.float32) ** 2

    def step(stats, numbered):
        k, (mean, var) = numbered
        moments = Moments(jnp.full(4, 8.0), mean, 8 * var)
        return update_batch_stats(stats, moments, momentum=cumulative_momentum(k)), None

    start = BatchStats(jnp.full(4, 7.0), jnp.full(4, 9.0))
    stats, _ = jax.lax.scan(step, start, (jnp.arange(50), (values[:, 0], values[:, 1])))
    np.testing.assert_allclose(stats, values.mean(0, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("moments_dtype", ["float32", "float64"])
def test_dtype_and_shape_stay(dtype, moments_dtype):
    """Half precision alone does not: in it an average of 0.99 stands still."""
    with jax.enable_x64(True):
        stats = stats_of(np.zeros((2, 3)), np.ones((2, 3)), dtype)
        batch = moments_of(np.full((2, 3), 4), np.full((2, 3), 2), np.ones((2, 3)), moments_dtype)
        new = update_batch_stats(stats, batch, momentum=0.5)
        kept = dtype if dtype.startswith("float") and dtype != "float16" else "float32"
        assert [leaf.dtype for leaf in new] == [kept, kept]
        np.testing.assert_array_equal(np.asarray(new.mean, float), np.full((2, 3), 1.0))
        np.testing.assert_array_equal(np.asarray(new.var, float), np.full((2, 3), 0.625))


def test_features_without_elements_keep_their_bits():
    stats = stats_of([0.1, 0.1], [0.7, 0.7])
    x = np.full((5, 2), 2.0, np.float32)
    new = update_batch_stats(stats, batch_moments(x, where=np.array([False, True])))
    assert new.mean[0] == stats.mean[0] and new.var[0] == stats.var[0]
    assert new.mean[1] != stats.mean[1] and new.var[1] != stats.var[1]


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_gradient(stop_gradient):
    """∂new/∂old = m, ∂mean/∂batch = 1 − m, ∂var/∂m2 = (1 − m)/n; all 0 when cut."""
    ones, count = jnp.ones(2), jnp.full(2, 4.0)

    def total(stats, mean, m2):
        options = dict(momentum=0.75, stop_gradient=stop_gradient)
        return sum(map(jnp.sum, update_batch_stats(stats, Moments(count, mean, m2), **options)))

    found = jax.tree.leaves(jax.grad(total, (0, 1, 2))(BatchStats(ones, ones), ones, ones))
    expected = np.array([0.75, 0.75, 0.25, 0.25 / 4]) * (not stop_gradient)
    np.testing.assert_allclose(found, np.tile(expected[:, None], 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_does_not_stall(dtype):
    """A thousand steps from statistics that were cast, against an average in float64."""
    rng = np.random.default_rng(0)
    x = (0.3 + 1.2 * rng.standard_normal((1000, 16, 3))).astype(np.float32)

    def step(stats, x):
        return update_batch_stats(stats, batch_moments(x)), None

    first = update_batch_stats(stats_of(np.zeros(3), np.ones(3), dtype), batch_moments(x[0]))
    new, _ = jax.jit(lambda first: jax.lax.scan(step, first, x[1:]))(first)
    mean, var = np.zeros(3), np.ones(3)
    for batch in x.astype(np.float64):
        mean, var = 0.99 * mean + 0.01 * batch.mean(0), 0.99 * var + 0.01 * batch.var(0)
    np.testing.assert_allclose(new.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(new.var, var, rtol=1e-5)


def test_unbiased_needs_two_values():
    """A feature with one value has no unbiased variance: its mean moves, its variance stays."""
    stats = stats_of([0.5, 0.5, 0.5], [2.0, 2.0, 2.0])
    x = np.array([[1, 1, 1], [3, 3, 3]], np.float32)
    where = np.array([[True, True, False], [True, False, False]])
    new = update_batch_stats(stats, batch_moments(x, where=where), momentum=0.5, unbiased=True)
    np.testing.assert_array_equal(new.mean, [1.25, 0.75, 0.5])
    np.testing.assert_array_equal(new.var, [2.0, 2.0, 2.0])  # of 1 and 3 it is 2
    biased = update_batch_stats(stats, batch_moments(x, where=where), momentum=0.5)
    np.testing.assert_array_equal(biased.var, [1.5, 1.0, 2.0])


def test_moments_of_other_features():
    moments = batch_moments(np.ones((4, 5, 3), np.float32), feature_axes=(1, 2))
    with pytest.raises(
        ValueError, match=r"^moments has features of shape \(5, 3\): .*mean, \(3,\)$"
    ):
        update_batch_stats(stats_of(np.zeros(3), np.ones(3)), moments)


@pytest.mark.parametrize("momentum", [-0.01, 1.7, float("nan")])
def test_bad_momentum(momentum):
    with pytest.raises(ValueError, match=rf"momentum={momentum} .*\[0, 1\]"):
        update_batch_stats(stats_of([0], [1]), moments_of([1], [0], [0]), momentum=momentum)


def batches_of(*sizes):
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((n, 3)) * 2 + i + 50).astype(np.float32) for i, n in enumerate(sizes)
    ]


def layers(batch):
    """Two layers' moments, in a tree."""
    return {"a": {"moments": batch_moments(batch)}, "b": batch_norm(3 * batch)[1]}


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        *(("algorithm2", sizes) for sizes in ((8,), (8, 8, 8), (4, 16, 7))),
        *(("merged", sizes) for sizes in ((8,), (4, 16, 7), (1, 1, 30))),
    ],
)
def test_population_statistics(sizes, method):
    """Means over the batches of the mean and of m/(m − 1)·σ²; merged, those of the union."""
    batches = batches_of(*sizes)
    parts = batches if method == "algorithm2" else [np.concatenate(batches)]
    mean = np.mean([b.mean(0, dtype=float) for b in parts], 0)
    var = np.mean([b.var(0, ddof=1, dtype=float) for b in parts], 0)
    stats = population_stats(layers, iter(batches), method=method)
    assert isinstance(stats["b"], BatchStats) and isinstance(stats["a"]["moments"], BatchStats)
    np.testing.assert_allclose(stats["a"]["moments"].mean, mean, rtol=1e-6)
    np.testing.assert_allclose(stats["a"]["moments"].var, var, rtol=1e-5)
    np.testing.assert_allclose(stats["b"].mean, 3 * mean, rtol=1e-6)
    np.testing.assert_allclose(stats["b"].var, 9 * var, rtol=1e-5)


@pytest.mark.parametrize("method", ["algorithm2", "merged"])
def test_features_without_elements_carry_no_weight(method):
    """Features have 4, 2, 1 and 0 valid elements in some batches, in float64, against numpy."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 4, 4)) + 7
    valid = np.array([[4, 2, 1, 0], [4, 0, 0, 0], [4, 3, 1, 0]])
    where = np.arange(4)[None, :, None] < valid[:, None]
    values = [[b[w[:, j], j] for b, w in zip(x, where, strict=True)] for j in range(4)]
    if method == "merged":
        values = [[np.concatenate(v)] for v in values]
    mean = [np.mean([a.mean() for a in v if len(a)] or [-1]) for v in values]
    var = [np.mean([a.var(ddof=1) for a in v if len(a) > 1] or [9]) for v in values]
    with jax.enable_x64(True):
        initial = {"a": stats_of(np.full(4, -1), np.full(4, 9), "float64")}
        found = population_stats(
            lambda b: {"a": batch_moments(b[0], where=b[1])},
            list(zip(x, where, strict=True)),
            method=method,
            initial=initial,
        )["a"]
        np.testing.assert_allclose(found.mean, mean, rtol=1e-14)
        np.testing.assert_allclose(found.var, var, rtol=1e-13)


@pytest.mark.parametrize(
    ("method", "sizes", "message"),
    [
        ("algorithm2", (), "batches is empty.*at least one"),
        ("merged", (), "batches is empty.*at least one"),
        ("ema", (4,), "method='ema' is unknown: allowed are 'algorithm2' and"),
    ],
)
def test_bad_arguments_of_population_statistics(method, sizes, message):
    with pytest.raises(ValueError, match=message):
        population_stats(layers, batches_of(*sizes), method=method)
