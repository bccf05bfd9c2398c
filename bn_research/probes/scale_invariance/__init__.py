"""Which parameters of a network are scale-invariant? An audit of any loss function.

    audit(loss_fn, params)["['dense']['kernel']"].scale_invariant

A loss is invariant to the scale of a leaf w where L(a·w) = L(w) for every a > 0, as for the
weights in front of BN. Then ⟨w, ∇L⟩ = 0, the gradient at a·w is that at w over a, and what moves
the network is the angle of a step, set by the effective learning rate η/‖w‖². Weight decay on such
a leaf leaves the function alone and only sets that rate (van Laarhoven, "L2 regularization versus
batch and weight normalization", 2017, arXiv 1706.05350).

Some leaves are invariant only together: a kernel and its bias in front of an activation and BN,
scale and bias of one BN in front of the next, all that is written to a residual stream.

`rows` has what is found, a row for each leaf; `probe` finds it, with `groups` for the leaves that
are invariant only together; `table` and `figure` show it.
"""

from bn_research.probes.scale_invariance.probe import Audit, LossFn, audit
from bn_research.probes.scale_invariance.rows import Row

__all__ = ["Audit", "LossFn", "Row", "audit"]
