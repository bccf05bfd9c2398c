"""Training states side by side in one compiled program, one in each lane."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from bn_research.training.state import TrainState
from bn_research.training.step import StepMetrics

Strategy = Literal["in_turn", "devices", "vmap"]
STRATEGIES: tuple[Strategy, ...] = ("in_turn", "devices", "vmap")
_AXIS = "lane"

CreateFn = Callable[[PRNGKeyArray, Any], TrainState]
AdvanceFn = Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]]


class Lanes:
    """A compiled program that advances as many states as it has lanes.

    Between dispatches states stay on their devices; they are moved as host arrays, with the data
    of the key in place of the key, so that moving them compiles nothing.

    Args:
      advance: (state, hyper, data) -> new state and metrics; pure.
      strategy: see `bn_research.training.sweep`.
      members: how many there are to train.
      devices: to use; the first alone in turn.
      compiler_options: XLA's.

    Attributes:
      count: number of lanes.
      in_step: whether all lanes must hold states of the same step.
    """

    def __init__(
        self,
        advance: AdvanceFn,
        strategy: Strategy,
        members: int,
        devices: Sequence[jax.Device],
        *,
        compiler_options: dict[str, Any] | None = None,
    ):
        """Compiles nothing yet."""
        devices = devices[: 1 if strategy == "in_turn" else min(members, len(devices))]
        self.in_step = strategy == "vmap"
        per_device = math.ceil(members / len(devices)) if self.in_step else 1
        self.count = per_device * len(devices)
        mesh = Mesh(np.array(devices), (_AXIS,))
        self._cut = NamedSharding(mesh, PartitionSpec(_AXIS))
        self._whole = NamedSharding(mesh, PartitionSpec())
        # Each device runs the replica's own program: a partitioner would look for collectives.
        mapped = jax.shard_map(
            _batched(advance) if self.in_step else _single(advance),
            mesh=mesh,
            in_specs=(self._cut.spec, self._cut.spec, self._whole.spec),
            out_specs=self._cut.spec,
            check_vma=False,
        )
        self._program = jax.jit(mapped, donate_argnums=0, compiler_options=compiler_options)
        self._state: Any = None
        self._hyper: Any = None

    def place(self, data: Any) -> Any:
        """One copy of data on each device, as `advance` takes it."""
        return jax.device_put(data, self._whole)

    def load(self, states: Sequence[Any], hypers: Sequence[Any]) -> None:
        """Puts a state and its hyperparameters into each lane; lanes left over repeat the last."""
        missing = self.count - len(states)

        def stacked(trees):
            trees = [*trees, *trees[-1:] * missing]
            return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

        self._state = jax.device_put(stacked(list(states)), self._cut)
        self._hyper = jax.device_put(stacked(list(hypers)), self._cut)

    def advance(self, data: Any) -> StepMetrics:
        """Advances every lane by one dispatch; metrics with a first axis of lanes."""
        self._state, metrics = self._program(self._state, self._hyper, data)
        return jax.tree.map(np.asarray, metrics)

    def states(self) -> list[Any]:
        """Copies on the host of the states, lane by lane."""
        state = jax.tree.map(np.array, self._state)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(self.count)]


def with_key_data(state: TrainState) -> TrainState:
    """The state with the data of its key in place of the key."""
    return state._replace(key=jax.random.key_data(state.key))


def with_key(state: TrainState) -> TrainState:
    """The inverse of `with_key_data`, for keys of JAX's default implementation."""
    return state._replace(key=jax.random.wrap_key_data(jnp.asarray(state.key)))


def _single(advance: AdvanceFn) -> Callable[..., Any]:
    def program(state: Any, hyper: Any, data: Any) -> Any:
        state, hyper = jax.tree.map(lambda leaf: leaf[0], (state, hyper))
        new, metrics = advance(with_key(state), hyper, data)
        return jax.tree.map(lambda leaf: leaf[None], (with_key_data(new), metrics))

    return program


def _batched(advance: AdvanceFn) -> Callable[..., Any]:
    # The step stays one number: where it were batched, a conditional on it, such as the shuffle at
    # the start of an epoch, would run both of its branches in every step.
    axes = TrainState(step=None, params=0, batch_stats=0, opt_state=0, key=0)  # type: ignore[arg-type]

    def program(state: TrainState, hyper: Any, data: Any) -> Any:
        lanes = state.step.shape[0]

        def one(state, hyper):
            new, metrics = advance(with_key(state), hyper, data)
            return with_key_data(new), metrics

        batched = jax.vmap(one, in_axes=(axes, 0), out_axes=(axes, 0))
        new, metrics = batched(state._replace(step=state.step[0]), hyper)
        step: Array = jnp.broadcast_to(new.step, lanes)
        return new._replace(step=step), metrics

    return program
