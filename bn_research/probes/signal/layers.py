"""What the probe of the signal finds out, layer by layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class SingularValues(NamedTuple):
    """Of a Jacobian of m rows and n columns, which has min(m, n) of them."""

    smallest: float
    rms: float  # √(Σσ²/min(m, n))
    largest: float


@dataclass(frozen=True)
class LayerSignal:
    """What the probe says about the pre-activations h [batch, ..., features] of one layer.

    What is not finite in h makes NaN of the numbers. A gradient is None where it cannot be known:
    the output does not depend on the layer, or a loop or a function with its own derivative rule
    computes the layer and uses it inside.

    Attributes:
      name: of the layer.
      shape: of h.
      log10_rms: log₁₀ √⟨h²⟩ over all elements; −∞ for zeros.
      mean: of all elements.
      std: of all elements, around that mean.
      dead_fraction: share of features that are ≤ 0 for all examples at all positions. A ReLU right
        after them is dead on this batch; a BN in between shifts them first.
      silent_fraction: share of features whose gradient is 0 for all examples at all positions.
      conditioning: mean²/var: Σ_f mean_f² / Σ_f var_f, moments of each feature f over examples and
        positions. Large where features hardly differ from one example to the next; ∞ for
        constants other than 0.
      soft_rank: (Σλ)²/Σλ², λ the eigenvalues of the Gram matrix h hᵀ of examples, positions and
        features flattened, not centred: from 1 where all examples point the same way to max_rank
        where they are orthogonal and of one length. It is r(h), the lower bound of the rank in
        Daneshmand et al., "Batch normalization provably avoids rank collapse for randomly
        initialised deep networks", 2020, arXiv 2003.01652, also known as participation ratio; that
        paper's own "soft rank" counts singular values above a threshold. 0 for zeros.
      max_rank: the smaller of the batch size and the elements of an example.
      gradient_std: standard deviation of all elements of ∂L/∂h.
      log10_gradient_rms: log₁₀ of their root mean square; −∞ for zeros.
      jacobian: smallest, rms and largest singular value of the Jacobian of h by the layer before
        it, over the whole batch; None for the first layer, where there is no path between the two
        (parallel branches), and where they were not asked for. The smallest is an upper bound and
        the largest a lower bound of the true one, see `probe_signal`.
      bypassed: the layer, or its gradient, is 0 throughout, and gradient reaches what comes before
        it, or the batch, on another path: the layer lies in a branch.
      starts_at_zero: the layer is bypassed, and small numbers in the place of the parameters that
        are 0 wake it, or it is not 0 in another of its calls: a branch that starts at zero, such as
        a residual branch whose last scale does.
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
    """Layers by name, in the order in which they are computed.

    Attributes:
      loss: whose gradient was taken.
      output_std: standard deviation of the output's elements; NaN for an output that is not one
        floating-point array.
      output_soft_rank: soft rank of the output; NaN likewise, or unless it is [batch, ...].
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
        """Factor per layer of the pre-activations' std, from input to output.

        exp of the slope of ln std over the number of the layer, by Theil and Sen: the median over
        all pairs l < m of (ln std_m − ln std_l)/(m − l). A median over neighbours alone would show
        nothing but one kind of step where two kinds take turns, as in residual blocks. Layers of
        std 0 or not finite are left out; NaN without two others. The variance grows by the square.
        """
        return _growth([_log10(layer.std) for layer in self.values()])

    @property
    def backward_growth(self) -> float:
        """Factor per layer of the norm of ∂L/∂h, from output to input.

        As `forward_growth`, with the layers counted from the last to the first. Above 1 gradients
        explode, below 1 they vanish. The squared norm grows by the square. It is the norm, not the
        root mean square, so that pooling, which spreads a gradient over positions, is no decay.
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
