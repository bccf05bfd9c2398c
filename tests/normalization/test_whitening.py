"""Whitening, its statistics and its gradient against closed forms in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from devices import collectives, spread
from jax.sharding import PartitionSpec
from jax.test_util import check_grads
from normalization.closed_forms import (
    RATIOS,
    close,
    close_with_gradients,
    compiled,
    copies,
    masked_give_bias,
    weights,
    with_gradients,
)

from bn_research.normalization import batch_norm
from bn_research.normalization.whitening import (
    CovarianceMoments,
    apply_whitening,
    batch_covariance,
    covariance,
    inverse_sqrt,
    merge_covariance,
    whiten,
)

pytestmark = pytest.mark.usefixtures("strict_arrays")

DEVICES = 4
MIXING = np.array([[1.0, 0.4, 0, 0.2], [0, 1, -0.6, 0], [0, 0, 0.8, 0.5], [0, 0, 0, 1.2]])


def normal(shape, *, std=1.0, seed=0):
    """Correlated features on the last axis, some with large means."""
    noise = np.random.default_rng(seed).standard_normal((*shape, len(RATIOS)))
    return ((noise @ MIXING + np.array(RATIOS)) * std).astype(np.float32)


def positive_definite(size, condition, seed=0):
    """Eigenvalues spread evenly on a logarithmic scale, in a random basis."""
    basis = scipy.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return (basis * np.logspace(0, -np.log10(condition), size)) @ basis.T


def reference_covariance(x):
    x = np.asarray(x, np.float64)
    deviations = x - x.mean(0)
    return deviations.T @ deviations / len(x)


def assert_covariance(moments, x, *, rtol=1e-5):
    """Mean and covariance of the rows of x, each entry relative to the deviations it is of."""
    x = np.asarray(x, np.float64)
    expected, std = reference_covariance(x), x.std(0)
    assert moments.count == len(x) and moments.count.dtype == jnp.float32
    error = np.abs(np.asarray(moments.mean, np.float64) - x.mean(0))
    np.testing.assert_array_less(error, 1e-6 * np.abs(x.mean(0)) + 1e-5 * std + 1e-45)
    error = np.abs(np.asarray(covariance(moments), np.float64) - expected)
    np.testing.assert_array_less(error, rtol * np.outer(std, std) + 1e-45)


def inverse_root(matrix, epsilon=0.0):
    """The root, eigenvectors, and divided differences of λ^(−1/2), with 0^(−1/2) = 0."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.where(values > 1e-13 * values.max(), values, 0) + epsilon
    root = np.sqrt(values)
    inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    a, b = inverse[:, None], inverse[None, :]
    differences = np.where(
        a * b > 0,
        -a * b / np.maximum(root[:, None] + root[None, :], 1e-300),
        np.maximum(a, b) ** 3,
    )
    return (vectors * inverse) @ vectors.T, vectors, differences


def closed_form(x, scale, bias, g, epsilon, where=None):
    """Values and gradients of Σ g·y in x, scale and bias; x of shape (vectors, features)."""
    x, scale, bias, g = (np.asarray(v, np.float64) for v in (x, scale, bias, g))
    where = np.ones(len(x), bool) if where is None else where
    y, dx = np.broadcast_to(bias, x.shape).copy(), np.zeros(x.shape)
    z = x[where] - x[where].mean(0)
    root, vectors, differences = inverse_root(z.T @ z / len(z), epsilon)
    dz = g[where] * scale
    change = z.T @ dz
    change = vectors @ (differences * (vectors.T @ (change + change.T) @ vectors)) @ vectors.T
    dz = dz @ root + z @ change / len(z)
    y[where] += scale * (z @ root)
    dx[where] = dz - dz.mean(0)
    return y, dx, np.sum(g[where] * (z @ root), 0), g.sum(0)


def newton_schulz(matrix, iterations):
    """The recursion as the paper has it."""
    p, normalized = np.eye(len(matrix)), matrix / np.trace(matrix)
    for _ in range(iterations):
        p = (3 * p - p @ p @ p @ normalized) / 2
    return p / np.sqrt(np.trace(matrix))


covariance_of = jax.jit(batch_covariance)
root_of = jax.jit(functools.partial(inverse_sqrt, epsilon=1e-5))
masked_covariance_of = jax.jit(lambda x, where: batch_covariance(x, where=where))


@pytest.mark.parametrize("std", [1.0, 1e-18, 1e15])
def test_covariance_at_large_means(std):
    """Within 1e-5 of float64, in units of the two deviations."""
    x = normal((4096,), std=std)
    assert_covariance(covariance_of(x), x)


def test_covariance_of_masked_vectors_and_its_gradient():
    """NaN in masked rows reaches neither; the gradient of ⟨c, Σ⟩ is (c + cᵀ)(x − μ)/n."""
    x, c = normal((64, 8), seed=1), weights((4, 4), 2)
    where = np.random.default_rng(3).random((64, 8, 1)) < 0.6
    dirty, valid = np.where(where, x, np.float32(np.nan)), x[where[..., 0]].astype(np.float64)
    assert_covariance(masked_covariance_of(dirty, where), valid)

    def loss(x):
        return jnp.sum(c * covariance(batch_covariance(x, where=where)))

    gradient = np.asarray(jax.jit(jax.grad(loss))(dirty))
    assert np.all(gradient[~where[..., 0]] == 0)
    close(gradient[where[..., 0]], (valid - valid.mean(0)) @ (c + c.T) / len(valid), 1e-4)


@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 4, 5)])
def test_feature_axis(shape):
    axis = shape.index(4)
    x = weights(shape, 4)
    where = np.random.default_rng(5).random(tuple(n for n in shape if n != 4)) < 0.7
    rows = np.moveaxis(x, axis, -1)[where]
    scale, bias = weights(4, 6), weights(4, 7)
    options = dict(feature_axis=axis - 3, where=np.expand_dims(where, axis))
    y, moments = jax.jit(functools.partial(whiten, **options))(x, scale, bias)
    assert_covariance(moments, rows)
    expected = closed_form(rows, scale, bias, rows, 1e-5)[0]
    assert y.shape == shape
    close(np.moveaxis(np.asarray(y), axis, -1)[where], expected, 1e-5)
    matrix = root_of(covariance(moments))
    applied = apply_whitening(x, moments.mean, matrix, scale, bias, feature_axis=axis)
    close(np.moveaxis(np.asarray(applied), axis, -1)[where], expected, 1e-5)


def test_a_mask_may_leave_out_leading_axes():
    x, where = weights((4, 3, 5), 8), np.array([[True], [False], [True]])
    assert_covariance(masked_covariance_of(x, where), x[:, [0, 2]].reshape(-1, 5))
    where = where & (np.arange(5) != 1)
    first = jax.jit(lambda x, where: batch_covariance(x, feature_axis=0, where=where))
    assert_covariance(first(x, where), np.moveaxis(x, 0, -1)[where])


def test_unbiased_covariance():
    moments = covariance_of(weights((7, 3), 9))
    for unbiased in (False, True):
        expected = np.cov(weights((7, 3), 9).T, bias=not unbiased)
        got = covariance(moments, unbiased=unbiased)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 300])
def test_merge_equals_the_union(cut):
    x = normal((512,), seed=10)
    x[:300] += 2
    merge = jax.jit(lambda a, b: merge_covariance(batch_covariance(a), batch_covariance(b)))
    # Means of 1e4 deviations are rounded to 1e-3 of one before they are merged.
    assert_covariance(merge(x[:cut], x[cut:]), x, rtol=2e-3)
    x = x - np.array(RATIOS, np.float32)
    assert_covariance(merge(x[:cut], x[cut:]), x)


def test_merge_with_nothing_keeps_the_bits():
    some, nothing = covariance_of(normal((33,))), covariance_of(np.zeros((0, 4), np.float32))
    for leaf in nothing:
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    for merged in (merge_covariance(some, nothing), merge_covariance(nothing, some)):
        jax.tree.map(np.testing.assert_array_equal, merged, some)


def test_inverse_sqrt_in_float64():
    with jax.enable_x64(True):
        a = positive_definite(6, 1e3)
        np.testing.assert_allclose(
            inverse_sqrt(a), scipy.linalg.fractional_matrix_power(a, -0.5), rtol=1e-11, atol=1e-11
        )
        shifted = np.linalg.inv(scipy.linalg.sqrtm(a + 0.1 * np.eye(6)))
        np.testing.assert_allclose(inverse_sqrt(a, epsilon=0.1), shifted, rtol=1e-12, atol=1e-12)
        skew = np.triu(np.ones((6, 6)), 1)
        np.testing.assert_allclose(inverse_sqrt(a + skew - skew.T), inverse_sqrt(a), rtol=1e-12)


def test_newton_schulz_converges_to_zca():
    """And stays there; on the way it is the recursion of the paper."""
    with jax.enable_x64(True):
        a = positive_definite(6, 10)
        expected = scipy.linalg.fractional_matrix_power(a, -0.5)

        steps = (1, 3, 5, 7, 30)
        after = functools.partial(inverse_sqrt, method="newton_schulz")
        roots = jax.jit(lambda a: [after(a, iterations=n) for n in steps])(a)
        errors = [np.abs(root - expected).max() for root in roots]
        assert np.all(np.diff(errors) < 0) and errors[-1] < 1e-10, errors
        for n, root in zip(steps[:3], roots[:3], strict=True):  # plain, it is still accurate there
            np.testing.assert_allclose(root, newton_schulz(a, n), rtol=1e-12, atol=1e-12)


def test_newton_schulz_is_stable_where_the_plain_recursion_is_not():
    with jax.enable_x64(True):
        a = positive_definite(16, 1e4)
        got = inverse_sqrt(a, method="newton_schulz", iterations=60)
        close(got, scipy.linalg.fractional_matrix_power(a, -0.5), 1e-10)
        assert np.abs(newton_schulz(a, 16) - got).max() > 1e3


def differences(f, h=5e-3):
    """First and second derivative at 0 of a function of one number, by five points."""
    far_below, below, here, above, far_above = (f(k * h) for k in (-2, -1, 0, 1, 2))
    first = (8 * (above - below) - (far_above - far_below)) / (12 * h)
    second = (16 * (above + below) - (far_above + far_below) - 30 * here) / (12 * h**2)
    return first, second


def derivatives(f):
    """(x, v, g) -> derivatives along v of Σ g·f(x): forwards, backwards, and the second."""

    @jax.jit
    def compiled(x, v, g):
        def loss(x):
            return jnp.sum(g * f(x))

        gradient, product = jax.jvp(jax.grad(loss), (x,), (v,))
        return jax.jvp(loss, (x,), (v,))[1], jnp.sum(gradient * v), jnp.sum(product * v)

    def run(x, v, g):
        with jax.enable_x64(True):
            return np.array(compiled(x, v, g))

    return run


@pytest.mark.parametrize("method", ["zca", "newton_schulz"])
def test_derivatives_of_inverse_sqrt(method):
    """Also where eigenvalues are equal, one by one or all."""

    def reference(a):
        a = (a + a.T) / 2
        return inverse_root(a)[0] if method == "zca" else newton_schulz(a, 2)

    run = derivatives(functools.partial(inverse_sqrt, method=method, iterations=2))
    v, g = np.random.default_rng(11).standard_normal((2, 3, 3))
    for a in (np.eye(3), np.diag([2.0, 1, 2]), positive_definite(3, 5)):
        forward, backward, second = run(a, v / 20, g)
        expected = differences(lambda t, a=a: np.sum(g * reference(a + t * v / 20)))
        np.testing.assert_allclose([forward, backward], expected[0], rtol=1e-8)
        np.testing.assert_allclose(second, expected[1], rtol=1e-6)


def test_derivatives_at_the_identity():
    """Forwards over forwards."""
    with jax.enable_x64(True):
        f = jax.jit(lambda a: inverse_sqrt(a, epsilon=0.1))
        check_grads(f, (np.eye(2),), order=2, modes=("fwd",), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("shape", "epsilon"), [((7, 3), 0.0), ((3, 5), 0.0), ((3, 5), 1e-2)])
def test_derivatives_of_whiten(shape, epsilon):
    """To second order; also for fewer vectors than features, whose covariance is singular."""
    rng = np.random.default_rng(12)
    x, v, g = rng.standard_normal((3, *shape))
    one, zero = np.ones(shape[1]), np.zeros(shape[1])
    run = derivatives(lambda x: whiten(x, epsilon=epsilon)[0])
    forward, backward, second = run(x, v / 10, g)
    gradient = np.sum(closed_form(x, one, zero, g, epsilon)[1] * v / 10)
    np.testing.assert_allclose([forward, backward], gradient, rtol=1e-10)
    expected = differences(
        lambda t: np.sum(g * closed_form(x + t * v / 10, one, zero, g, epsilon)[0])
    )
    np.testing.assert_allclose(forward, expected[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(second, expected[1], rtol=1e-5, atol=1e-6)


def test_gradient_of_whiten_at_identity_covariance():
    """Backwards over backwards, with a masked vector."""
    with jax.enable_x64(True):
        x = np.sqrt(2) * np.array([[1.0, 0], [-1, 0], [7, 7], [0, 1], [0, -1]])
        where = np.array([[1], [1], [0], [1], [1]], bool)
        np.testing.assert_allclose(covariance(masked_covariance_of(x, where)), np.eye(2))
        f = jax.jit(lambda x: whiten(x, where=where)[0])
        check_grads(f, (x,), order=2, modes=("rev",), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("std", "epsilon"), [(1.0, 1e-5), (1.0, 0.0), (1e-18, 0.0), (1e-9, 0.0), (1e15, 0.0)]
)
def test_values_and_gradients_at_large_means(std, epsilon):
    x = normal((2048,), std=std)
    scale, bias, g = weights(4, 14), weights(4, 15), weights(x.shape, 16)
    got = compiled(whiten, epsilon=epsilon)(x, scale, bias, g)
    close_with_gradients(got, closed_form(x, scale, bias, g, epsilon), close)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_covariance_of_the_result(epsilon):
    """It is Σ(Σ + εI)⁻¹, and the result is uncorrelated without ε."""
    with jax.enable_x64(True):
        x = np.random.default_rng(17).standard_normal((50, 4)) @ MIXING + np.array(RATIOS)
        y, moments = jax.jit(whiten)(x, epsilon=epsilon)
        sigma = reference_covariance(x)
        np.testing.assert_allclose(covariance(moments), sigma, rtol=1e-10, atol=1e-12)
        expected = sigma @ np.linalg.inv(sigma + epsilon * np.eye(4))
        np.testing.assert_allclose(reference_covariance(y), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(np.mean(y, 0), np.zeros(4), atol=1e-12)


@pytest.mark.parametrize("method", ["zca", "newton_schulz"])
def test_one_feature_is_batch_norm(method):
    x, g = normal((64,), seed=18)[:, 3:], weights((64, 1), 19)
    scale, bias = np.array([-1.5], np.float32), np.array([0.3], np.float32)
    where = np.random.default_rng(20).random((64, 1)) < 0.8
    runs = compiled(whiten, method=method), compiled(batch_norm)
    for a, b in zip(*(run(x, scale, bias, g, where) for run in runs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_newton_schulz_in_training():
    """Values of the recursion as it is written, and of ZCA after more of it."""
    x, one, zero = weights((256, 4), 21) @ MIXING.astype(np.float32), np.ones(4), np.zeros(4)
    z = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    short = jax.jit(functools.partial(whiten, method="newton_schulz", iterations=3))(x)[0]
    close(short, z @ newton_schulz(reference_covariance(x) + 1e-5 * np.eye(4), 3), 1e-5)
    g = weights(x.shape, 40)
    long = compiled(whiten, method="newton_schulz", iterations=20)
    y, dx, _, _ = long(x, one, zero, g)
    expected = closed_form(x, one, zero, g, 1e-5)
    close(y, expected[0], 1e-5)
    close(dx, expected[1], 1e-4)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_masked_vectors(garbage):
    """Take no part, come out as bias, get no gradient."""
    x = normal((1024,), seed=22)
    where = np.random.default_rng(23).random(1024) < 0.4
    scale, bias, g = weights(4, 24), weights(4, 25), weights(x.shape, 26)
    dirty = np.where(where[:, None], x, np.float32(garbage))
    got = compiled(whiten)(dirty, scale, bias, g, where[:, None])
    masked_give_bias(got, bias, where[:, None])
    close_with_gradients(got, closed_form(x, scale, bias, g, 1e-5, where), close)


@pytest.mark.parametrize("method", ["zca", "newton_schulz"])
def test_one_vector_or_none_gives_bias(method):
    x, scale, bias = normal((1,)), weights(4, 27), weights(4, 28)

    @jax.jit
    def run(where, epsilon):
        return with_gradients(whiten, method=method, epsilon=epsilon)(x, scale, bias, x, where)

    for where in (np.ones((1, 1), bool), np.zeros((1, 1), bool)):
        for epsilon in (0.0, 1e-5):
            y, dx, dscale, _ = run(where, epsilon)
            np.testing.assert_array_equal(y, bias[None])
            np.testing.assert_array_equal(dx, np.zeros((1, 4)))
            np.testing.assert_array_equal(dscale, np.zeros(4))


def test_dependent_features_without_epsilon():
    """In float32 their covariance has small eigenvalues in place of zero: they are left out."""
    x = weights((4096, 4), 29)
    x[:, 2], x[:, 3] = x[:, 0] + x[:, 1], 0.1
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    y, dx, _, _ = compiled(whiten, epsilon=0.0)(x, one, zero, weights(x.shape, 30))
    expected = closed_form(x, one, zero, x, 0.0)[0]
    direction = np.array([1, 1, -1, 0]) / np.sqrt(3)
    assert np.abs(expected @ direction).max() < 1e-6
    close(y, expected, 1e-4)
    np.testing.assert_array_equal(y[:, 3], np.zeros(4096))
    assert np.all(np.isfinite(dx)) and np.abs(dx).max() < 10


def test_epsilon_is_not_lost_beside_a_large_eigenvalue():
    """It is exact where there is no other, though it is 1e-9 of the largest in float32."""
    x = 30 * weights((8, 32), 31)
    matrix = np.asarray(root_of(covariance(covariance_of(x))), np.float64)
    close(matrix, inverse_root(reference_covariance(x), 1e-5)[0], 1e-5)
    np.testing.assert_allclose(np.sort(np.linalg.eigvalsh(matrix))[-25:], 1e5**0.5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vmap", "pmap", "shard_map"])
def test_synced_with_masks(kind):
    """Devices with unequal counts, one with none, share the statistics of their union."""
    x = normal((DEVICES, 32), seed=32) + np.arange(DEVICES, dtype=np.float32)[:, None, None]
    where = np.random.default_rng(33).random((DEVICES, 32)) < 0.6
    where[3] = False
    scale, bias, g = weights(4, 34), weights(4, 35), weights(x.shape, 36)
    dirty = np.where(where[..., None], x, np.float32(np.nan))

    def run(x, scale, bias, g, where):
        def loss(x):
            y, moments = whiten(x, scale, bias, where=where, axis_name="batch")
            return jnp.sum(g * y), (y, moments)

        (_, (y, moments)), dx = jax.value_and_grad(loss, has_aux=True)(x)
        return y, dx, moments

    args = dirty, *copies((scale, bias), DEVICES), g, where[..., None]
    mapped = spread(kind, run).lower(*args).compile()
    y, dx, moments = mapped(*args)
    flat = [a.reshape(-1, 4) for a in (x, g)]
    expected = closed_form(flat[0], scale, bias, flat[1], 1e-5, where.reshape(-1))
    close(np.reshape(y, (-1, 4)), expected[0], 2e-5)
    close(np.reshape(dx, (-1, 4)), expected[1], 2e-4)
    for device in range(DEVICES):
        assert_covariance(CovarianceMoments(*(leaf[device] for leaf in moments)), x[where])
    if kind != "vmap":
        found = collectives(mapped)
        assert 1 <= len(found) <= 4 and set(found) <= {"all-reduce"}, found


def test_apply_whitening():
    """By any matrix, with means of 1e4 standard deviations."""
    x, matrix = normal((16,)), weights((4, 4), 37)
    mean, scale, bias = np.array(RATIOS, np.float32), weights(4, 38), weights(4, 39)
    y = apply_whitening(x, mean, matrix, scale, bias)
    close(y, scale * ((x.astype(np.float64) - mean) @ matrix.T.astype(np.float64)) + bias, 1e-5)


def test_traced_epsilon_and_moments_carry_no_gradient():
    x = weights((16, 3))

    def loss(x, epsilon):
        y, moments = whiten(x, epsilon=epsilon)
        return jnp.sum(x * y), moments

    step = jax.jit(jax.grad(lambda x, e: loss(x, e)[0], (1,)))
    np.testing.assert_array_equal(step(x, 0.3)[0], 0)
    np.testing.assert_allclose(
        jax.jit(loss)(x, 0.3)[0], np.sum(x * closed_form(x, 1.0, 0.0, x, 0.3)[0]), rtol=1e-5
    )
    gradient = jax.jit(jax.grad(lambda x: sum(map(jnp.sum, loss(x, 0.3)[1]))))(x)
    np.testing.assert_array_equal(gradient, np.zeros(x.shape))


@pytest.mark.parametrize("method", ["zca", "newton_schulz"])
@pytest.mark.parametrize("spec", [("data",), ("data", None, "model"), (None, "data", "model")])
def test_over_explicit_axes_of_a_mesh(spec, method):
    """Values and gradients are those without a mesh, and y lies as x does."""
    mesh = jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    x, g = (np.random.default_rng(i).standard_normal((16, 4, 6)).astype("f4") for i in (1, 2))

    def run(x, g):
        def loss(x):
            y, moments = whiten(x, method=method)
            return jnp.sum(g * y), (y, moments.m2, batch_covariance(x).m2)

        return jax.value_and_grad(loss, has_aux=True)(x)

    expected = jax.jit(run)(x, g)
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(*spec))
        found = jax.jit(run)(*jax.device_put((x, g), sharding))
        assert (
            jax.typeof(found[0][1][0]).sharding.spec
            == jax.typeof(jax.device_put(x, sharding)).sharding.spec
        )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
