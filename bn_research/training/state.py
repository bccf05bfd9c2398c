"""What training carries from step to step."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray


class TrainState(NamedTuple):
    """Everything that a step reads and writes; saving it whole makes a resumed run exact."""

    step: Array  # shape=(), dtype=int32: steps taken
    params: Any
    batch_stats: Any  # the model's running statistics; {} without BN
    opt_state: Any
    key: Array  # shape=(), a typed PRNG key; fixed, the randomness of step t is folded from it


def create_train_state(
    init_fn: Callable[[PRNGKeyArray], Any],
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
) -> TrainState:
    """State before the first step.

    Args:
      init_fn: key -> variables with `params` and, with BN, `batch_stats`.
      optimizer: its state is made for the params.
      key: seeds both the initialization and the order of the examples.
    """
    init_key, run_key = jax.random.split(key)
    variables = init_fn(init_key)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        key=run_key,
    )


def digest(state: TrainState) -> str:
    """SHA-256 of the bits of params and batch_stats: equal for runs that agree to the last bit."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves((state.params, state.batch_stats)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()
