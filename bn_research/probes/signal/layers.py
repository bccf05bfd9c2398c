"""What the probe of the signal finds out, layer by layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class SingularValues(NamedTuple):
    """Singular values of a Jacobian of m rows and n columns, which has min(m, n) of them."""

    smallest: float
    rms: float  # √(Σσ²/min(m, n))
    largest: float


@dataclass(frozen=True)
class LayerSignal:
    """What the probe says about one layer, whose pre-activations are h [batch, ..., features].

    NaN or infinity in h makes NaN of the numbers. A gradient is None where it cannot be known: the
    output does not depend on the layer, or a loop or a function with its own derivative rule both
    computes the layer and uses it.

    Attributes:
      name: key of the intermediates, or path of the Flax module.
      shape: shape of h.
      log10_rms: log₁₀ √⟨h²⟩ over all elements; −∞ for zeros.
      mean: mean of all elements.
      std: standard deviation of all elements.
      dead_fraction: share of features that are ≤ 0 for all examples at all positions. A ReLU right
        after them is dead on this batch; a BN in between shifts them first.
      silent_fraction: share of features whose gradient is 0 for all examples at all positions.
      conditioning: mean²/var: Σ_f mean_f² / Σ_f var_f, moments of each feature f over examples and
        positions. Large where features hardly differ between examples; ∞ for constants other than
        0.
      soft_rank: (Σλ)²/Σλ², λ the eigenvalues of the Gram matrix h hᵀ [batch, batch], with positions
        and features flattened and not centred. It goes from 1, where all examples point the same
        way, to max_rank, where they are orthogonal and equally long; 0 for zeros. It is r(h), the
        lower bound of the rank in Daneshmand et al., "Batch normalization provably avoids rank
        collapse for randomly initialised deep networks", 2020, arXiv 2003.01652, also known as
        participation ratio; that paper's own "soft rank" counts singular values above a threshold.
      max_rank: the smaller of the batch size and the elements of an example.
      gradient_std: standard deviation of all elements of ∂L/∂h.
      log10_gradient_rms: log₁₀ of their root mean square; −∞ for zeros.
      jacobian: smallest, rms and largest singular value of the Jacobian of h by the layer before,
        over the whole batch. The smallest is an upper bound and the largest a lower bound of the
        true one, see `probe_signal`. None for the first layer, where no path leads from the layer
        before to this one (parallel branches), and where Jacobians were not asked for.
      bypassed: whether the layer lies in a branch: it, or its gradient, is 0 throughout, and still
        gradient reaches what comes before it, or the batch, on another path.
      starts_at_zero: whether that branch starts at zero, such as a residual branch whose last scale
        does: the layer is bypassed, and it wakes when small numbers take the place of parameters
        that are 0, or it is not 0 in another of its calls.
    """

    name: str
    shape: tuple[int, ...]
    log10_rms: float
    mean: float
    std: float
    dead_fraction: float
    silent_fraction: float | None
    conditioning: float
    soft_rank: float
    max_rank: int
    gradient_std: float | None
    log10_gradient_rms: float | None
    jacobian: SingularValues | None
    bypassed: bool = False
    starts_at_zero: bool = False

    @property
    def log10_gradient_norm(self) -> float | None:
        """log₁₀ ‖∂L/∂h‖, the norm over all elements."""
        if self.log10_gradient_rms is None:
            return None
        return self.log10_gradient_rms + 0.5 * math.log10(math.prod(self.shape))


class Layers(Mapping[str, LayerSignal]):
    """All that is measured: layers by name, in the order in which they are computed.

    Attributes:
      loss: value of the loss whose gradient was taken.
      output_std: standard deviation of the output's elements; NaN unless the output is one
        floating-point array [batch, ...] of two axes or more.
      output_soft_rank: soft rank of the output; NaN likewise.
      left_out: kernels of the model that no layer stands for, in words.
    """

    def __init__(
        self,
        layers: Sequence[LayerSignal],
        *,
        loss: float,
        output_std: float = math.nan,
        output_soft_rank: float = math.nan,
        left_out: Sequence[str] = (),
    ):
        """Keeps what the probe found."""
        self._layers = {layer.name: layer for layer in layers}
        self.loss = loss
        self.output_std, self.output_soft_rank = output_std, output_soft_rank
        self.left_out = tuple(left_out)

    def __getitem__(self, name: str) -> LayerSignal:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def forward_growth(self) -> float:
        """Factor by which the pre-activations' std grows per layer, from input to output.

        exp of the slope of ln std over the number of the layer, by Theil and Sen: the median over
        all pairs l < m of (ln std_m − ln std_l)/(m − l). Where two kinds of step take turns, as in
        residual blocks, a median over neighbours alone would show only one of them. Layers whose
        std is 0 or not finite are left out; NaN where fewer than two remain. The variance grows by
        the square of this factor.
        """
        return _growth([_log10(layer.std) for layer in self.values()])

    @property
    def backward_growth(self) -> float:
        """Factor by which ‖∂L/∂h‖ grows per layer, from output to input.

        Computed as `forward_growth`, with the layers counted from the last to the first. Above 1
        gradients explode, below 1 they vanish. The norm is compared, and not the root mean square,
        because pooling spreads a gradient over positions, which is no decay. The squared norm grows
        by the square of this factor.
        """
        sizes = [layer.log10_gradient_norm for layer in self.values()]
        return _growth([math.nan if size is None else size for size in sizes][::-1])


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


def _growth(logs: Sequence[float]) -> float:
    """Factor per layer, of log10s."""
    values = np.asarray(logs, np.float64)
    (places,) = np.nonzero(np.isfinite(values))
    if len(places) < 2:
        return math.nan
    first, second = np.triu_indices(len(places), 1)
    rises = values[places[second]] - values[places[first]]
    return float(10 ** np.median(rises / (places[second] - places[first])))
