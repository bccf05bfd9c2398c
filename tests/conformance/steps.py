"""Steps of the pure functions, as they are compared with those of a peer; inputs for both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bn_research.normalization import BatchStats, batch_norm, normalize, update_batch_stats


def fresh(features, dtype="float32"):
    return BatchStats(jnp.zeros(features, dtype), jnp.ones(features, dtype))


def exact(x, epsilon=1e-5):
    """The normalized features of the last axis, in float64."""
    x, axes = x.astype(np.float64), tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + epsilon)


@functools.partial(jax.jit, static_argnames=("axis", "unbiased"))
def training(
    x,
    scale=None,
    bias=None,
    stats=None,
    g=0.0,
    where=None,
    *,
    axis=-1,
    momentum=0.99,
    epsilon=1e-5,
    unbiased=False,
):
    """Output, gradients of Σ g·y in x, scale and bias, and the running statistics after it."""

    def loss(x, scale, bias):
        y, moments = batch_norm(x, scale, bias, feature_axes=axis, epsilon=epsilon, where=where)
        return jnp.sum(g * y), (y, moments)

    (_, (y, moments)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    if stats is not None:
        stats = update_batch_stats(stats, moments, momentum=momentum, unbiased=unbiased)
    return y, *grads, stats


@functools.partial(jax.jit, static_argnames="axis")
def inference(x, scale, bias, stats, g=0.0, *, axis=-1, epsilon=1e-5):
    """Output, and gradients of Σ g·y in x, scale and bias."""

    def loss(x, scale, bias):
        y = normalize(x, *stats, scale, bias, feature_axes=axis, epsilon=epsilon)
        return jnp.sum(g * y), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return y, *grads
