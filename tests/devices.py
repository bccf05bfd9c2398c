"""Functions of one device, mapped over several."""

import re

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec


def spread(kind, fn, devices=4):
    """Maps fn over a leading axis of devices, named "batch"."""
    if kind == "vmap":
        return jax.jit(jax.vmap(fn, axis_name="batch"))
    assert jax.device_count() >= devices
    if kind == "pmap":
        return jax.pmap(fn, axis_name="batch", devices=jax.devices()[:devices])

    def local(*args):
        one = jax.tree.map(lambda leaf: leaf[0], args)
        return jax.tree.map(lambda leaf: leaf[None], fn(*one))

    mesh, spec = Mesh(np.array(jax.devices()[:devices]), ("batch",)), PartitionSpec("batch")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))


def collectives(compiled):
    """Names of the collectives of a compiled function."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-[a-z]+"
    return re.findall(rf"= \S.* ({kinds})(?:-start)?\(", compiled.as_text())
