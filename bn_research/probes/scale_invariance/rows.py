"""What an audit of scale invariance finds out, leaf by leaf."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """What the audit says about one leaf.

    Attributes:
      path: path of the leaf, as `jax.tree_util.keystr` prints it.
      kind: "invariant"; "no effect", invariant because the loss does not depend on the leaf at
        all; "homogeneous", L(a·w) = aᵏ·L(w) with k ≠ 0; or "none".
      degree: degree of homogeneity: 0 where invariant, k where homogeneous, NaN where neither.
      deviation: largest |L(a·w) − L(w)| over the scales, relative to the loss.
      radial_share: ⟨w, g⟩/(‖w‖·‖g‖) at params, g the gradient; 0 where w or g is zero.
      norm: ‖w‖.
      gradient_norm: ‖g‖.
      size: number of elements.
      pooled_share: ⟨w, g⟩/(‖w‖·‖g‖) over random points, in root mean square weighted by ‖w‖·‖g‖. It
        decides, together with deviation.
      pooled_limit: largest pooled_share of an invariant leaf.
    """

    path: str
    kind: Literal["invariant", "no effect", "homogeneous", "none"]
    degree: float
    deviation: float
    radial_share: float
    norm: float
    gradient_norm: float
    size: int
    pooled_share: float = math.nan  # of audits that were kept before there was one
    pooled_limit: float = math.nan

    @property
    def scale_invariant(self) -> bool:
        """Whether the loss is invariant to the scale of this leaf alone."""
        return self.kind in ("invariant", "no effect")

    def effective_learning_rate(self, learning_rate: float) -> float:
        """η/‖w‖², the rate at which a step turns an invariant leaf; ∞ for a leaf of zeros."""
        return learning_rate / self.norm**2 if self.norm else float("inf")


class Rows(Mapping[str, Row]):
    """All that is found out: rows by path of the leaf, in the order of the tree.

    Attributes:
      loss: loss at params.
      scales: factors that leaves were multiplied by.
      tolerance: largest deviation of an invariant leaf.
      pooled_limit: largest pooled share of an invariant leaf, unless rounding raises it for a leaf.
      groups: paths of leaves that are invariant only together, all scaled by one factor: each
        group as small as it can be. A leaf can be in several.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        groups: Sequence[tuple[str, ...]],
        *,
        loss: float,
        scales: Sequence[float],
        tolerance: float,
        pooled_limit: float | None = None,
    ):
        """Keeps what `audit` found."""
        self._rows = {row.path: row for row in rows}
        self.groups = tuple(groups)
        self.loss, self.scales = loss, tuple(scales)
        self.tolerance, self.pooled_limit = tolerance, pooled_limit or tolerance

    def __getitem__(self, path: str) -> Row:
        return self._rows[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def decay_sets_only_the_rate(self) -> tuple[str, ...]:
        """Paths of leaves for which weight decay does nothing but set the learning rate."""
        return tuple(path for path, row in self.items() if row.kind == "invariant")
