"""Does the signal survive the initialization? A probe of any network, before it is trained.

    print(probe_linen(model, variables, images, train=True))
    print(probe_nnx(model, images))
    probe_signal(forward, params, batch).verdict

For every layer it measures how large the pre-activations are and how they are distributed, how much
they differ between examples, how large the gradient is that comes back to them, and by which
factors the step from the layer before stretches a small change. The verdict says in words what is
wrong and what to do.

`layers` has what is found, for each layer; `probe` finds it, with `statistics` of each array and
the `jacobian` between two layers; `linen` and `nnx` mark the layers of Flax's models; `verdict`
says what the numbers mean; `table` and `figure` show them.
"""

from bn_research.probes.signal.layers import LayerSignal, SingularValues
from bn_research.probes.signal.probe import (
    LossFn,
    Signal,
    linen_layers,
    nnx_layers,
    probe_linen,
    probe_nnx,
    probe_signal,
)
from bn_research.probes.signal.statistics import log10_rms

__all__ = [
    "LayerSignal",
    "LossFn",
    "Signal",
    "SingularValues",
    "linen_layers",
    "log10_rms",
    "nnx_layers",
    "probe_linen",
    "probe_nnx",
    "probe_signal",
]
