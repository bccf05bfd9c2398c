"""Does the signal survive the initialization? A probe of any network, before it is trained.

    print(probe_linen(model, variables, images, train=True))
    print(probe_nnx(model, images))
    probe_signal(forward, params, batch).verdict

For every layer: how large its pre-activations are and how they are distributed, how different they
are for different examples, how large the gradient is that comes back to it, and between which
factors the step from the layer before stretches a change. In words, what is wrong and what to do.

`layers` has what is found, for each layer; `probe` finds it, with `statistics` of each array and
`jacobian` between two layers; `linen` and `nnx` make functions with layers of Flax's models;
`verdict` says in words what it means; `table` and `figure` show it.
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
