"""The claims of `experiments.population_stats`, and how records of trainings decide them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Finding
from experiments.population_stats.grid import (
    LEVELS,
    Cell,
    Records,
    best_in_each_cell,
    best_momentum,
    distance,
    floor,
    gains,
    grid,
    log_ratios,
)
from experiments.population_stats.measurements import (
    ALGORITHM2,
    MERGED,
    average,
    start_removed,
    unbiased,
)
from experiments.population_stats.training import Rates, trains

CLAIMS = (
    Claim(
        id="population-beats-ema",
        statement="Algorithm 2's population statistics are closer to the truth than a moving "
        "average",
        source="Paper section 3.1; Wu & Johnson (2021), arXiv 2105.07576",
        criterion="Distance to the statistics of the full training set, of the moving average over "
        "that of Algorithm 2, paired by seed: geometric mean over all steps measured, early to "
        "late, batch sizes, and low and high rate; the average is that of the momentum with the "
        "smallest distance over this grid. Reproduced if the interval over seeds lies above 1; not "
        "reproduced if it lies below: the average is closer",
        expected="a ratio above 1, largest early and at a high rate",
    ),
    Claim(
        id="population-statistics-classify-better",
        statement="Inference by Algorithm 2's population statistics has a higher test accuracy "
        "than by a moving average",
        source="Wu & Johnson (2021), arXiv 2105.07576, section 3: an average is not stable early "
        "and at large batches; the grid is this project's",
        criterion="Test accuracy by Algorithm 2 minus that by the average of the first claim's "
        "momentum, paired by seed, mean over the same grid. Reproduced if the interval over seeds "
        "lies above 0; not reproduced if it lies below",
        expected="a difference above 0 early, about 0 late at a low rate",
    ),
)


def judge(
    config: Any, records: Records, rates: Mapping[int, Rates], num_classes: int
) -> list[Finding]:
    """Both findings.

    Args:
      config: of the run.
      records: of all its trainings but those of tuning.
      rates: of each batch size.
      num_classes: of the data set.
    """
    cells, lost = grid(records)
    if not cells:
        note = "in every cell of the grid a run had non-finite steps"
        return [Finding(claim, {}, None, INCONCLUSIVE, note) for claim in CLAIMS]
    momentum = best_momentum(cells, config.momenta)
    controls, lost_controls = grid(records, decay=True)
    common = _common_note(config, rates, lost, lost_controls)
    long = [run for runs in cells.values() for run in runs if run["step"] == max(config.snapshots)]
    stuck = sum(not trains(run, num_classes) for run in long)
    if stuck:
        common += (
            f". Of {len(long)} runs to step {max(config.snapshots)}, {stuck} do not train (loss "
            "not below half of ln C) and count all the same"
        )
    return [
        _judge_distance(config, cells, controls, momentum, common),
        _judge_accuracy(config, cells, controls, momentum, common),
    ]


def _judge_distance(config, cells, controls, momentum, common) -> Finding:
    """population-beats-ema."""
    best = average(momentum)
    ratio = _ratio(cells, best, ALGORITHM2)
    measured = _with_interval(f"{best}/{ALGORITHM2}", ratio)
    for name, where in _subsets(config, cells).items():
        measured |= _with_interval(f"{best}/{ALGORITHM2}, {name}", _ratio(where, best, ALGORITHM2))
    last = max(config.snapshots)
    late = {cell: runs for cell, runs in cells.items() if cell.step == last}
    for where, of in ((cells, "each cell"), (late, f"each cell of step {last}")):
        if where:
            ratios = best_in_each_cell(where, config.momenta)
            name = f"average/{ALGORITHM2}, best momentum in {of}"
            measured |= _with_interval(name, _geometric(ratios))
    for m in config.momenta:
        for kind in (average(m), start_removed(m), unbiased(m)):
            measured |= _with_interval(f"{kind}/{ALGORITHM2}", _ratio(cells, kind, ALGORITHM2))
            if late:
                name = f"{kind}/{ALGORITHM2}, all cells of step {last}"
                measured |= _with_interval(name, _ratio(late, kind, ALGORITHM2))
    for (cell, runs), m in itertools.product(controls.items(), config.momenta):
        name = f"{average(m)}/{ALGORITHM2}, batch {cell.batch_size}, rate decayed to 0"
        measured |= _with_interval(name, _ratio({cell: runs}, average(m), ALGORITHM2))
    measured |= _with_interval(f"{ALGORITHM2}/{MERGED}", _ratio(cells, ALGORITHM2, MERGED))
    for cell, runs in cells.items():
        place = f"batch {cell.batch_size}, {cell.level} rate, step {cell.step}"
        for kind in (ALGORITHM2, best):
            found = [distance(run["parts"][kind]) for run in runs]
            measured[f"distance, {kind}, {place}"] = float(np.mean(found))
        if cell in late:
            measured |= _with_interval(f"floor, {ALGORITHM2}, {place}", floor(runs))
    note = (
        f"interval: of the geometric mean ratio over {len(cells)} cells, for momentum "
        f"{momentum:g}, the best of {', '.join(f'{m:g}' for m in config.momenta)} in hindsight; "
        f"{ALGORITHM2} from {config.population_batches} batches, drawn independently. "
        f"{_closer(cells, config.momenta)}. Floor: what two halves of "
        f"{config.most_population_batches} batches have in common, which more batches do not "
        f"remove: {ALGORITHM2} normalizes the layers below by each batch, the truth by the whole "
        f"set. {common}"
    )
    return Finding(CLAIMS[0], measured, ratio.interval, _verdict(ratio, 1.0), note)


def _judge_accuracy(config, cells, controls, momentum, common) -> Finding:
    """population-statistics-classify-better."""
    best = average(momentum)
    gain = _gain(cells, momentum)
    measured = _with_interval(f"{ALGORITHM2} − {best}", gain)
    for name, where in _subsets(config, cells).items():
        measured |= _with_interval(f"{ALGORITHM2} − {best}, {name}", _gain(where, momentum))
    for m in config.momenta:
        if m != momentum:
            measured |= _with_interval(f"{ALGORITHM2} − {average(m)}", _gain(cells, m))
    for (cell, runs), m in itertools.product(controls.items(), config.momenta):
        name = f"{ALGORITHM2} − {average(m)}, batch {cell.batch_size}, rate decayed to 0"
        measured |= _with_interval(name, _gain({cell: runs}, m))
    for cell, runs in cells.items():
        place = f"batch {cell.batch_size}, {cell.level} rate, step {cell.step}"
        for kind in ("truth", ALGORITHM2, best):
            found = [run["accuracy"][kind] for run in runs]
            measured[f"test accuracy, {kind}, {place}"] = float(np.mean(found))
    note = (
        f"interval: of the mean difference over {len(cells)} cells, for momentum {momentum:g}. "
        f"Truth: the statistics of the full training set. {common}"
    )
    return Finding(CLAIMS[1], measured, gain.interval, _verdict(gain, 0.0), note)


def _subsets(config: Any, cells: Mapping[Cell, Records]) -> dict[str, dict[Cell, Records]]:
    """Parts of the grid, by name: early and late, each level, each step and each batch size."""
    first, last = min(config.snapshots), max(config.snapshots)
    names = {
        **{f"step {step}": (None, None, step) for step in config.snapshots},
        **{f"{level} rate": (None, level, None) for level in LEVELS},
        **{f"batch {size}": (size, None, None) for size in config.batch_sizes},
        **{
            f"{level} rate, step {step}": (None, level, step)
            for level, step in itertools.product(LEVELS, (first, last))
        },
    }
    found = {
        name: {
            cell: runs
            for cell, runs in cells.items()
            if all(want in (None, has) for want, has in zip(wanted, cell, strict=True))
        }
        for name, wanted in names.items()
    }
    return {name: where for name, where in found.items() if where}


def _closer(cells: Mapping[Cell, Records], momenta: Sequence[float]) -> str:
    """Says in which cells an average is surely closer than Algorithm 2."""
    said = []
    for momentum in momenta:
        ratios = log_ratios(cells, average(momentum), ALGORITHM2)
        won = [cell for cell, row in zip(cells, ratios.T, strict=True) if estimate(row).high < 0]
        steps: dict[str, list[str]] = {}
        for cell in won:
            where = f"batch {cell.batch_size} {cell.level} rate"
            steps.setdefault(where, []).append(str(cell.step))
        listed = "; ".join(f"{where}, step {', '.join(s)}" for where, s in steps.items())
        said.append(
            f"{average(momentum)} in {len(won)} of {len(cells)} cells"
            + (f" ({listed})" if won else "")
        )
    return "A moving average is surely closer, by each cell's own interval: " + "; ".join(said)


def _common_note(
    config: Any,
    rates: Mapping[int, Rates],
    lost: Sequence[Cell],
    lost_controls: Sequence[Cell],
) -> str:
    """What both notes say."""
    shown = "; ".join(
        f"batch {size}: low {r.low:g}, best {r.best:g}, high {r.high:g}"
        for size, r in sorted(rates.items())
    )
    note = f"Rates: {shown}"
    ends = (min(config.learning_rates), max(config.learning_rates))
    at_end = [str(size) for size, r in sorted(rates.items()) if r.best in ends]
    note += f". Best rate at an end of the grid: batch {', '.join(at_end)}" if at_end else ""
    same = [str(size) for size, r in sorted(rates.items()) if r.high == r.best]
    note += (
        f". High is the best where no higher rate trains: batch {', '.join(same)}" if same else ""
    )
    left_out = [f"batch {c.batch_size} {c.level} rate step {c.step}" for c in lost]
    left_out += [f"batch {c.batch_size} rate decayed to 0" for c in lost_controls]
    if left_out:
        note += f". Left out, since a run had non-finite steps: {'; '.join(left_out)}"
    return note


def _verdict(found: Estimate, neutral: float) -> str:
    if found.low > neutral:
        return REPRODUCED
    return NOT_REPRODUCED if found.high < neutral else INCONCLUSIVE


def _ratio(cells: Mapping[Cell, Records], kind: str, other: str) -> Estimate:
    """Geometric mean over cells and seeds, with the interval over seeds."""
    return _geometric(log_ratios(cells, kind, other))


def _geometric(log_ratios: np.ndarray) -> Estimate:
    found = estimate(log_ratios.mean(axis=1))
    mean, low, high = (float(np.exp(x)) for x in found[:3])
    return Estimate(mean, low, high, found.count)


def _gain(cells: Mapping[Cell, Records], momentum: float) -> Estimate:
    return estimate(gains(cells, momentum).mean(axis=1))


def _with_interval(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.mean, f"{name}, low": found.low, f"{name}, high": found.high}
