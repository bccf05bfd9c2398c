"""A function that shares statistics over an axis of devices, on one device."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Function = Callable[..., Any]


def on_one_device(function: Function, axis_name: str | None) -> Function:
    """The function with the axis that its collectives name, of one device: this one.

        audit(on_one_device(loss_fn, "batch"), params)

    A model whose BN has `axis_name="batch"` runs inside `pmap` or `shard_map` alone. Here the axis
    has one device, which holds the whole batch, so that a mean over the axis is the mean itself.

    Args:
      function: of pytrees of arrays to pytrees of arrays; traceable.
      axis_name: of the axis; None gives the function back.
    """
    if axis_name is None:
        return function
    # Not vmap: of a jitted function with its own derivative rule it leaves the rule without axis.
    (device,) = jax.numpy.zeros(()).devices()  # the default one
    mesh = jax.sharding.Mesh(np.array([device]), (axis_name,))
    everywhere = jax.sharding.PartitionSpec()
    # What a function returns that never met the axis is the same on all of its one device.
    return jax.shard_map(
        function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )


def unbound_axis(error: Exception) -> str | None:
    """The name of the axis that JAX did not find, if that is the error."""
    found = re.search(r"unbound axis name: (\w+)", str(error))
    return found and found[1]


def with_axis_told(loss_fn: Function) -> Function:
    """loss_fn, whose missing axis is a ValueError of one line that says what to do."""

    @functools.wraps(loss_fn, updated=())
    def loss(*args: Any) -> Any:
        try:
            return loss_fn(*args)
        except NameError as error:
            name = unbound_axis(error)
            if name is None:
                raise
            raise ValueError(
                f"loss_fn names the axis {name!r}, which is not bound: allowed is a loss on one "
                f"device, on_one_device(loss_fn, {name!r}) of bn_research.probes.one_device"
            ) from error

    return loss
