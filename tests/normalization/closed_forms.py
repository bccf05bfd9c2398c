"""Inputs of several tests of this folder, closed forms in float64, and comparisons with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

RATIOS = (0.0, 1e2, 1e3, 1e4)  # mean/std, one per feature


def normal(shape, *, std=1.0, seed=0, ratios=RATIOS):
    """Features of the last axis have these means, in units of std."""
    noise = np.random.default_rng(seed).standard_normal((*shape, len(ratios)))
    return ((noise + np.array(ratios)) * std).astype(np.float32)


def normal_on_devices(shape, *, seed, ratios=RATIOS):
    """As `normal`; and the mean differs from one entry of the first axis to the next."""
    steps = np.arange(shape[0], dtype=np.float32)
    return normal(shape, seed=seed, ratios=ratios) + steps.reshape(-1, *[1] * len(shape))


def weights(shape, seed=100):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def copies(arrays, devices):
    return [np.broadcast_to(a, (devices, *np.shape(a))) for a in arrays]


def correction(v, mean, var, r_max, d_max, epsilon):
    """Both corrections, r and d, of one feature, whose valid elements are v; 1/0 is 0."""
    sigma = np.sqrt(var + epsilon)
    inverse = 1 / sigma if sigma > 0 else 0.0
    r = np.clip(np.sqrt(v.var() + epsilon) * inverse, 1 / r_max, r_max)
    return r, np.clip((v.mean() - mean) * inverse, -d_max, d_max)


def closed_form(x, scale, bias, g, epsilon=1e-5, where=None, *, stats=None, **bounds):
    """Values and gradients of Σ g·y in x, scale and bias; x of shape (elements, features).

    With running statistics and bounds they are those of batch renormalization.
    """
    x, scale, bias, g = (np.asarray(v, np.float64) for v in (x, scale, bias, g))
    where = np.ones(x.shape, bool) if where is None else where
    y, dx = np.broadcast_to(bias, x.shape).copy(), np.zeros(x.shape)
    dscale = np.zeros(x.shape[1])
    for j, keep in enumerate(where.T):
        v = x[keep, j]
        if not v.size:
            continue
        r, d = 1.0, 0.0
        if stats is not None:
            mean, var = (np.float64(leaf[j]) for leaf in stats)
            r, d = correction(v, mean, var, **bounds, epsilon=epsilon)
        spread = v.var() + epsilon
        rstd = 1 / np.sqrt(spread) if spread > 0 else 0.0
        x_hat, dx_hat = (v - v.mean()) * rstd, g[keep, j] * scale[j] * r
        y[keep, j] += scale[j] * (x_hat * r + d)
        dx[keep, j] = rstd * (dx_hat - dx_hat.mean() - x_hat * np.mean(x_hat * dx_hat))
        dscale[j] = np.sum(g[keep, j] * (x_hat * r + d))
    return y, dx, dscale, g.sum(0)


def close(got, expected, rtol):
    """Largest error relative to the largest entry."""
    error = np.abs(np.asarray(got, np.float64) - expected).max()
    assert error <= rtol * np.abs(expected).max(), error / np.abs(expected).max()


def close_per_feature(got, expected, rtol):
    """Largest error of each feature (last axis), relative to its largest entry."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected)
    axes = tuple(range(expected.ndim - 1))
    error, size = np.abs(got - expected).max(axes), np.abs(expected).max(axes)
    assert np.all(error <= rtol * size), f"relative errors {error / size}"


def close_with_gradients(got, expected, close=close_per_feature):
    """y, and the gradients in x, scale and bias."""
    close(got[0], expected[0], 1e-5)
    close(got[1], expected[1], 1e-4)
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(got[3], expected[3], rtol=1e-4, atol=1e-3)


def masked_give_bias(got, bias, where):
    """What is not valid comes out as bias and has no gradient."""
    y, dx, where = np.asarray(got[0]), np.asarray(got[1]), np.broadcast_to(where, got[0].shape)
    np.testing.assert_array_equal(y[~where], np.broadcast_to(bias, y.shape)[~where])
    assert np.all(dx[~where] == 0)


def with_gradients(transform, **options):
    """(x, scale, bias, g, where, ...) -> y and the gradients of Σ g·y in x, scale and bias."""

    def run(x, scale, bias, g, where=None, **more):
        def loss(x, scale, bias):
            y, _ = transform(x, scale=scale, bias=bias, where=where, **options, **more)
            return jnp.sum(g * y), y

        (_, y), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return (y, *grads)

    return run


@functools.cache
def compiled(transform, **options):
    return jax.jit(with_gradients(transform, **options))
