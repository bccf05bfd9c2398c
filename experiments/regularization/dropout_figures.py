"""The figures of `experiments.regularization` about dropout and BN."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.alt_text import line_ends
from bn_research.claims.estimate import Estimate, estimate, paired_difference
from bn_research.claims.figures import PALETTE, Figure, new_figure, save_figure, shared_legend
from bn_research.claims.formatting import format_number
from bn_research.models.cnn import DROPOUT_PLACEMENTS
from experiments.regularization.dropout_verdicts import CELLS, gains

Records = Sequence[Mapping[str, Any]]

_GREY = "#777777"
_NETWORKS = (
    ("none", "without BN", PALETTE.vermillion, "s"),
    ("batch", "with BN", PALETTE.blue, "o"),
)
_LOOKS = {
    "before": ("before every BN", PALETTE.vermillion, "v"),
    "after": ("after every activation", PALETTE.orange, "s"),
    "last": ("after the last hidden layer", PALETTE.blue, "o"),
}


def draw(config: Any, records: Mapping[str, Records], folder: Path) -> list[Figure]:
    """All figures, in the order of the report.

    Args:
      config: of the run.
      records: of `regularization_dropout.measure`.
      folder: where the PNG files go.
    """
    return [
        _draw_need(config, records, folder / "dropout.png"),
        _draw_shift(config, records, folder / "variance_shift.png"),
    ]


def tuned_curve(tuning: Records, norm: str) -> list[dict[str, float]]:
    """For each dropout rate, at its learning rate of the best validation accuracy: mean over seeds.

    Args:
      tuning: records of the trainings that settings are chosen by.
      norm: of the curve's network.

    Returns:
      Dropout rate, validation and test accuracy, training loss; ordered by the first.
    """
    curve = []
    for dropout in sorted({record["dropout"] for record in tuning}):
        found = [r for r in tuning if (r["norm"], r["dropout"]) == (norm, dropout)]
        means = [
            {
                "dropout": dropout,
                **{
                    key: float(np.mean([r[key] for r in found if r["rate"] == rate], dtype=float))
                    for key in ("validation_accuracy", "test_accuracy", "train_loss")
                },
            }
            for rate in sorted({record["rate"] for record in found})
        ]
        curve.append(max(means, key=lambda mean: mean["validation_accuracy"]))
    return curve


def _draw_need(config, records, path) -> Figure:
    fig, (top, middle, bottom) = new_figure(rows=3, width=5.0, height=8.6)
    for norm, name, color, marker in _NETWORKS:
        curve = tuned_curve(records["tuning"], norm)
        x = [point["dropout"] for point in curve]
        look = dict(color=color, marker=marker, markersize=5)
        top.plot(x, [100 * p["test_accuracy"] for p in curve], label=name, **look)
        middle.plot(x, [point["train_loss"] for point in curve], label=name, **look)
        _mark_cells(top, records["cells"], norm, look)
    top.set_ylabel("test accuracy, %")
    middle.set_ylabel("training loss, nats")
    middle.set_yscale("log")
    for axis in (top, middle):
        axis.set_xlabel("dropout rate (tuning runs)")
    plain, bn, interaction = gains(records["cells"])
    rows = (
        ("with BN", bn, PALETTE.blue),
        ("without BN", plain, PALETTE.vermillion),
        ("without − with", interaction, PALETTE.black),
    )
    _intervals(bottom, [(name, found, color) for name, found, color in rows])
    bottom.set_xlabel("gain of dropout in test accuracy, points")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="What dropout gains with BN and without",
        alt="Against the dropout rate, from none to the most: test accuracy in per cent, "
        f"{line_ends(top)}; training loss, {line_ends(middle)}. Below, the gain of dropout in "
        "points of test accuracy, with intervals: "
        f"{'; '.join(f'{name}: {100 * found.mean:.2g}' for name, found, _ in rows)}.",
        caption=f"{config.dataset}, {config.dropout_network}, {config.dropout_examples} training "
        f"examples, batch {config.dropout_batch_size}. Above: mean of "
        f"{config.dropout_tuning_seeds} tuning seeds, each dropout rate at its learning rate of "
        "the best validation accuracy; in inference mode. Open marks, and below: the cells at "
        f"their best rates, {config.dropout_seeds} other seeds; bars: 95 % intervals.",
        claims=("less-need-for-dropout",),
    )


def _mark_cells(axis, records, norm, look) -> None:
    """The two cells of a network, at their dropout rates, with their intervals over seeds."""
    for cell in CELLS:
        if cell.norm != norm:
            continue
        of_cell = [record for record in records if cell.holds(record)]
        found = estimate([100 * record["test_accuracy"] for record in of_cell])
        half = found.high - found.mean
        axis.errorbar(
            of_cell[0]["dropout"] + (0.008 if norm == "batch" else -0.008),
            found.mean,
            yerr=half if np.isfinite(half) else None,
            **{**look, "markersize": 9},
            markerfacecolor="none",
            linestyle="none",
            elinewidth=1.6,
            capsize=3,
        )


def _intervals(axis, rows: Sequence[tuple[str, Estimate, str]]) -> None:
    """A row for each estimate, in points of per cent, with its interval."""
    for row, (_, found, color) in enumerate(rows):
        mean, low, high = 100 * found.mean, 100 * found.low, 100 * found.high
        if np.isfinite(low):
            axis.plot([low, high], [row, row], color=color, linewidth=2.2)
        axis.plot(mean, row, "o", color=color, markersize=7)
    axis.axvline(0, color=_GREY, linestyle="--", linewidth=1.2)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)


def _draw_shift(config, records, path) -> Figure:
    fig, (top, bottom) = new_figure(rows=2, width=5.0, height=6.4)
    rows, offsets = [], (-0.12, 0.0, 0.12)
    dropout = records["shift"][0]["dropout"]
    for placement, offset in zip(DROPOUT_PLACEMENTS, offsets, strict=True):
        name, color, marker = _LOOKS[placement]
        found = [r for r in records["shift"] if r["dropout_placement"] == placement]
        ratios = np.array([record["ratio"] for record in found], float)
        layers = np.arange(1, ratios.shape[1] + 1)
        mean = ratios.mean(axis=0)
        top.errorbar(
            layers + offset,
            mean,
            yerr=[mean - ratios.min(axis=0), ratios.max(axis=0) - mean],
            color=color,
            marker=marker,
            markersize=6,
            linewidth=1.2,
            label=name,
        )
        if placement == "before":
            closed = np.mean([record["closed_form"] for record in found], axis=0, dtype=float)
            top.plot(
                layers + offset,
                closed,
                linestyle="none",
                marker="_",
                markersize=18,
                markeredgewidth=1.6,
                color=_GREY,
                label="before: closed form",
            )
        off, on = ([r[key] for r in found] for key in ("off_accuracy", "test_accuracy"))
        rows.append((name, paired_difference(off, on), color))
    top.axhline(1, color=_GREY, linestyle="--", linewidth=1.2)
    top.set_yscale("log", base=2)
    ticks = [2.0**k for k in range(int(np.floor(np.log2(top.get_ylim()[0]))), 1)]
    top.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    top.minorticks_off()
    top.set_xticks(layers, [str(layer) for layer in layers])
    top.set_xlabel("BN layer")
    top.set_ylabel("variance, inference / statistics")
    _intervals(bottom, rows)
    bottom.set_xlabel("accuracy lost to the shift, points")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Dropout below a BN layer makes its statistics wrong",
        alt="Above, variance of each BN layer's input in inference over that of its statistics, "
        "for three placements of dropout: below 1 where dropout is below the layer, 1 where it is "
        "not. Below, the test accuracy that this costs, with intervals.",
        caption=f"{config.dataset}, {config.dropout_network}, BN on the hidden layers, dropout "
        f"rate {format_number(dropout)}. Above: median over units, mean of {config.seeds} seeds; "
        "bars from lowest to highest seed; grey: (1 − p)·Var/(Var + p·mean²) of the pre-activation "
        "in training, for the dropout right before BN alone. Below: test accuracy by statistics "
        "taken anew with dropout off less that by statistics taken with it on; bars: 95 % "
        "intervals.",
        claims=("dropout-before-bn-shifts-variance",),
    )
