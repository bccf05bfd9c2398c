"""The figures of `experiments.imagenet`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.alt_text import line_ends
from bn_research.claims.figures import PALETTE, Figure, band, new_figure, save_all
from bn_research.claims.judging import Record
from bn_research.claims.plots import padded, reference
from experiments.imagenet import Config
from experiments.imagenet.verdicts import PUBLISHED, claim_id


def draw(config: Config, records: Sequence[Record], folder: Path) -> list[Figure]:
    """All figures, in the order of the report."""
    return save_all([_accuracy, _loss], folder, config, records)


def _accuracy(config: Config, records: Sequence[Record]) -> Any:
    fig, axis = new_figure()
    steps = np.arange(1, config.num_steps // config.evaluate_every + 1) * config.evaluate_every
    curves = [[100 * seen["accuracy"] for seen in record["curve"]] for record in records]
    measured = f"measured, {config.setting}"
    band(axis, steps, padded(curves, len(steps)), label=measured, color=PALETTE.blue)
    caption = f"Mean and range of {len(records)} seed(s), on the whole evaluation split."
    if config.dataset == "imagenet2012":
        name, best, _ = PUBLISHED[config.setting]
        look: dict[str, Any] = dict(color=PALETTE.black, linewidth=1.5, label="published, best")
        reference(axis, y=100 * best, **look)
        caption += f" Dashed: the best that the paper reports of {name}."
    axis.set(xlabel="steps", ylabel="top-1 accuracy (%)")
    axis.legend(frameon=False)
    return fig, dict(
        title=f"Top-1 accuracy on {config.dataset}",
        alt="Top-1 accuracy in per cent against training steps, from first to last: "
        f"{line_ends(axis)}.",
        caption=caption,
        claims=(claim_id(config.setting),),
    )


def _loss(config: Config, records: Sequence[Record]) -> Any:
    """Training loss."""
    fig, axis = new_figure()
    steps = np.arange(1, config.num_steps // config.steps_per_dispatch + 1)
    steps *= config.steps_per_dispatch
    losses = padded([record["loss"] for record in records], len(steps))
    band(axis, steps, losses, label=config.setting, color=PALETTE.vermillion)
    axis.set(xlabel="steps", ylabel="training loss (nats)", yscale="log")
    return fig, dict(
        alt="Training loss in nats against training steps on a log axis, from first to last: "
        f"{line_ends(axis)}.",
        caption=f"Mean over {config.steps_per_dispatch} steps; line and band: mean and range of "
        f"{len(records)} seed(s).",
    )
