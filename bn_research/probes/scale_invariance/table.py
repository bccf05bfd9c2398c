"""An audit of scale invariance as a table for a terminal."""

import numpy as np

from bn_research.claims.formatting import aligned
from bn_research.probes.scale_invariance.rows import Row, Rows


def verdict(audit: Rows, row: Row) -> str:
    """Kind of a leaf, one of those that the figure tells apart."""
    if row.scale_invariant:
        return row.kind
    if any(row.path in group for group in audit.groups):
        return "only in a group"
    return "homogeneous" if row.kind == "homogeneous" else "not invariant"


def as_table(audit: Rows, learning_rate: float) -> str:
    """See `Audit.table`."""
    head = ("parameter", "scale", "degree", "deviation", "pooled", "radial", "‖w‖", "‖g‖", "η/‖w‖²")
    cells = [
        (
            row.path or "params",
            verdict(audit, row),
            "–" if np.isnan(row.degree) else f"{row.degree:.3g}",
            f"{row.deviation:.1e}",
            _pooled(audit, row),
            f"{row.radial_share:+.1e}",
            f"{row.norm:.3g}",
            f"{row.gradient_norm:.3g}",
            f"{row.effective_learning_rate(learning_rate):.3g}",
        )
        for row in audit.values()
    ]
    lines = aligned([head, *cells], left=2)
    lines.append(
        f"invariant: deviation ≤ {audit.tolerance:.0e} and pooled ⟨w, g⟩/(‖w‖‖g‖) ≤ "
        f"{audit.pooled_limit:.0e}, or what stands beside it"
    )
    for group in audit.groups:
        lines.append(f"invariant only together: {', '.join(group)}")
    decayed = audit.decay_sets_only_the_rate
    lines.append(
        f"weight decay only sets the learning rate of: {', '.join(decayed) if decayed else 'none'}"
    )
    return "\n".join(lines)


def _pooled(audit: Rows, row: Row) -> str:
    own = row.pooled_limit > audit.pooled_limit
    limit = f" (≤ {row.pooled_limit:.0e})" if own else ""
    return f"{row.pooled_share:.1e}{limit}"
