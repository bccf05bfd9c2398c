"""An audit of scale invariance as a figure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bn_research.claims.figures import PALETTE, Figure, new_figure, save_figure, shared_legend
from bn_research.probes.scale_invariance.rows import Rows
from bn_research.probes.scale_invariance.table import verdict

_LOOKS = {
    "invariant": (PALETTE.blue, "o"),
    "no effect": (PALETTE.black, "x"),
    "only in a group": (PALETTE.green, "s"),
    "homogeneous": (PALETTE.purple, "D"),
    "not invariant": (PALETTE.vermillion, "^"),
}
_NAMED = 80  # leaves, above which the figure numbers them
_FLOOR = 1e-9  # where a share of zero is drawn


def draw(audit: Rows, path: str | Path, learning_rate: float) -> Figure:
    """See `Audit.figure`."""
    rows = list(audit.values())
    named = len(rows) <= _NAMED
    fig, axes = new_figure(columns=2, width=7.6, height=1.6 + 0.17 * min(len(rows), _NAMED))
    places = np.arange(len(rows))
    kinds = np.array([verdict(audit, row) for row in rows])
    shares = np.array(
        [max(abs(row.radial_share), _FLOOR) if row.norm else np.nan for row in rows]
    )  # a parameter of zeros has no direction
    rates = np.array([row.effective_learning_rate(learning_rate) for row in rows])
    for kind, (color, marker) in _LOOKS.items():
        chosen = kinds == kind
        if not chosen.any():
            continue
        for axis, values in zip(axes, (shares, rates), strict=True):
            shown = chosen & np.isfinite(values)
            axis.plot(values[shown], places[shown], marker, color=color, markersize=5, label=kind)
    axes[0].axvline(audit.pooled_limit, color="#777777", linestyle=":")
    for axis, label in zip(axes, ("|⟨w, g⟩| / (‖w‖‖g‖)", "η/‖w‖²"), strict=True):
        axis.set_xscale("log")
        axis.set_xlabel(label)
        low, high = np.log10(axis.get_xlim())
        axis.set_xlim(10 ** np.floor(low), 10 ** np.ceil(high))
        axis.xaxis.set_minor_formatter("")
        axis.set_ylim(len(rows) - 0.5, -0.5)
        if axis is axes[0] and named:
            axis.set_yticks(places, [row.path or "params" for row in rows], fontsize=7.5)
        elif axis is axes[0]:
            axis.set_ylabel("leaf, in the order of the tree")
        else:
            axis.tick_params(labelleft=False)
    shared_legend(fig)
    fig.set_layout_engine(
        "constrained", wspace=0.06
    )  # the outermost ticks of two panels would touch
    return save_figure(
        fig,
        path,
        title="Which weights are scale-invariant",
        alt=f"Radial share of the gradient and effective learning rate of {len(rows)} parameters: "
        + _counts(kinds),
        caption="Left: share of the gradient that points along the parameter; that of an "
        "invariant one is rounding (dotted: the limit of its pooled share; zero is drawn at "
        f"{_FLOOR:g}), and the gradient of one without effect is nothing but rounding. Right: the "
        f"effective learning rate at η = {learning_rate:g}. Parameters of norm 0 have neither.",
    )


def _counts(kinds: Sequence[str] | np.ndarray) -> str:
    names, counts = np.unique(kinds, return_counts=True)
    return ", ".join(f"{count} {name}" for name, count in zip(names, counts, strict=True)) + "."
