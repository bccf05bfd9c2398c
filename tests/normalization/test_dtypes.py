"""Dtypes of results and of statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from normalization.closed_forms import weights

from bn_research.normalization import BatchStats, batch_moments, batch_norm, normalize
from bn_research.normalization.renorm import batch_renorm
from bn_research.normalization.whitening import apply_whitening, inverse_sqrt, whiten

pytestmark = pytest.mark.usefixtures("strict_arrays")

ZERO, ONE = jnp.zeros(2), jnp.ones(2)
renorm = functools.partial(batch_renorm, stats=BatchStats(ZERO, ONE), r_max=3.0, d_max=5.0)


every_dtype = pytest.mark.parametrize(
    ("x", "scale", "dtype", "expected"),
    [
        ("bfloat16", None, None, "bfloat16"),
        ("float16", "float16", None, "float16"),
        ("bfloat16", "float32", None, "float32"),
        ("float32", "bfloat16", None, "float32"),
        ("float32", "float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float16", "float16"),
    ],
)


def shapes(fn, x, scale, *stats, dtype):
    x = jnp.asarray(weights((8, 2)), x)
    params = {} if scale is None else dict(scale=ONE.astype(scale), bias=ZERO.astype(scale))
    return jax.eval_shape(functools.partial(fn, dtype=dtype), x, *stats, **params)


@every_dtype
@pytest.mark.parametrize("transform", [batch_norm, renorm, whiten])
def test_dtype_of_the_result(transform, x, scale, dtype, expected):
    """Promotion of x, scale and bias, unless dtype says otherwise; statistics stay float32."""
    y, moments = shapes(transform, x, scale, dtype=dtype)
    assert y.dtype == expected and {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}


@every_dtype
@pytest.mark.parametrize(("fn", "spread"), [(normalize, ONE), (apply_whitening, jnp.eye(2))])
def test_dtype_of_inference(fn, spread, x, scale, dtype, expected):
    assert shapes(fn, x, scale, ZERO, spread, dtype=dtype).dtype == expected


def test_dtype_of_an_inverse_root():
    assert jax.eval_shape(inverse_sqrt, jnp.eye(2, dtype="bfloat16")).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int32])
def test_integers_are_taken_as_float32(dtype):
    x = np.random.default_rng(4).integers(0, 2 if dtype is bool else 100, (64, 3)).astype(dtype)
    moments, x64 = batch_moments(x), x.astype(float)
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
    np.testing.assert_allclose(moments.mean, x64.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.m2, x64.var(0) * 64, rtol=1e-5)
    scale = np.array([1.0, 2.0, 3.0], np.float32)
    expected = scale * (x64 - x64.mean(0)) / np.sqrt(x64.var(0) + 1e-5)
    inference = normalize(x, x64.mean(0).astype("f4"), x64.var(0).astype("f4"), scale)
    for y in (batch_norm(x, scale)[0], inference):
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda scale: jnp.sum(jnp.square(batch_norm(x, scale)[0])))(scale)
    x_hat = expected / scale
    np.testing.assert_allclose(gradient, 2 * scale * np.square(x_hat).sum(0), rtol=1e-4)
