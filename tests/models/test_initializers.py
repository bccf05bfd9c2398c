"""Weight initializers: bounds and moments of what they draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.models.initializers import NAMES, kernel_initializer

KEY = jax.random.key(0)


@pytest.mark.parametrize("a", [1e-3, 0.5, 1e-12])
def test_uniform(a):
    """Within ±a, mean 0, variance a²/3, both ends reached."""
    w = np.asarray(kernel_initializer("uniform", a=a)(KEY, (400, 500)), np.float64) / a
    assert np.abs(w).max() <= 1 and w.max() > 0.999 and w.min() < -0.999
    assert abs(w.mean()) < 5 * np.sqrt(1 / 3 / w.size)
    assert abs(w.var() - 1 / 3) < 0.005


def test_default_width():
    assert 9e-4 < np.abs(kernel_initializer("uniform")(KEY, (1000,))).max() <= 1e-3


def test_traced_width_equals_a_static_one():
    def draw(a):
        return kernel_initializer("uniform", a=a)(KEY, (64, 3))

    np.testing.assert_array_equal(jax.jit(draw)(0.01), draw(0.01))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in NAMES]
    + [(name, "bfloat16") for name in NAMES if name != "orthogonal"],  # no QR in bfloat16
)
def test_dtype(name, dtype):
    assert kernel_initializer(name)(KEY, (4, 4), jnp.dtype(dtype)).dtype == dtype


def test_dtype_with_an_array_as_width():
    drawn = kernel_initializer("uniform", a=jnp.float32(0.1))(KEY, (4,), jnp.bfloat16)
    assert drawn.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "shape", "variance"),
    [
        ("he", (200, 300), 2 / 200),
        ("lecun", (200, 300), 1 / 200),
        ("glorot", (200, 300), 2 / 500),
        ("he", (3, 3, 32, 64), 2 / (9 * 32)),
        ("lecun", (3, 3, 32, 64), 1 / (9 * 32)),
        ("glorot", (3, 3, 32, 64), 2 / (9 * 96)),
    ],
)
def test_variance_of_the_schemes(name, shape, variance):
    w = np.asarray(kernel_initializer(name)(KEY, shape), np.float64)
    assert abs(w.mean()) < 5 * np.sqrt(variance / w.size)
    np.testing.assert_allclose(w.var(), variance, rtol=0.05)


def test_orthogonal():
    w = np.asarray(kernel_initializer("orthogonal")(KEY, (3, 3, 4, 8))).reshape(36, 8)
    np.testing.assert_allclose(w.T @ w, np.eye(8), atol=1e-5)


def test_unknown_name():
    with pytest.raises(
        ValueError, match="initializer='xavier' is unknown: allowed are uniform, he"
    ):
        kernel_initializer("xavier")


@pytest.mark.parametrize("a", [0.0, -1e-3, float("nan")])
def test_bad_width(a):
    with pytest.raises(ValueError, match=rf"a={a} is not allowed: U\(−a, a\) needs a > 0"):
        kernel_initializer("uniform", a=a)
