"""The claims of `experiments.population_stats`, and how records of trainings decide them.

Both are decided over a grid, whose cells are a batch size, a level of the rate and a step.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate
from bn_research.claims.finding import INCONCLUSIVE, Finding, verdict_of
from bn_research.claims.judging import Record, at_end, by_seed, listed, numbers, with_intervals
from experiments.population_stats import Config
from experiments.population_stats.statistics import ALGORITHM2, MERGED, TRUTH, average, averages
from experiments.population_stats.training import LEVELS, Rates, Records, trains

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


class Cell(NamedTuple):
    """A place of the grid over which the claims are decided."""

    batch_size: int
    level: str
    step: int

    def __str__(self) -> str:
        """As the names of numbers have it."""
        return f"batch {self.batch_size}, {self.level} rate, step {self.step}"


Cells = Mapping[Cell, Sequence[Record]]


def grid(records: Iterable[Record], *, decay: bool = False) -> tuple[Cells, list[Cell]]:
    """The records at a constant rate, or of the control with decay, by cell; and cells left out.

    A cell with a run that had non-finite steps is left out for every seed, so that none of the
    others is decided by the seeds that were lucky.
    """
    cells: dict[Cell, list[Record]] = {}
    for record in by_seed(records, decay=decay):
        cells.setdefault(Cell(*(record[field] for field in Cell._fields)), []).append(record)
    lost = [cell for cell in sorted(cells) if any(map(_is_lost, cells[cell]))]
    return {cell: cells[cell] for cell in sorted(cells) if cell not in lost}, lost


def _is_lost(run: Record) -> bool:
    return run["diverged"] > 0 or None in np.ravel([*run["parts"].values()])


def part(cells: Cells, **fields: Any) -> Cells:
    """The cells that have these fields."""
    return {c: runs for c, runs in cells.items() if fields.items() <= c._asdict().items()}


def table(cells: Cells, pick: Callable[[Record], Any]) -> np.ndarray:
    """A number of each run, [seeds, cells]."""
    return np.array([numbers(runs, pick) for runs in cells.values()]).T


def distance(parts: Any) -> float:
    """The distance d of a network from its parts of d², [layers][of means, of ln σ]."""
    return math.sqrt(float(np.mean(np.sum(parts, axis=1))))


def distance_of(kind: str) -> Callable[[Record], float]:
    """The distance of a kind of statistics, as a function of the record."""
    return lambda run: distance(run["parts"][kind])


def accuracy_by(kind: str) -> Callable[[Record], float]:
    """Likewise the test accuracy by it."""
    return lambda run: run["accuracy"][kind]


def floor(runs: Sequence[Record]) -> Estimate:
    """Algorithm 2's, of a cell: the root of the mean over seeds of d², and of its interval's ends.

    What is below 0 counts as 0; a floor whose interval begins there is not resolved.
    """
    squared = [float(np.mean(np.sum(run["floor"][ALGORITHM2], axis=1))) for run in runs]
    return estimate(squared).mapped(lambda end: math.sqrt(max(0.0, end)))


def log_ratios(cells: Cells, kind: str, other: str = ALGORITHM2) -> np.ndarray:
    """Logarithm of the distance of a kind over that of another, [seeds, cells]."""
    return np.log(table(cells, distance_of(kind))) - np.log(table(cells, distance_of(other)))


def best_momentum(cells: Cells, momenta: Sequence[float]) -> float:
    """The momentum whose average has the smallest geometric mean distance over the cells."""
    return min(momenta, key=lambda m: float(np.mean(log_ratios(cells, average(m)))))


def best_in_each_cell(cells: Cells, momenta: Sequence[float]) -> np.ndarray:
    """Logarithm of distance over Algorithm 2's, [seeds, cells], of each cell's best momentum.

    Best by its mean over the seeds: it favours the average as far as hindsight can.
    """
    ratios = np.stack([log_ratios(cells, average(m)) for m in momenta])
    chosen = np.argmin(ratios.mean(axis=1), axis=0)
    return np.take_along_axis(ratios, chosen[None, None, :], axis=0)[0]


def judge(config: Config, records: Records) -> list[Finding]:
    """Both findings."""
    cells, lost = grid(records.runs)
    if not cells:
        note = "in every cell of the grid a run had non-finite steps"
        return [Finding(claim, {}, None, INCONCLUSIVE, note) for claim in CLAIMS]
    momentum = best_momentum(cells, config.momenta)
    controls, lost_controls = grid(records.runs, decay=True)
    common = _rates_note(config, records.rates)
    left_out = [f"batch {c.batch_size} {c.level} rate step {c.step}" for c in lost]
    left_out += [f"batch {c.batch_size} rate decayed to 0" for c in lost_controls]
    common += listed("Left out, since a run had non-finite steps", left_out, "; ")
    last = max(config.snapshots)
    long = [run for runs in part(cells, step=last).values() for run in runs]
    stuck = sum(not trains(run, records.num_classes) for run in long)
    if stuck:
        told = f"{stuck} do not train (loss not below half of ln C) and count all the same"
        common += f". Of {len(long)} runs to step {last}, {told}"
    given = config, cells, controls, momentum, common
    return [_judge_distance(*given), _judge_accuracy(*given)]


def _judge_distance(
    config: Config, cells: Cells, controls: Cells, momentum: float, common: str
) -> Finding:
    """population-beats-ema."""
    best, momenta, last = average(momentum), config.momenta, max(config.snapshots)
    ratio = _geometric(log_ratios(cells, best))
    found: dict[str, float | Estimate] = {f"{best}/{ALGORITHM2}": ratio}
    for name, where in _subsets(config, cells):
        found[f"{best}/{ALGORITHM2}, {name}"] = _geometric(log_ratios(where, best))
    late = part(cells, step=last)
    wholes = {"": cells} | ({f" of step {last}": late} if late else {})
    for of, where in wholes.items():
        name = f"average/{ALGORITHM2}, best momentum in each cell{of}"
        found[name] = _geometric(best_in_each_cell(where, momenta))
    for kind, of in itertools.product(itertools.chain(*map(averages, momenta)), wholes):
        name = f"{kind}/{ALGORITHM2}{of and f', all cells{of}'}"
        found[name] = _geometric(log_ratios(wholes[of], kind))
    for (cell, runs), m in itertools.product(controls.items(), momenta):
        name = f"{average(m)}/{ALGORITHM2}, batch {cell.batch_size}, rate decayed to 0"
        found[name] = _geometric(log_ratios({cell: runs}, average(m)))
    found[f"{ALGORITHM2}/{MERGED}"] = _geometric(log_ratios(cells, ALGORITHM2, MERGED))
    for cell, runs in cells.items():
        for kind in (ALGORITHM2, best):
            found[f"distance, {kind}, {cell}"] = numbers(runs, distance_of(kind)).mean()
        if cell in late:
            found[f"floor, {ALGORITHM2}, {cell}"] = floor(runs)
    note = (
        f"interval: of the geometric mean ratio over {len(cells)} cells, for momentum "
        f"{momentum:g}, the best of {', '.join(f'{m:g}' for m in momenta)} in hindsight; "
        f"{ALGORITHM2} from {config.population_batches} batches, drawn independently. "
        f"{_closer(cells, momenta)}. Floor: what two halves of "
        f"{config.most_population_batches} batches have in common, which more batches do not "
        f"remove: {ALGORITHM2} normalizes the layers below by each batch, the truth by the whole "
        f"set. {common}"
    )
    verdict = verdict_of(reproduced=ratio.low > 1, refuted=ratio.high < 1)
    return Finding(CLAIMS[0], with_intervals(found), ratio.interval, verdict, note)


def _judge_accuracy(
    config: Config, cells: Cells, controls: Cells, momentum: float, common: str
) -> Finding:
    """population-statistics-classify-better."""
    best = average(momentum)
    gain = _gain(cells, momentum)
    found: dict[str, float | Estimate] = {f"{ALGORITHM2} − {best}": gain}
    for name, where in _subsets(config, cells):
        found[f"{ALGORITHM2} − {best}, {name}"] = _gain(where, momentum)
    for m in config.momenta:
        found[f"{ALGORITHM2} − {average(m)}"] = _gain(cells, m)
    for (cell, runs), m in itertools.product(controls.items(), config.momenta):
        name = f"{ALGORITHM2} − {average(m)}, batch {cell.batch_size}, rate decayed to 0"
        found[name] = _gain({cell: runs}, m)
    for (cell, runs), kind in itertools.product(cells.items(), (TRUTH, ALGORITHM2, best)):
        found[f"test accuracy, {kind}, {cell}"] = numbers(runs, accuracy_by(kind)).mean()
    note = (
        f"interval: of the mean difference over {len(cells)} cells, for momentum {momentum:g}. "
        f"Truth: the statistics of the full training set. {common}"
    )
    verdict = verdict_of(reproduced=gain.low > 0, refuted=gain.high < 0)
    return Finding(CLAIMS[1], with_intervals(found), gain.interval, verdict, note)


def _geometric(log_ratios: np.ndarray) -> Estimate:
    """Geometric mean over cells and seeds, with the interval over seeds."""
    return estimate(log_ratios.mean(axis=1)).mapped(np.exp)


def _gain(cells: Cells, momentum: float) -> Estimate:
    """Test accuracy by Algorithm 2 minus that by the average."""
    gains = table(cells, accuracy_by(ALGORITHM2)) - table(cells, accuracy_by(average(momentum)))
    return estimate(gains.mean(axis=1))


def _subsets(config: Config, cells: Cells) -> Iterator[tuple[str, Cells]]:
    """Parts of the grid, by name: each step, level and batch size, and early and late."""
    ends = dict.fromkeys((min(config.snapshots), max(config.snapshots)))
    wanted: dict[str, dict[str, Any]] = {
        **{f"step {step}": {"step": step} for step in config.snapshots},
        **{f"{level} rate": {"level": level} for level in LEVELS},
        **{f"batch {size}": {"batch_size": size} for size in config.batch_sizes},
    }
    for level, step in itertools.product(LEVELS, ends):
        wanted[f"{level} rate, step {step}"] = {"level": level, "step": step}
    for name, fields in wanted.items():
        if found := part(cells, **fields):
            yield name, found


def _closer(cells: Cells, momenta: Sequence[float]) -> str:
    """In which cells an average is surely closer than Algorithm 2."""
    said = []
    for kind in map(average, momenta):
        ratios = zip(cells, log_ratios(cells, kind).T, strict=True)
        won = [cell for cell, row in ratios if estimate(row).high < 0]
        places = [
            f"batch {size} {level} rate, step {', '.join(str(cell.step) for cell in of)}"
            for (size, level), of in itertools.groupby(won, lambda cell: cell[:2])
        ]
        told = f"{kind} in {len(won)} of {len(cells)} cells"
        said.append(f"{told} ({'; '.join(places)})" if won else told)
    return "A moving average is surely closer, by each cell's own interval: " + "; ".join(said)


def _rates_note(config: Config, rates: Mapping[int, Rates]) -> str:
    ordered = sorted(rates.items())
    shown = (f"batch {n}: low {r.low:g}, best {r.best:g}, high {r.high:g}" for n, r in ordered)
    at_ends = [str(n) for n, rate in ordered if at_end(rate.best, config.learning_rates)]
    same = [str(n) for n, rate in ordered if rate.high == rate.best]
    note = f"Rates: {'; '.join(shown)}"
    if at_ends:
        note += f". Best rate at an end of the grid: batch {', '.join(at_ends)}"
    if same:
        note += f". High is the best where no higher rate trains: batch {', '.join(same)}"
    return note
