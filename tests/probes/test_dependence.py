"""What outputs depend on, of functions whose answer is plain."""

import jax
import jax.numpy as jnp

from bn_research.probes.dependence import leaves_seen_by


def test_leaves_seen():
    def outputs(params):
        return {"a": jnp.sum(params["x"][0]) * jnp.ones(3), "b": jax.nn.relu(-(params["y"] ** 2))}

    params = {"x": [jnp.ones(4), jnp.ones(2)], "y": jnp.ones(3), "z": jnp.zeros((2, 2))}
    assert leaves_seen_by(outputs, params) == ["['x'][0]"]
    assert leaves_seen_by(lambda params: {}, params) == []
