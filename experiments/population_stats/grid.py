"""The grid of `experiments.population_stats`: cells of step, batch size and rate, over seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_research.claims.estimate import Estimate, estimate
from experiments.population_stats.measurements import ALGORITHM2, average

LEVELS = ("low", "high")  # of the rate
Records = Sequence[Mapping[str, Any]]


class Cell(NamedTuple):
    """A place of the grid over which the claims are decided."""

    batch_size: int
    level: str
    step: int


class Grid(NamedTuple):
    """Records of the grid by cell and seed, and what was left out."""

    cells: Mapping[Cell, Records]
    lost: list[Cell]  # where the run of a seed had non-finite steps, for all seeds


def distance(parts: Any) -> float:
    """The distance d of a network from its parts of d², see `population_stats_measurements`.

    Args:
      parts: [layers][of means, of ln σ].
    """
    return math.sqrt(float(np.mean(np.sum(parts, axis=1))))


def floor(runs: Records) -> Estimate:
    """Algorithm 2's, of a cell: the root of the mean over seeds of d², and of its interval's ends.

    What is below 0 counts as 0; a floor whose interval begins there is not resolved.
    """
    squared = estimate([float(np.mean(np.sum(run["floor"][ALGORITHM2], axis=1))) for run in runs])
    mean, low, high = (math.sqrt(max(0.0, end)) for end in squared[:3])
    return Estimate(mean, low, high, squared.count)


def grid(records: Records, *, decay: bool = False) -> Grid:
    """The records at a constant rate, or those of the control with decay, by cell.

    A cell with a run that had non-finite steps is left out for every seed, so that none of the
    others is decided by the seeds that were lucky.
    """
    cells: dict[Cell, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["decay"] == decay:
            cell = Cell(record["batch_size"], record["level"], record["step"])
            cells.setdefault(cell, []).append(record)
    lost = [cell for cell, runs in cells.items() if any(map(_is_lost, runs))]
    kept = {
        cell: sorted(cells[cell], key=lambda run: run["seed"])
        for cell in sorted(cells)
        if cell not in lost
    }
    return Grid(kept, sorted(lost))


def _is_lost(run: Mapping[str, Any]) -> bool:
    parts = [part for layers in run["parts"].values() for layer in layers for part in layer]
    return run["diverged"] > 0 or None in parts


def log_ratios(cells: Mapping[Cell, Records], kind: str, other: str) -> np.ndarray:
    """Logarithm of the distance of a kind over that of another, [seeds, cells]."""
    distances = np.array(
        [
            [[distance(run["parts"][k]) for run in runs] for runs in cells.values()]
            for k in (kind, other)
        ]
    )
    numerator, denominator = np.log(distances)
    return (numerator - denominator).T


def gains(cells: Mapping[Cell, Records], momentum: float) -> np.ndarray:
    """Test accuracy by Algorithm 2 minus that by the average, [seeds, cells]."""
    return np.array(
        [
            [run["accuracy"][ALGORITHM2] - run["accuracy"][average(momentum)] for run in runs]
            for runs in cells.values()
        ]
    ).T


def best_momentum(cells: Mapping[Cell, Records], momenta: Sequence[float]) -> float:
    """The momentum whose average has the smallest geometric mean distance over the cells."""
    return min(momenta, key=lambda m: float(np.mean(log_ratios(cells, average(m), ALGORITHM2))))


def best_in_each_cell(cells: Mapping[Cell, Records], momenta: Sequence[float]) -> np.ndarray:
    """Logarithm of distance over Algorithm 2's, [seeds, cells], of each cell's best momentum.

    Best by its mean over the seeds: it favours the average as far as hindsight can.
    """
    ratios = np.stack([log_ratios(cells, average(m), ALGORITHM2) for m in momenta])
    chosen = np.argmin(ratios.mean(axis=1), axis=0)
    return np.take_along_axis(ratios, chosen[None, None, :], axis=0)[0]
