"""Groups of leaves to whose common scale a loss is invariant, from its slopes alone.

Let r_i = ⟨w_i, ∂L/∂w_i⟩ = ∂L/∂log‖w_i‖. The loss is invariant when every leaf i is scaled by
a^{x_i} exactly where Σ x_i·r_i = 0 at every point. So the slopes at as many points as there are
leaves, one point a row, have a null space that holds every such x. A group to be scaled by one
factor is an x of zeros and ones; the smallest that holds leaf i is a linear program, minimize Σ x
over x ≥ 0 in the null space with x_i = 1, whose solutions lie at vertices, so are sparse.
"""

import numpy as np
from jaxtyping import Float

_RANK_TOLERANCES = (1e-4, 1e-3, 1e-2)  # of singular values: rounding and BN's ε leave more than 0
_NEGATIVE = 0.02  # how far below 0 rounding may take an x_i
_WHOLE = 0.15  # how far from 0 or 1


def smallest_groups(slopes: Float[np.ndarray, "points leaves"]) -> list[tuple[int, ...]]:
    """Proposes groups of two leaves and more, sorted.

    Noisy slopes can hide a group or propose a false one: confirm each by scaling it.

    Args:
      slopes: r_i at random points, at least as many as leaves.
    """
    if slopes.shape[1] < 2:
        return []
    found: set[tuple[int, ...]] = set()
    for tolerance in _RANK_TOLERANCES:
        null_space = _null_space(slopes, tolerance)
        for leaf in range(slopes.shape[1]) if null_space.size else ():
            x = _smallest_holding(leaf, null_space)
            if x is None:
                continue
            whole = np.round(x)
            if np.all(np.abs(x - whole) <= _WHOLE) and set(whole) <= {0.0, 1.0}:
                found.add(tuple(int(i) for i in np.flatnonzero(whole)))
    return sorted(group for group in found if len(group) > 1)


def _null_space(slopes: np.ndarray, tolerance: float) -> Float[np.ndarray, "leaves dimensions"]:
    """Basis of the x with slopes @ x ≈ 0, from slopes whose rows and columns are of like size."""
    rows = np.max(np.abs(slopes), axis=1, keepdims=True)
    slopes = slopes / np.where(rows > 0, rows, 1)
    columns = np.sqrt(np.mean(np.square(slopes), axis=0))
    columns = np.where(columns > 0, columns, 1)
    _, values, vectors = np.linalg.svd(slopes / columns)
    rank = int(np.sum(values > tolerance * values[0])) if len(values) else 0
    return vectors[rank:].T / columns[:, None]


def _smallest_holding(leaf: int, null_space: np.ndarray) -> np.ndarray | None:
    """The x ≥ 0 of the null space with x[leaf] = 1 and the least sum; None without one."""
    from scipy.optimize import linprog  # a quarter of a second to import

    basis = null_space / np.linalg.norm(null_space, axis=0)
    result = linprog(
        basis.sum(axis=0),
        A_ub=-basis,
        b_ub=np.full(len(basis), _NEGATIVE),
        A_eq=basis[leaf : leaf + 1],
        b_eq=[1.0],
        bounds=(None, None),
    )
    return basis @ result.x if result.status == 0 else None
