import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from bn_research.normalization.batch_norm import batch_norm
from bn_research.normalization.normalize import normalize
from bn_research.probes.curvature import hessian_top_eigenvalues, hvp, lanczos

KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def symmetric(eigenvalues, seed=0):
    """A matrix with a known spectrum, and its eigenvectors as columns."""
    size = len(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return q @ np.diag(eigenvalues) @ q.T, q


def quadratic(matrix, params):
    flat = ravel_pytree(params)[0]
    return 0.5 * flat @ jnp.asarray(matrix, flat.dtype) @ flat


# --- a small network with BN; each kind of normalization is a function of the pre-activations ---

RNG = np.random.default_rng(1)
IMAGES, TARGETS = RNG.standard_normal((8, 3)), RNG.standard_normal((8, 2))


def parameters():
    rng = np.random.default_rng(2)
    return {
        "dense0": {"kernel": rng.standard_normal((3, 4))},
        "norm": {"bias": rng.standard_normal(4), "scale": 1 + 0.3 * rng.standard_normal(4)},
        "dense1": [rng.standard_normal((4, 2))],
    }


def by_batch(x, scale, bias, epsilon=1e-3):
    return batch_norm(x, scale, bias, epsilon=epsilon)[0]


def by_batch_spelled_out(x, scale, bias, epsilon=1e-3):
    """By JAX's own derivatives of mean and variance."""
    return scale * (x - x.mean(0)) / jnp.sqrt(x.var(0) + epsilon) + bias


def frozen(x, scale, bias, epsilon=1e-3):
    """Statistics of the batch at the parameters above, as numbers."""
    start = IMAGES @ parameters()["dense0"]["kernel"]
    return normalize(x, start.mean(0), start.var(0), scale, bias, epsilon=epsilon)


def loss(norm, params):
    x = IMAGES @ params["dense0"]["kernel"]
    h = jnp.tanh(norm(x, params["norm"]["scale"], params["norm"]["bias"]))
    return jnp.mean(jnp.square(h @ params["dense1"][0] - TARGETS))


def explicit_hessian(loss_fn, params):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda v: loss_fn(unravel(v))))(flat))


@functools.cache
def hessians():
    """With statistics differentiated through, and with frozen ones."""
    with jax.enable_x64(True):
        return tuple(
            explicit_hessian(functools.partial(loss, norm), parameters())
            for norm in (by_batch_spelled_out, frozen)
        )


# --- Hessian-vector products ---


@pytest.mark.parametrize(("norm", "which"), [(by_batch, 0), (frozen, 1)])
def test_hvp_is_that_of_what_the_loss_does(norm, which):
    params = parameters()
    flat, unravel = ravel_pytree(params)
    vector = np.random.default_rng(5).standard_normal(flat.size)
    found = jax.jit(lambda v: hvp(functools.partial(loss, norm), params, v))(unravel(vector))
    assert jax.tree.structure(found) == jax.tree.structure(params)
    product = ravel_pytree(found)[0]
    np.testing.assert_allclose(product, hessians()[which] @ vector, rtol=1e-9, atol=1e-11)
    assert np.linalg.norm(product - hessians()[1 - which] @ vector) > 0.1 * np.linalg.norm(product)


def test_hvp_by_finite_differences_of_the_loss_with_epsilon_0():
    """u·H·v from values of the loss alone."""
    loss_fn = functools.partial(loss, functools.partial(by_batch, epsilon=0.0))
    flat, unravel = ravel_pytree(parameters())
    u, v = np.random.default_rng(6).standard_normal((2, flat.size))
    value = jax.jit(lambda w: loss_fn(unravel(w)))
    h = 1e-4
    corners = [(a * b, value(flat + h * (a * u + b * v))) for a in (1, -1) for b in (1, -1)]
    expected = sum(sign * corner for sign, corner in corners) / (4 * h * h)
    found = u @ ravel_pytree(jax.jit(lambda p: hvp(loss_fn, p, unravel(v)))(unravel(flat)))[0]
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_hvp_of_numbers_and_numpy_arrays():
    found = hvp(lambda p: p["a"] ** 3 + jnp.sum(p["b"] ** 2), *[{"a": 2.0, "b": np.ones(2)}] * 2)
    assert found["a"] == 24 and np.all(found["b"] == 2)


# --- Lanczos ---


@functools.cache
def compiled_lanczos(iterations):
    def run(matrix):
        return lanczos(lambda v: matrix @ v, matrix[0], num_iterations=iterations, key=KEY)

    return jax.jit(run)


def full(t):
    off = np.diag(t.off_diagonal, 1)
    return np.diag(t.diagonal) + off + off.T


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 5e-6), (jnp.float64, 1e-13)])
@pytest.mark.parametrize("iterations", [1, 5, 30])
def test_lanczos_tridiagonalizes(dtype, tolerance, iterations):
    """A·Vᵀ = Vᵀ·T + β_m·v_{m+1}·e_mᵀ with orthonormal V, and at m = n the whole spectrum."""
    eigenvalues = np.concatenate([np.linspace(-1, 1, 28), [30, 100]])
    a, _ = symmetric(eigenvalues)
    matrix = jnp.asarray(a, dtype)
    t = compiled_lanczos(iterations)(matrix)
    assert {leaf.dtype for leaf in t} == {jnp.dtype(dtype)}
    basis = np.float64(t.basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(iterations), atol=10 * tolerance)
    rest = basis @ a - full(t) @ basis
    np.testing.assert_allclose(rest[:-1], 0, atol=100 * tolerance)
    assert np.linalg.norm(rest[-1]) == pytest.approx(float(t.remainder), abs=100 * tolerance)
    if iterations == 30:
        np.testing.assert_allclose(np.linalg.eigvalsh(full(t)), eigenvalues, atol=100 * tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "eigenvalues",
    [
        [1.0] * 9,
        [0.0] * 9,
        [5.0] + [0.0] * 8,
        [-2.0, -2, 3, 3, 3, 0, 0, 0, 0],
        [1e-25, 2e-25] + [5e-25] * 7,
    ],
    ids=["identity", "zero", "rank 1", "repeated", "tiny"],
)
@pytest.mark.parametrize("iterations", [6, 9])
def test_lanczos_goes_on_where_a_space_ends(dtype, eigenvalues, iterations):
    """Without it: 0/0, or copies of the first vector. At m = n every copy is found."""
    equal = len(set(eigenvalues)) == 1  # exactly a multiple of the identity, no rounding
    a = eigenvalues[0] * np.eye(9) if equal else symmetric(eigenvalues)[0]
    t = compiled_lanczos(iterations)(jnp.asarray(a, dtype))
    assert all(np.all(np.isfinite(leaf)) for leaf in t)
    unit = 20 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(t.basis @ t.basis.T, np.eye(iterations), atol=unit)
    assert not equal or np.all(t.off_diagonal == 0)
    found, size = np.linalg.eigvalsh(full(t)), max(map(abs, eigenvalues))
    if iterations == 9:
        np.testing.assert_allclose(found, sorted(eigenvalues), atol=unit * size, rtol=0)
    distance = np.abs(found[:, None] - np.array(eigenvalues)).min(1)
    assert np.all(distance <= unit * size + float(t.remainder))


def test_lanczos_in_jit_is_lanczos():
    a = jnp.asarray(symmetric(np.arange(12.0))[0])
    example = jax.ShapeDtypeStruct((12,), a.dtype)
    eager_t = lanczos(lambda v: a @ v, example, num_iterations=5, key=KEY)
    for eager, compiled in zip(eager_t, compiled_lanczos(5)(a), strict=True):
        np.testing.assert_allclose(eager, compiled, rtol=1e-11, atol=1e-13)


# --- eigenvalues ---


@pytest.mark.parametrize(("norm", "which"), [(by_batch, 0), (frozen, 1)])
def test_eigenvalues_of_a_network_with_bn(norm, which):
    """Against eigh of the explicit matrix; the two ways to treat statistics differ."""
    found = jax.jit(
        lambda params: hessian_top_eigenvalues(
            functools.partial(loss, norm), params, num_eigenvalues=4, num_iterations=50, key=KEY
        )
    )(parameters())
    expected = np.linalg.eigh(hessians()[which])[0]
    np.testing.assert_allclose(found.largest, expected[::-1][:4], rtol=1e-9)
    np.testing.assert_allclose(found.smallest, expected[:4], rtol=1e-9, atol=1e-10)
    assert np.all(found.largest_residual < 1e-10) and np.all(found.smallest_residual < 1e-10)
    assert abs(np.linalg.eigh(hessians()[1 - which])[0][-1] / expected[-1] - 1) > 0.01


def test_residual_bounds_the_error_before_it_converges():
    """On a known spectrum with a crowd at 0 and one outlier, by few iterations and by enough."""
    eigenvalues = np.concatenate([[-3.0], np.linspace(-1, 1, 57), [2.0, 10.0]])
    a, _ = symmetric(eigenvalues)
    params = {"b": jnp.ones((4, 5)), "a": {"c": jnp.ones(40)}}
    errors = []
    for iterations in (4, 24):
        found = hessian_top_eigenvalues(
            functools.partial(quadratic, a), params, num_eigenvalues=2,
            num_iterations=iterations, key=KEY,
        )  # fmt: skip
        for values, residuals in (
            (found.largest, found.largest_residual),
            (found.smallest, found.smallest_residual),
        ):
            nearest = np.abs(np.asarray(values)[:, None] - eigenvalues).min(1)
            assert np.all(nearest <= residuals + 1e-12)
        assert found.largest[0] <= 10 + 1e-12 and found.smallest[0] >= -3 - 1e-12
        assert found.largest[0] >= found.largest[1] and found.smallest[0] <= found.smallest[1]
        errors.append(float(found.largest_residual[0]))
    assert errors[0] > 1e-2 and errors[-1] < 1e-9
    assert found.largest[0] == pytest.approx(10, rel=1e-12)
    assert found.smallest[0] == pytest.approx(-3, rel=1e-9)


def test_curvature_of_scale_invariant_weights_falls_with_the_square_of_the_norm():
    """L(a·w) = L(w) for the weights in front of BN with epsilon 0."""
    params = parameters()
    norm = functools.partial(by_batch, epsilon=0.0)

    @jax.jit
    def top(kernel):
        def of_kernel(kernel):
            return loss(norm, params | {"dense0": {"kernel": kernel}})

        return hessian_top_eigenvalues(of_kernel, kernel, num_iterations=12, key=KEY)

    kernel = params["dense0"]["kernel"]
    here = top(kernel)
    for a in (0.1, 3.0, 1e3):
        there = top(a * kernel)
        np.testing.assert_allclose(a**2 * there.largest, here.largest, rtol=1e-9)
        np.testing.assert_allclose(a**2 * there.smallest, here.smallest, rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_eigenvalues_in_low_precision(dtype):
    """Of mixed dtypes too; Lanczos itself runs in float32."""
    a = np.diag([8.0, 4.0, 2.0, 1.0, -1.0])
    params = {"x": jnp.ones(2, dtype), "y": jnp.ones(3, jnp.float32)}
    found = hessian_top_eigenvalues(functools.partial(quadratic, a), params, key=KEY)
    assert found.largest.dtype == jnp.float32
    rel = 1e-5 if dtype == jnp.float32 else 2e-2
    assert found.largest[0] == pytest.approx(8, rel=rel)
    assert found.smallest[0] == pytest.approx(-1, rel=rel, abs=8 * rel)


def test_inside_a_loop_of_training_steps():
    """In lax.scan of gradient descent: λ at each step, as alone at the same parameters."""
    loss_fn = functools.partial(loss, by_batch)

    def curvature(params):
        return hessian_top_eigenvalues(loss_fn, params, num_iterations=20, key=KEY).largest[0]

    def step(params, _):
        new = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss_fn)(params))
        return new, (curvature(params), new)

    start = jax.tree.map(jnp.asarray, parameters())
    _, (values, after) = jax.jit(lambda p: jax.lax.scan(step, p, length=2))(start)
    assert values[0] == pytest.approx(float(np.linalg.eigvalsh(hessians()[0])[-1]), rel=1e-7)
    first = jax.tree.map(lambda leaf: leaf[0], after)
    assert values[1] == pytest.approx(float(jax.jit(curvature)(first)), rel=1e-9)
    assert values[1] != pytest.approx(float(values[0]), rel=1e-3)


def test_a_loss_that_is_not_finite_gives_nan():
    found = hessian_top_eigenvalues(lambda p: jnp.sum(p**2) * jnp.nan, jnp.ones(4), key=KEY)
    assert np.isnan(found.largest[0]) and np.isnan(found.largest_residual[0])


# --- bad arguments ---


def square(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("loss_fn", "params", "options", "message"),
    [
        (square, {}, {}, "params has no leaves"),
        (square, {"a": np.ones(0)}, {}, "0 parameters"),
        (square, {"a": np.arange(3)}, {}, r"params\['a'\] has dtype int.*floating-point"),
        (lambda p: p**2, np.ones(3), {}, r"array of shape \(3,\): it must return one scalar"),
        (lambda p: (p[0], p[1]), np.ones(3), {}, "2 arrays"),
        (lambda p: jnp.int32(p[0]), np.ones(3), {}, "dtype int32: the loss"),
        (square, np.ones(9), dict(num_eigenvalues=5, num_iterations=4), "=5.*at most 4, num_iter"),
        (square, np.ones(3), dict(num_eigenvalues=4), "=4.*at most 3, the number of parameters"),
        (square, np.ones(3), dict(num_eigenvalues=0), "num_eigenvalues=0 .*positive"),
        (square, np.ones(3), dict(num_iterations=0), "num_iterations=0 .*positive"),
        (square, np.ones(3), dict(num_iterations=2.5), "num_iterations=2.5"),
        (square, np.ones(3), dict(num_iterations=True), "num_iterations=True"),
    ],
)
def test_bad_arguments_of_eigenvalues(loss_fn, params, options, message):
    with pytest.raises(ValueError, match=message) as error:
        hessian_top_eigenvalues(loss_fn, params, key=KEY, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ({"b": np.ones(3)}, "vector has structure.*allowed is that of params"),
        ({"a": np.ones(2)}, r"vector\['a'\] is float64\(2,\): allowed is float64\(3,\)"),
        ({"a": np.ones(3, np.float32)}, r"is float32\(3,\): allowed is float64"),
    ],
)
def test_a_vector_that_is_not_like_params(vector, message):
    with pytest.raises(ValueError, match=message):
        hvp(square, {"a": np.ones(3)}, vector)


@pytest.mark.parametrize(
    ("example", "iterations", "message"),
    [
        (np.ones((2, 2)), 1, "example is float64"),
        (np.arange(3), 1, "example is int"),
        (np.ones(3, jnp.bfloat16), 1, "example is bfloat16"),
        (np.ones(3), 4, "num_iterations=4 .*at most 3, the length"),
        (np.ones(3), 0, "num_iterations=0"),
    ],
)
def test_bad_arguments_of_lanczos(example, iterations, message):
    with pytest.raises(ValueError, match=message):
        lanczos(lambda v: v, example, num_iterations=iterations, key=KEY)
