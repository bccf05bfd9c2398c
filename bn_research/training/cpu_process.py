"""How a process computes on a CPU: call these before JAX starts its devices.

XLA on a CPU takes its convolutions from one of two libraries. The default of XLA in jax 0.10 and
0.11, YNNPACK, reaches half the speed of the other, Eigen (measured, docs/performance.md).

It also asks the system for the buffers of every call and returns them after it; touching fresh
pages takes a tenth of a step of a small convolutional network.
"""

import ctypes
import os
import sys

_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type"
# mallopt's parameters
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def use_eigen_convolutions() -> None:
    """Has XLA compute convolutions on a CPU by Eigen, unless XLA_FLAGS chooses by itself.

    Other devices are not affected, nor is a process whose JAX has started its devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _CONVOLUTIONS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_CONVOLUTIONS}=-individual_convolution".lstrip()


def keep_memory() -> None:
    """Has the process keep the memory that it frees, for the buffers of the next step.

    All large blocks come from one arena that is never given back. glibc alone can be told so;
    elsewhere nothing changes. Threads that have allocated before keep their arenas.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
            mallopt(parameter, value)
