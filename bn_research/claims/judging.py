"""Records of runs as numbers for verdicts, and what every note must tell of them.

A record is what the ledger holds of one run: its settings, its `seed`, how many of its steps
`diverged`, and what was measured; None stands for a number that was not finite.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.bounded import Ratio
from bn_research.claims.estimate import Estimate

Record = Mapping[str, Any]
Pick = str | Callable[[Record], Any]  # a field's name, or a function of the record


def by_seed(records: Iterable[Record], **fields: Any) -> list[Any]:
    """Records that have these fields, in the order of their seeds."""
    found = [r for r in records if all(r[name] == value for name, value in fields.items())]
    return sorted(found, key=lambda record: record["seed"])


def numbers(records: Iterable[Record], pick: Pick) -> np.ndarray:
    """A number, or a list of numbers, of each record: `[seeds, ...]`, NaN in place of None."""
    return np.array([_pick(record, pick) for record in records], dtype=np.float64)


def final(values: Sequence[float | None]) -> float:
    """Mean over the last tenth of the steps; NaN where one of them was not finite."""
    last = values[-max(1, len(values) // 10) :]
    return float(np.mean(np.array(last, dtype=np.float64)))


def choose(records: Iterable[Record], score: Pick, *, fields: Sequence[str] = ()) -> Any:
    """First record of the setting with the lowest mean score, the first of several.

    A setting loses to all others where the score of a run is not finite, or a run diverged.

    Args:
      records: of trainings for the choice, on seeds that no verdict sees.
      score: to be low, such as the loss at the end.
      fields: that make up a setting, whose runs are averaged; without any each run is its own.
    """
    settings: dict[Any, list[Record]] = {}
    for index, record in enumerate(records):
        key = tuple(record[name] for name in fields) if fields else index
        settings.setdefault(key, []).append(record)

    def mean(runs: Sequence[Record]) -> float:
        scores = numbers(runs, score)
        lost = any(run["diverged"] for run in runs) or not np.isfinite(scores).all()
        return math.inf if lost else float(scores.mean())

    return min(settings.values(), key=mean)[0]


def at_end(value: float, grid: Iterable[float]) -> bool:
    """Whether a value lies at an end of the grid that it was chosen from."""
    grid = tuple(grid)
    return value in (min(grid), max(grid))


def with_intervals(found: Mapping[str, float | Estimate | Ratio]) -> dict[str, float]:
    """Numbers as a finding's `measured` holds them: of an estimate three, with both ends.

    Of a ratio that is a bound only, the end that is known.
    """
    measured: dict[str, float] = {}
    for name, number in found.items():
        if isinstance(number, Estimate | Ratio):
            middle = number.mean if isinstance(number, Estimate) else number.known
            low, high = number.interval
            measured |= {name: middle, f"{name}, low": low, f"{name}, high": high}
        else:
            measured[name] = number
    return measured


def lost(records: Sequence[Record], *, runs: str = "runs") -> str:
    """Sentence of a note on runs with steps that were not taken; empty without any."""
    count = sum(record["diverged"] > 0 for record in records)
    told = f". Of {len(records)} {runs} {count} had steps that were not finite and not taken"
    return told if count else ""


def listed(words: str, names: Sequence[str], separator: str = ", ") -> str:
    """Sentence of a note, `. WORDS: a, b`; empty without names."""
    return f". {words}: {separator.join(names)}" if names else ""


def _pick(record: Record, pick: Pick) -> Any:
    return record[pick] if isinstance(pick, str) else pick(record)
