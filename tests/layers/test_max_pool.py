"""`max_pool` against Flax's, whose gradient is XLA's select-and-scatter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.layers.conv import conv2d
from bn_research.layers.max_pool import max_pool
from bn_research.normalization import batch_norm

OPTIONS = [
    ((2, 2), (2, 2), "VALID"),
    ((2, 2), (2, 2), "SAME"),
    ((3, 3), (1, 1), "SAME"),
    ((3, 3), (2, 2), "SAME"),
    ((3, 2), (2, 3), ((1, 0), (0, 1))),
]


def images(shape, ties):
    x = np.random.default_rng(0).standard_normal(shape)
    return jnp.asarray(np.round(x) if ties else x, jnp.float32)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [(6, 8), (7, 5), (3, 3)])
@pytest.mark.parametrize("options", OPTIONS)
def test_is_flax_max_pool(options, size, ties):
    """Values and gradients, to the bit: of equal values in a window the first gets all."""
    x = images((2, *size, 3), ties)
    results = []
    for pool in (max_pool, nn.max_pool):
        y, pull = jax.vjp(lambda x, pool=pool: pool(x, *options), x)
        g = images(y.shape, ties=True)
        results.append((y, *pull(g)))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("options", OPTIONS)
def test_forward_mode_and_vmap(options):
    x, change = images((2, 6, 7, 2), ties=False), images((2, 6, 7, 2), ties=True)

    def pool(x):
        return max_pool(x, *options)

    y, tangent = jax.jvp(pool, (x,), (change,))
    expected = (pool(x + 1e-3 * change) - pool(x - 1e-3 * change)) / 2e-3
    np.testing.assert_allclose(tangent, expected, atol=1e-2)
    mapped = jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(pool(x[None])))))(x)
    np.testing.assert_allclose(mapped, jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))(x), atol=1e-6)


def test_in_one_program_with_what_comes_before():
    """A compiler may compute the images again for the gradient, rounded in another way."""
    x, kernel = images((32, 12, 12, 3), ties=False), images((3, 3, 3, 16), ties=False)
    scale = jnp.linspace(0.1, 3, 16)

    def gradients(pool):
        @jax.jit
        def gradient(kernel, scale):
            def loss(kernel, scale):
                y = jax.nn.relu(batch_norm(conv2d(x, kernel), scale, scale - 1)[0])
                return jnp.sum(jnp.sin(pool(y, (2, 2), (2, 2))))

            return jax.grad(loss, (0, 1))(kernel, scale)

        return gradient(kernel, scale)

    for found, expected in zip(gradients(max_pool), gradients(nn.max_pool), strict=True):
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < 1e-5


def test_second_derivatives():
    x, change = images((2, 6, 6, 2), ties=False), images((2, 6, 6, 2), ties=True)

    def product(pool):
        loss = lambda x: jnp.sum(jnp.sin(pool(x, (3, 3), (2, 2), "SAME")))  # noqa: E731
        return jax.jvp(jax.grad(loss), (x,), (change,))[1]

    np.testing.assert_allclose(product(max_pool), product(nn.max_pool), atol=1e-6)


def test_half_precision_keeps_its_type():
    x = images((1, 4, 4, 2), ties=False).astype(jnp.bfloat16)
    y, pull = jax.vjp(lambda x: max_pool(x, (2, 2), (2, 2)), x)
    assert y.dtype == pull(y)[0].dtype == jnp.bfloat16


def test_elsewhere_it_is_xla_s(monkeypatch):
    x = images((1, 4, 4, 2), ties=False)

    def program():
        return str(jax.make_jaxpr(jax.grad(lambda x: max_pool(x, (2, 2), (2, 2)).sum()))(x))

    assert "select_and_scatter" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "select_and_scatter" in program()
