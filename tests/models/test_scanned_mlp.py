"""The scanned perceptron is its layers one after the other, from He's weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.models.scanned_mlp import forward, initialize


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("skip", [0.0, 1.0])
@pytest.mark.parametrize("train", [True, False])
def test_forward_is_the_layers_one_after_the_other(skip, train):
    variables = initialize(jax.random.key(0), 6, 5, 3, 4)
    params = variables["params"]._replace(
        scale=jnp.array(1 + 0.1 * normal((4, 5), 1), jnp.float32),
        bias=jnp.array(0.1 * normal((4, 5), 2), jnp.float32),
    )
    stats = variables["batch_stats"]._replace(
        mean=jnp.array(normal((4, 5), 3), jnp.float32),
        var=jnp.array(normal((4, 5), 4) ** 2 + 1, jnp.float32),
    )
    image = jnp.array(normal((7, 2, 3, 1), 5), jnp.float32)
    found, moments = forward({"params": params, "batch_stats": stats}, image, skip, train=train)
    x = np.asarray(image, np.float64).reshape(7, 6) @ np.asarray(params.first)
    means = []
    for layer in range(4):
        mean, var = (
            (x.mean(axis=0), x.var(axis=0))
            if train
            else (np.asarray(stats.mean[layer]), np.asarray(stats.var[layer]))
        )
        means.append(mean)
        y = (x - mean) / np.sqrt(var + 1e-5) * params.scale[layer] + params.bias[layer]
        y = np.maximum(y, 0)
        x = skip * x + y @ params.hidden[layer] if layer < 3 else y @ params.head
    np.testing.assert_allclose(found, x, atol=1e-4)
    if train:
        np.testing.assert_allclose(moments.mean, np.stack(means), atol=1e-5)


def test_initial_weights_are_hes_and_differ_between_layers():
    params = initialize(jax.random.key(0), 30, 200, 2, 10)["params"]
    assert np.std(params.hidden) == pytest.approx(math.sqrt(2 / 200), rel=0.02)
    assert not np.allclose(params.hidden[0], params.hidden[1])
    assert np.std(params.first) == pytest.approx(math.sqrt(1 / 30), rel=0.05)
