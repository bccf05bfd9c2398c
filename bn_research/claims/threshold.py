"""The highest place of a grid that still passes, by bisection from a start, for many at a time.

A question such as "which is the largest learning rate that trains?" has a yes or no at each place
of a grid. From the start the bracket is widened until it holds a place that passes below one that
does not, and then halved until the two are neighbours. So every step of the search is one that
could have turned out either way, and both ends are run, never assumed.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from bn_research.claims.bounded import Bounded

_Key = TypeVar("_Key", bound=Hashable)
Outcomes = dict[int, bool]  # place on the grid -> whether it passed


def highest_passing(outcomes: Outcomes) -> int | None:
    """The highest place that was run and passes; None without any."""
    return max((place for place, passes in outcomes.items() if passes), default=None)


def next_place(outcomes: Outcomes, *, start: int, count: int, stride: int) -> int | None:
    """The place of the grid to run next; None when the highest that passes is known.

    Args:
      outcomes: of the places run so far, all of them proposed here.
      start: the first.
      count: places of the grid.
      stride: first step upwards from the start; it doubles while all passed. Downwards each step is
        half of it: the places that pass may have a lower end too, which a leap would miss.

    Raises:
      ValueError: start outside the grid, or a stride below 1.
    """
    if not 0 <= start < count or stride < 1:
        raise ValueError(
            f"start={start} must lie in the grid of {count} places, and stride={stride} be ≥ 1"
        )
    if not outcomes:
        return start
    low = highest_passing(outcomes)
    high = min((place for place, passes in outcomes.items() if not passes), default=None)
    if high is None:
        assert low is not None
        return None if low == count - 1 else min(low + stride * 2 ** (len(outcomes) - 1), count - 1)
    if low is None:
        return None if high == 0 else max(high - max(1, stride // 2), 0)
    return None if high - low == 1 else (low + high) // 2


def search(
    starts: Mapping[_Key, int],
    run: Callable[[Sequence[tuple[_Key, int]]], Sequence[bool]],
    *,
    count: int,
    stride: int,
) -> dict[_Key, Outcomes]:
    """Outcomes of the searches of all keys, run side by side: a place of each in every round.

    Args:
      starts: the first place of each key.
      run: [(key, place), …] -> whether each passed.
      count: places of the grid.
      stride: as of `next_place`.

    Raises:
      ValueError: as of `next_place`.
    """
    outcomes: dict[_Key, Outcomes] = {key: {} for key in starts}
    while True:
        wanted = [
            (key, place)
            for key, start in starts.items()
            if (place := next_place(outcomes[key], start=start, count=count, stride=stride))
            is not None
        ]
        if not wanted:
            return outcomes
        for (key, place), passes in zip(wanted, run(wanted), strict=True):
            outcomes[key][place] = passes


def threshold(outcomes: Outcomes, values: Sequence[float], *, floor: float) -> Bounded:
    """The highest value that passes, after a finished search, as a number of the grid.

    A bound where the grid ends before the answer: above its last value, or between `floor`, which
    no value is below, and its first.
    """
    low = highest_passing(outcomes)
    if low is None:
        return Bounded(floor, values[0])
    return Bounded(values[low], math.inf if low == len(values) - 1 else values[low])
