"""How a process computes on a CPU: call these before JAX starts its devices.

XLA on a CPU takes its convolutions from one of two libraries. The default of XLA in jax 0.10 and
0.11, YNNPACK, reaches half the speed of the other, Eigen (measured, docs/performance.md).
"""

import os

_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type"


def use_eigen_convolutions() -> None:
    """Has XLA compute convolutions on a CPU by Eigen, unless XLA_FLAGS chooses by itself.

    Other devices are not affected, nor is a process whose JAX has started its devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _CONVOLUTIONS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_CONVOLUTIONS}=-individual_convolution".lstrip()
