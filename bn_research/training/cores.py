"""CPU cores as devices, for programs that are too small to use all cores at once."""

import contextlib
import os

import jax

_MOST_CORES = 8
_FORCED = "xla_force_host_platform_device_count"


def use_cpu_cores(most: int = _MOST_CORES) -> None:
    """Makes each CPU core a device of JAX; call it before anything asks JAX for its devices.

    Later it does nothing, nor where the number of CPU devices has been set.

    Args:
      most: devices at most; each holds a copy of the data.
    """
    chosen = jax.config.values["jax_num_cpu_devices"] != -1
    if chosen or _FORCED in os.environ.get("XLA_FLAGS", ""):
        return
    mine = hasattr(os, "sched_getaffinity")  # of all cores those of this process, on Linux
    cores = len(os.sched_getaffinity(0)) if mine else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", min(cores, most))
