"""The loss of a batch, its statistics moving or frozen, against explicit Hessians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN
from bn_research.probes.curvature import hessian_top_eigenvalues
from bn_research.probes.step_direction import FACTORS, loss_along_descent
from bn_research.training.batch_loss import batch_loss, frozen_loss
from bn_research.training.step import Batch, apply_fn_of

# Without momentum the running statistics are those of the last batch.
NETWORK = CNN("f3 f2", functools.partial(BatchNorm, momentum=0.0), "hidden")
APPLY_FN = apply_fn_of(NETWORK)
RNG = np.random.default_rng(0)
BATCH = Batch(
    jnp.asarray(RNG.standard_normal((8, 2, 2, 1)), jnp.float32), jnp.asarray(np.arange(8) % 2)
)


def parameters():
    shapes = NETWORK.init(jax.random.key(0), BATCH.image, train=False)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes)


def spelled_out(params, stats=None):
    """Loss of the network above by JAX's own derivatives of mean and variance."""
    x = BATCH.image.reshape(8, -1)
    x = x @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    mean, var = (x.mean(0), x.var(0)) if stats is None else stats
    x = (x - mean) / jnp.sqrt(var + 1e-5)
    x = jax.nn.relu(x * params["batch_norm1"]["scale"] + params["batch_norm1"]["bias"])
    logits = x @ params["dense2"]["kernel"] + params["dense2"]["bias"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), BATCH.label])


def explicit_top(loss_fn, params):
    flat, unravel = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda v: loss_fn(unravel(v))))(flat)
    return np.linalg.eigvalsh(np.asarray(hessian, np.float64))[-1]


def test_the_two_hessians_are_those_of_losses_spelled_out():
    params = parameters()
    x = BATCH.image.reshape(8, -1) @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    stats = x.mean(0), x.var(0)
    losses = {
        "through": (batch_loss(APPLY_FN, BATCH), spelled_out),
        "frozen": (
            frozen_loss(APPLY_FN, params, BATCH),
            lambda moved: spelled_out(moved, stats),
        ),
    }
    tops = []
    for ours, reference in losses.values():
        assert float(ours(params)) == pytest.approx(float(spelled_out(params)), rel=1e-5)
        key = jax.random.key(0)
        found = hessian_top_eigenvalues(ours, params, num_iterations=40, key=key)
        tops.append(float(found.largest[0]))
        assert tops[-1] == pytest.approx(explicit_top(reference, params), rel=1e-3)
    assert abs(tops[0] / tops[1] - 1) > 0.05


def test_the_surface_is_that_of_the_gradient_step():
    params, rate = parameters(), 0.3
    loss_fn = batch_loss(APPLY_FN, BATCH)
    surface = jax.jit(lambda p: loss_along_descent(loss_fn, p, rate))(params)
    gradient = jax.jit(jax.grad(spelled_out))(params)
    norm = np.linalg.norm(ravel_pytree(gradient)[0])
    np.testing.assert_allclose(surface.distance, rate * norm * np.array(FACTORS), rtol=1e-4)
    at = jax.jit(
        lambda f: spelled_out(jax.tree.map(lambda p, g: p - f * rate * g, params, gradient))
    )
    np.testing.assert_allclose(surface.loss, [at(f) for f in FACTORS], rtol=1e-4)
