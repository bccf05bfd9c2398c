import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.normalization.batch_norm import batch_norm
from bn_research.probes.step_direction import FACTORS, loss_along_step


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def symmetric(eigenvalues, seed=0):
    size = len(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return q @ np.diag(eigenvalues) @ q.T, q


# --- a quadratic, on which everything has a closed form ---

EIGENVALUES = np.array([-2.0, 0.5, 1.0, 3.0, 7.0])
H, Q = symmetric(EIGENVALUES)
POINT = np.array([0.3, -1.0, 2.0, 0.5, -0.7])


def tree(vector):
    return {"w": vector[:4].reshape(2, 2), "b": [vector[4:]]}


def flat(params):
    return jnp.concatenate([params["w"].ravel(), params["b"][0]])


def quadratic(params):
    v = flat(params)
    return 0.5 * v @ jnp.asarray(H, v.dtype) @ v


@pytest.mark.parametrize("compiled", [False, True])
def test_a_quadratic(compiled):
    """Gradient distance |f|·‖H·d‖, smoothness ‖H·d‖/‖d‖; the loss is a parabola in f."""
    g = H @ POINT
    d = -0.1 * g
    factors = (-1.0, 0.5, 1.0, 4.0)
    run = functools.partial(loss_along_step, quadratic, factors=factors)
    run = jax.jit(run) if compiled else run
    found = run(tree(POINT), tree(d))
    f = np.array(factors)
    expected = 0.5 * POINT @ g + f * (g @ d) + f**2 * 0.5 * (d @ H @ d)
    moved = np.linalg.norm(H @ d)
    ahead = g + f[:, None] * (H @ d)
    cosine = ahead @ g / np.linalg.norm(ahead, axis=1) / np.linalg.norm(g)
    for name, value in dict(
        loss=expected,
        gradient_distance=np.abs(f) * moved,
        relative_gradient_distance=np.abs(f) * moved / np.linalg.norm(g),
        cosine=cosine,
        distance=np.abs(f) * np.linalg.norm(d),
        smoothness=moved / np.linalg.norm(d),
        start_loss=0.5 * POINT @ g,
        start_gradient_norm=np.linalg.norm(g),
        param_norm=np.linalg.norm(POINT),
    ).items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-12, err_msg=name)
    assert np.all(found.cosine[2:] < 0.999)  # the curvature turns the gradient


def test_smoothness_along_an_eigenvector_is_the_size_of_its_eigenvalue():
    for i, value in enumerate(EIGENVALUES):
        found = loss_along_step(quadratic, tree(POINT), tree(1e-3 * Q[:, i]), factors=(1.0,))
        assert found.smoothness == pytest.approx(abs(value), rel=1e-9)


def test_smoothness_is_the_largest_over_factors():
    """Of Σx⁴/4 in one dimension: ((x + f·d)³ − x³)/(f·d), which grows with f·d > 0."""
    found = loss_along_step(lambda x: x**4 / 4, jnp.array(1.0), jnp.array(0.25))
    ratio = [((1 + f * 0.25) ** 3 - 1) / (f * 0.25) for f in FACTORS]
    np.testing.assert_allclose(found.gradient_distance / found.distance, ratio, rtol=1e-12)
    assert found.smoothness == pytest.approx(ratio[-1], rel=1e-12)
    back = loss_along_step(lambda x: x**4 / 4, jnp.array(1.0), jnp.array(-0.1))
    assert back.smoothness == pytest.approx((1 - 0.95**3) / 0.05, rel=1e-12)


def test_the_published_range():
    assert FACTORS[0] == 0.5 and FACTORS[-1] == 4 and 1.0 in FACTORS


# --- a network with BN ---

RNG = np.random.default_rng(1)
IMAGES, TARGETS = RNG.standard_normal((8, 3)), RNG.standard_normal((8, 4))
KERNEL = RNG.standard_normal((3, 4))


def network(kernel):
    h = batch_norm(IMAGES @ kernel, epsilon=0.0)[0]
    return jnp.mean(jnp.square(jnp.tanh(h) - TARGETS))


def normalized_by_numpy(kernel):
    x = IMAGES @ kernel
    h = (x - x.mean(0)) / x.std(0)
    return np.mean(np.square(np.tanh(h) - TARGETS))


def gradient_by_differences(kernel, h=1e-5):
    """Central differences of the loss in numpy."""
    gradient = np.zeros_like(kernel)
    for index in np.ndindex(kernel.shape):
        e = np.zeros_like(kernel)
        e[index] = h
        values = normalized_by_numpy(kernel + e), normalized_by_numpy(kernel - e)
        gradient[index] = (values[0] - values[1]) / (2 * h)
    return gradient


def test_a_network_with_bn_by_finite_differences():
    """Loss and gradients of the batch whose statistics move with the weights."""
    start = gradient_by_differences(KERNEL)
    d = -0.5 * start
    found = loss_along_step(network, KERNEL, d, factors=(0.5, 4.0))
    for i, f in enumerate((0.5, 4.0)):
        ahead = gradient_by_differences(KERNEL + f * d)
        distance = np.linalg.norm(ahead - start)
        cosine = np.sum(ahead * start) / np.linalg.norm(ahead) / np.linalg.norm(start)
        assert found.loss[i] == pytest.approx(normalized_by_numpy(KERNEL + f * d), rel=1e-12)
        assert found.gradient_distance[i] == pytest.approx(distance, rel=1e-7)
        assert found.cosine[i] == pytest.approx(cosine, abs=1e-8)


def test_smoothness_of_scale_invariant_weights_falls_with_the_square_of_the_norm():
    """At a·w with the step a·d, which turns w by the same angle."""
    run = jax.jit(functools.partial(loss_along_step, network))
    d = -0.5 * gradient_by_differences(KERNEL)
    here = run(KERNEL, d)
    for a in (0.01, 10.0):
        there = run(a * KERNEL, a * d)
        free = there.smoothness * there.param_norm**2
        assert free == pytest.approx(float(here.smoothness * here.param_norm**2), rel=1e-9)
        assert there.smoothness == pytest.approx(float(here.smoothness) / a**2, rel=1e-9)
        for name in ("loss", "relative_gradient_distance", "cosine"):
            np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=1e-9)


def test_inside_a_loop_of_training_steps():
    """In lax.scan, where the step that was taken is factor 1."""

    def step(kernel, _):
        d = -0.5 * jax.grad(network)(kernel)
        return kernel + d, loss_along_step(network, kernel, d, factors=(1.0, 2.0))

    _, found = jax.jit(lambda k: jax.lax.scan(step, k, length=3))(jnp.asarray(KERNEL))
    np.testing.assert_allclose(found.loss[:-1, 0], found.start_loss[1:], rtol=1e-12)
    assert found.smoothness.shape == (3,) and np.all(np.diff(found.start_loss) < 0)


# --- numbers at the edge ---


def test_float32_and_bfloat16():
    wide = loss_along_step(quadratic, tree(POINT), tree(-0.1 * H @ POINT), factors=(1.0,))
    for dtype, rel in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        params, d = (
            jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree(v))  # noqa: B023
            for v in (POINT, -0.1 * H @ POINT)
        )
        found = loss_along_step(quadratic, params, d, factors=(1.0,))
        assert found.gradient_distance.dtype == found.smoothness.dtype == jnp.float32
        assert found.smoothness == pytest.approx(float(wide.smoothness), rel=rel)


def test_gradients_that_vanish_do_not_underflow():
    """1e-25 in float32, whose square is 0 there."""
    params, d = (jax.tree.map(jnp.float32, tree(v)) for v in (POINT, -1e-3 * H @ POINT))
    one = loss_along_step(quadratic, params, d)
    small = loss_along_step(lambda p: 1e-25 * quadratic(p), params, d)
    for name in ("gradient_distance", "start_gradient_norm", "smoothness"):
        np.testing.assert_allclose(1e25 * getattr(small, name), getattr(one, name), rtol=1e-3)
    np.testing.assert_allclose(small.cosine, one.cosine, rtol=1e-5)


def test_what_is_not_defined_is_nan():
    still = loss_along_step(quadratic, tree(POINT), tree(np.zeros(5)))
    assert np.isnan(still.smoothness) and np.all(still.gradient_distance == 0)
    flat_loss = loss_along_step(lambda p: 0.0 * jnp.sum(p), jnp.ones(3), jnp.ones(3))
    assert np.all(np.isnan(flat_loss.cosine)) and flat_loss.smoothness == 0


def test_a_loss_that_is_not_finite_further_on_is_not_hidden():
    found = loss_along_step(lambda x: -jnp.log(x), jnp.array(1.0), jnp.array(-0.6), factors=(1, 4))
    assert np.isfinite(found.loss[0]) and np.isnan(found.loss[1])
    gone = loss_along_step(lambda x: jnp.sqrt(x), jnp.array(1.0), jnp.array(-0.6), factors=(1, 4))
    assert np.isfinite(gone.gradient_distance[0]) and np.isnan(gone.smoothness)


@pytest.mark.parametrize(
    ("loss_fn", "params", "direction", "factors", "message"),
    [
        (quadratic, {}, {}, FACTORS, "params has no leaves"),
        (jnp.sum, np.arange(3), np.arange(3), FACTORS, "params has dtype int"),
        (lambda p: p, np.ones(3), np.ones(3), FACTORS, "it must return one scalar"),
        (jnp.sum, np.ones(3), np.ones(2), FACTORS, r"direction is float64\(2,\): allowed"),
        (lambda p: jnp.sum(p[0]), [np.ones(3)], np.ones(3), FACTORS, "direction has structure"),
        (jnp.sum, np.ones(3), np.ones(3), (), r"factors=\(\) is not allowed"),
        (jnp.sum, np.ones(3), np.ones(3), (1.0, 0.0), r"factors=\(1.0, 0.0\)"),
        (jnp.sum, np.ones(3), np.ones(3), (np.inf,), "finite and not 0"),
    ],
)
def test_bad_arguments(loss_fn, params, direction, factors, message):
    with pytest.raises(ValueError, match=message) as error:
        loss_along_step(loss_fn, params, direction, factors=factors)
    assert "\n" not in str(error.value)
