"""`local_response_normalization` against loops in float64, finite differences and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.layers.local_response import local_response_normalization

OPTIONS = [
    dict(),
    dict(alpha=0.3),
    dict(size=3, alpha=0.5, beta=1.5, bias=1.0),
    dict(size=1, alpha=2.0, beta=0.5, bias=0.5),
    dict(size=15, alpha=0.1, beta=0.75, bias=2.0),  # more than there are channels
    dict(alpha=0.0),
]


def images(shape=(2, 3, 4, 7), seed=0, scale=3.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def by_loops(x, size=5, alpha=1e-4, beta=0.75, bias=2.0):
    """Krizhevsky et al. (2012), section 3.3: channels max(0, c − n/2) to min(N − 1, c + n/2)."""
    x = np.asarray(x, np.float64)
    y = np.empty_like(x)
    for c in range(x.shape[-1]):
        total = np.zeros(x.shape[:-1])
        for k in range(max(0, c - size // 2), min(x.shape[-1] - 1, c + size // 2) + 1):
            total += x[..., k] ** 2
        y[..., c] = x[..., c] / (bias + alpha * total) ** beta
    return y


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values(options):
    x = images()
    y = jax.jit(functools.partial(local_response_normalization, **options))(x)
    np.testing.assert_allclose(y, by_loops(x, **options), rtol=2e-6)


def test_one_number_by_hand():
    """Of the channels 3, 4: 3/(1 + 0.5·(9 + 16))² = 3/13.5² and 4/13.5²."""
    y = local_response_normalization(jnp.array([3.0, 4.0]), size=3, alpha=0.5, beta=2.0, bias=1.0)
    np.testing.assert_allclose(y, np.array([3, 4]) / 182.25, rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_pytorch_whose_alpha_is_size_times_ours(options):
    torch = pytest.importorskip("torch")
    x = images()
    size, alpha, beta, bias = (
        options.get(name, default)
        for name, default in dict(size=5, alpha=1e-4, beta=0.75, bias=2.0).items()
    )
    channels_first = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    expected = torch.nn.functional.local_response_norm(
        channels_first, size, alpha * size, beta, bias
    )
    y = local_response_normalization(x, **options)
    np.testing.assert_allclose(y, np.moveaxis(expected.numpy(), 1, -1), rtol=3e-6)


@pytest.mark.parametrize("options", OPTIONS[1:3], ids=str)
def test_gradient(options):
    """Central differences of the loops, along every axis of a small x."""
    x, g = images((2, 5)).astype(np.float64), images((2, 5), 1).astype(np.float64)
    expected, h = np.zeros_like(x), 1e-6
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        slope = (by_loops(x + step, **options) - by_loops(x - step, **options)) / (2 * h)
        expected[index] = np.sum(g * slope)
    with jax.enable_x64(True):
        run = functools.partial(local_response_normalization, **options)
        got = jax.jit(jax.grad(lambda x: jnp.sum(g * run(x))))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9)


def test_zeros_have_a_gradient():
    """Every channel of an inactive pixel is 0: dy/dx is then bias^−beta."""
    gradient = jax.grad(lambda x: jnp.sum(local_response_normalization(x)))(jnp.zeros((2, 6)))
    np.testing.assert_allclose(gradient, np.full((2, 6), 2.0**-0.75), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(dtype):
    """Sums of squares beyond the range of float16 are taken in float32."""
    x = jnp.asarray(images(scale=300.0), dtype)
    y = local_response_normalization(x)
    assert y.dtype == dtype
    expected = by_loops(np.float64(x))
    half_a_unit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.float64(y), expected, rtol=1.01 * half_a_unit)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(size=4), "size=4 is not allowed: it must be odd and positive"),
        (dict(size=0), "size=0 is not allowed"),
        (dict(size=-3), "size=-3 is not allowed"),
        (dict(alpha=-1e-4), "alpha=-0.0001 is not allowed: it must be ≥ 0"),
        (dict(alpha=float("nan")), "alpha=nan is not allowed"),
        (dict(bias=0.0), "bias=0.0 is not allowed: it must be > 0"),
        (dict(x=np.ones((2, 3), np.uint8)), "x has dtype uint8: allowed are floating"),
    ],
)
def test_bad_arguments(kwargs, message):
    kwargs = dict(x=images()) | kwargs
    with pytest.raises(ValueError, match=message):
        local_response_normalization(kwargs.pop("x"), **kwargs)
