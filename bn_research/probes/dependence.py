"""What a function of a network's parameters depends on, found by changing them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def leaves_seen_by(outputs_fn: Callable[[Any], Any], params: Any) -> list[str]:
    """Paths of the leaves of params that some output of a function depends on.

    Each leaf in turn is replaced by random numbers, all in one compiled program.

    Args:
      outputs_fn: of params, jit-compatible; its outputs are a pytree of arrays.
      params: a pytree of floating-point arrays.

    Returns:
      Paths as `jax.tree_util.keystr` prints them, in the order of the tree.
    """
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in named]
    rng = np.random.default_rng(0)
    random = [rng.standard_normal(leaf.shape).astype(leaf.dtype) for leaf in leaves]

    @jax.jit
    def outputs():
        def replaced(chosen):
            mixed = [
                jnp.where(chosen == i, r, leaf)
                for i, (leaf, r) in enumerate(zip(leaves, random, strict=True))
            ]
            return outputs_fn(jax.tree.unflatten(treedef, mixed))

        return jax.lax.map(replaced, jnp.arange(-1, len(leaves)))

    seen = np.zeros(len(leaves), bool)
    for output in jax.tree.leaves(jax.device_get(outputs())):
        rows = output.reshape(len(output), -1)
        seen |= np.any(rows[1:] != rows[0], axis=1)
    return [jax.tree_util.keystr(path) for (path, _), at in zip(named, seen, strict=True) if at]
