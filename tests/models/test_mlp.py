"""`MLP`: a CNN of dense layers only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.layers.linen import BatchNorm
from bn_research.models.mlp import MLP


def data(shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_network_of_section_4_1():
    """784-100-100-100-10 with sigmoid: 78,500 + 10,100 + 10,100 + 1,010 parameters; its values."""
    x = data((3, 28, 28, 1))
    logits, variables = MLP(activation=jax.nn.sigmoid).init_with_output(
        jax.random.key(0), x, train=False
    )
    params = variables["params"]
    assert set(params) == {"dense1", "dense2", "dense3", "dense4"}
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 99_710
    h = x.reshape(3, 784)
    for number in (1, 2, 3):
        h = sigmoid(h @ params[f"dense{number}"]["kernel"])
    np.testing.assert_allclose(logits, h @ params["dense4"]["kernel"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 3), (5, 1, 2, 3)])
def test_batch_norm_and_inputs_of_any_rank(shape):
    x = data(shape)
    net = MLP("f4 f2", functools.partial(BatchNorm, epsilon=1e-5), "all")
    variables = net.init(jax.random.key(0), x, train=True)
    logits, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
    assert set(new["batch_stats"]) == {"batch_norm1", "batch_norm2"}

    def norm(h):
        return (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)

    first, second = (variables["params"][n]["kernel"] for n in ("dense1", "dense2"))
    h = np.maximum(norm(np.asarray(x.reshape(5, 6) @ first)), 0)
    np.testing.assert_allclose(logits, norm(np.asarray(h @ second)), rtol=1e-3, atol=1e-3)


def test_dropout():
    """On the only hidden layer: its elements are doubled or gone, by the keys."""
    x, keys = data((5, 6)), jax.random.split(jax.random.key(3), 5)
    net = MLP("f4 f2", use_bias=False, dropout=0.5)
    variables = net.init(jax.random.key(0), x, train=False)
    first, second = (variables["params"][n]["kernel"] for n in ("dense1", "dense2"))
    folded = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    kept = [jax.random.bernoulli(key, 0.5, (4,)) for key in folded]
    h = 2 * np.maximum(np.asarray(x @ first), 0) * np.array(kept)
    logits = net.apply(variables, x, train=True, keys=keys)
    np.testing.assert_allclose(logits, h @ np.asarray(second), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["c4 f10", "P f10"])
def test_dense_layers_only(spec):
    with pytest.raises(ValueError, match=f"network '{spec}' has more than dense layers: use CNN"):
        MLP(spec).init(jax.random.key(0), data((1, 4, 4, 1)), train=False)
