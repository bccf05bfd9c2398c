"""How a step written for one replica is mapped over devices: the only place that does it.

The state is one copy in every mode: global arrays that are replicated over the devices, without a
device axis, so a checkpoint written under one mode or number of devices is read under any other.
The batch is cut along its examples, in order.

`jit` gives the compiler one program over the whole batch, whose collectives it places itself.
`pmap` and `shard_map` run the replica's own program with the collectives that it names; both
compile to the same. With `shard_map` the check of replication (`check_vma`) is off: with it, the
gradient of each replicated parameter would arrive summed by a collective of its own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Mode = Literal["jit", "pmap", "shard_map"]
MODES = ("jit", "pmap", "shard_map")
AXIS_NAME = "batch"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A mode and the devices that it spans; make it with `create_parallel`."""

    mode: Mode
    mesh: Mesh  # one axis, AXIS_NAME; devices of a process lie side by side

    @property
    def axis_name(self) -> str | None:
        """What the step and its layers are to be given as `axis_name`: None under `jit`."""
        return None if self.mode == "jit" else AXIS_NAME

    def create(self, init: Callable[..., Any], *args: Any) -> Any:
        """What init(*args) returns, one copy over the devices, as the mapped step takes it.

        Every process has to call it alike; it is compiled, and run on every device.
        """
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(init, out_shardings=whole)(*args)

    def replicate(self, tree: Any) -> Any:
        """One copy over the devices of arrays that every process holds alike."""
        return self.create(lambda tree: jax.tree.map(jnp.copy, tree), tree)

    def shard(self, rows: Any, *, batch_axis: int = 0) -> Any:
        """The global batch of which this process holds `rows`, as the mapped step takes it.

        Args:
          rows: pytree of host arrays, this process's part along batch_axis.
          batch_axis: axis of the examples; 1 behind an axis of microbatches.

        Raises:
          ValueError: this process's devices do not divide the rows evenly.
        """
        local = sum(device.process_index == jax.process_index() for device in self.mesh.devices)
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * batch_axis, AXIS_NAME))

        def place(leaf):
            before, (count, *after) = leaf.shape[:batch_axis], leaf.shape[batch_axis:]
            if count == 0 or count % local:
                raise ValueError(
                    f"a batch of {count} examples does not divide over {local} devices: allowed "
                    f"are multiples of {local}"
                )
            if self.mode == "pmap":
                leaf = leaf.reshape(*before, local, count // local, *after)
            return jax.make_array_from_process_local_data(sharding, leaf)

        return jax.tree.map(place, rows)

    def map(
        self,
        step: Callable[[Any, Any], Any],
        *,
        batch_axis: int = 0,
        donate_state: bool = True,
    ) -> Any:
        """The step over all devices, compiled once: (replicated state, batch from `shard`) -> out.

        Args:
          step: (state, batch) -> a pytree that is the same on every device; with `axis_name` given
            to it and its layers.
          batch_axis: as given to `shard`.
          donate_state: reuse the state's memory; a donated state must not be read again.
        """
        donated = (0,) if donate_state else ()
        whole = PartitionSpec()
        if self.mode == "pmap":
            mapped = jax.pmap(
                step,
                axis_name=AXIS_NAME,
                in_axes=(None, batch_axis),
                out_axes=None,  # type: ignore[arg-type]
                devices=list(self.mesh.devices),
                donate_argnums=donated,
            )
            if jax.process_count() == 1:
                return mapped
            # Of several processes each gets the copies on its own devices alone: say that the
            # others have theirs.
            sharding = NamedSharding(self.mesh, whole)
            return lambda *args: jax.tree.map(
                lambda leaf: jax.make_array_from_single_device_arrays(
                    leaf.shape, sharding, [shard.data for shard in leaf.addressable_shards]
                ),
                mapped(*args),
            )
        cut = PartitionSpec(*[None] * batch_axis, AXIS_NAME)
        if self.mode == "shard_map":
            mapped = jax.shard_map(
                step, mesh=self.mesh, in_specs=(whole, cut), out_specs=whole, check_vma=False
            )
            return jax.jit(mapped, donate_argnums=donated)
        return jax.jit(
            step,
            in_shardings=(NamedSharding(self.mesh, whole), NamedSharding(self.mesh, cut)),
            out_shardings=NamedSharding(self.mesh, whole),
            donate_argnums=donated,
        )


def create_parallel(mode: str = "auto", devices: Sequence[jax.Device] | None = None) -> Parallel:
    """A mode over devices.

    Args:
      mode: "jit", "pmap", "shard_map", or "auto": jit on one device, pmap on several.
      devices: None is all devices of all processes.

    Raises:
      ValueError: an unknown mode.
    """
    if mode not in ("auto", *MODES):
        raise ValueError(f"parallel={mode!r} is unknown: allowed are auto, {', '.join(MODES)}")
    # Side by side by process, so that a process's rows are one piece of the global batch.
    found = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    if mode == "auto":
        mode = "jit" if len(found) == 1 else "pmap"
    return Parallel(mode, Mesh(np.array(found), (AXIS_NAME,)))  # type: ignore[arg-type]
