"""The figures of `experiments.imagenet`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.alt_text import line_ends
from bn_research.claims.figures import PALETTE, Figure, band, new_figure, save_figure


def draw(
    config: Any,
    curves: list[list[dict]],
    runs: list[dict],
    published: Mapping[str, Any],
    folder: Path,
) -> list[Figure]:
    """All figures, in the order of the report.

    Args:
      config: of the run.
      curves: records of the evaluations of each seed, in the order of their steps.
      runs: record of each seed, with the mean loss of each dispatch.
      published: setting -> what the paper reports of it.
      folder: where the PNG files go.
    """
    return [
        _draw_accuracy(config, curves, published[config.setting], folder / "accuracy.png"),
        _draw_loss(config, runs, folder / "loss.png"),
    ]


def _draw_accuracy(config, curves, published, path):
    fig, axis = new_figure()
    steps = np.arange(1, config.num_steps // config.evaluate_every + 1) * config.evaluate_every
    table = np.full((len(curves), len(steps)), math.nan)
    for row, curve in zip(table, curves, strict=True):
        row[: len(curve)] = [100 * record["accuracy"] for record in curve]
    band(axis, steps, table, label=f"measured, {config.setting}", color=PALETTE.blue)
    caption = f"Mean and range of {len(curves)} seed(s), on the whole evaluation split."
    if config.dataset == "imagenet2012":
        axis.axhline(
            100 * published.top1, color=PALETTE.black, linestyle="--", label="published, best"
        )
        caption += f" Dashed: the best that the paper reports of {published.label}."
    axis.set(xlabel="steps", ylabel="top-1 accuracy (%)")
    axis.legend(frameon=False)
    return save_figure(
        fig,
        path,
        title=f"Top-1 accuracy on {config.dataset}",
        alt=f"Top-1 accuracy in per cent against training steps, from first to last: "
        f"{line_ends(axis)}.",
        caption=caption,
        claims=(f"imagenet-{config.setting.replace('_', '-')}",),
    )


def _draw_loss(config, runs, path):
    fig, axis = new_figure()
    points = config.num_steps // config.steps_per_dispatch
    steps = np.arange(1, points + 1) * config.steps_per_dispatch
    table = np.full((len(runs), points), math.nan)
    for row, run in zip(table, runs, strict=True):
        row[: len(run["loss"])] = [math.nan if loss is None else loss for loss in run["loss"]]
    band(axis, steps, table, label=config.setting, color=PALETTE.vermillion)
    axis.set(xlabel="steps", ylabel="training loss (nats)", yscale="log")
    return save_figure(
        fig,
        path,
        title="Training loss",
        alt=f"Training loss in nats against training steps on a log axis, from first to last: "
        f"{line_ends(axis)}.",
        caption=f"Mean over {config.steps_per_dispatch} steps; line and band: mean and range of "
        f"{len(runs)} seed(s).",
    )
