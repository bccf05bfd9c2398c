"""The search of `experiments.learning_rate`: bisection for the largest rate that still trains.

Rates lie on one logarithmic grid. The tuning grid is every few of them, run on a seed that enters
no verdict; it gives the best rate, and where the search of each other seed starts. From there the
bracket is widened until it holds a stable rate below one that is not, and then halved until the two
are neighbours. So every step of the search is one that could have turned out either way, and both
ends are run, never assumed.
"""

import collections
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from bn_research.claims.bounded import Bounded
from bn_research.claims.judging import Record, final
from bn_research.lab.arms import Arm, Trainer
from experiments.learning_rate import Config, Placement

ISLANDS = (2, 4)  # grid places above the largest stable rate that are tried as well
_UNSEEN = float(np.finfo(np.float32).tiny)  # below it a rate is no float32 number
_Key = TypeVar("_Key", bound=Hashable)
Outcomes = dict[int, bool]  # place on the grid -> whether that rate was stable


class Setting(NamedTuple):
    """What the largest stable rate is asked of."""

    network: str
    placement: Placement
    batch_size: int


class Search(NamedTuple):
    """What was found for a setting."""

    rates: list[float]  # of the tuning grid
    losses: list[float]  # at their end, on the seed apart; inf where a step was not finite
    best: float  # rate of the lowest
    limits: list[Bounded]  # largest stable rate of each seed
    islands: list[bool | None]  # whether a higher rate trained again; None if none was tried


Searches = Mapping[Setting, Search]


def grid(lowest: int, highest: int, per_octave: int) -> list[float]:
    """Rates from 2^lowest to 2^highest, 2^(1/per_octave) apart."""
    return [2.0 ** (lowest + i / per_octave) for i in range((highest - lowest) * per_octave + 1)]


def final_loss(record: Record) -> float:
    """Mean loss of the last tenth of the steps; infinite if any step was not finite."""
    return math.inf if record["diverged"] else final(record["loss"])


def is_stable(record: Record, num_classes: int) -> bool:
    """Whether it trains: no step was non-finite, and the final loss is below half of ln C."""
    return final_loss(record) < math.log(num_classes) / 2


def highest_stable(outcomes: Outcomes) -> int | None:
    """The highest place that was run and is stable; None without any."""
    return max((place for place, stable in outcomes.items() if stable), default=None)


def next_place(outcomes: Outcomes, *, start: int, count: int, stride: int) -> int | None:
    """The place of the grid to run next; None when the largest stable one is known.

    Outcomes are of places proposed here, the first of which is the start. The stride is the first
    step upwards from there, and doubles while all were stable. Downwards each step is half of it:
    the rates that train have a lower end too, which a leap would miss.
    """
    if not 0 <= start < count or stride < 1:
        raise ValueError(
            f"start={start} must lie in the grid of {count} places, and stride={stride} be ≥ 1"
        )
    if not outcomes:
        return start
    low = highest_stable(outcomes)
    high = min((place for place, stable in outcomes.items() if not stable), default=None)
    if high is None:
        assert low is not None
        return None if low == count - 1 else min(low + stride * 2 ** (len(outcomes) - 1), count - 1)
    if low is None:
        return None if high == 0 else max(high - max(1, stride // 2), 0)
    return None if high - low == 1 else (low + high) // 2


def limit(outcomes: Outcomes, rates: Sequence[float]) -> Bounded:
    """Largest stable rate of a finished search, as a number of the grid.

    A bound where the grid ends before the answer: above its last rate, or below its first.
    """
    low = highest_stable(outcomes)
    if low is None:
        return Bounded(_UNSEEN, rates[0])
    return Bounded(rates[low], math.inf if low == len(rates) - 1 else rates[low])


def start_place(places: Sequence[int], losses: Sequence[float], stable: Sequence[bool]) -> int:
    """Where to start: up from the best place of the tuning grid, before one that is not stable."""
    at = int(np.argmin(losses))
    while at + 1 < len(places) and stable[at + 1]:
        at += 1
    return places[at]


def search(
    starts: Mapping[_Key, int],
    run: Callable[[Sequence[tuple[_Key, int]]], Sequence[bool]],
    *,
    count: int,
    stride: int,
) -> dict[_Key, Outcomes]:
    """Outcomes of the searches of all keys, run side by side: a place of each in every round.

    `run` takes [(key, place), …] and says whether each was stable; the rest is as of `next_place`.
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
        for (key, place), stable in zip(wanted, run(wanted), strict=True):
            outcomes[key][place] = stable


def places_above(outcomes: Outcomes, count: int) -> list[int]:
    """Places above the largest stable one at which to look for islands; none if it is censored."""
    low = highest_stable(outcomes)
    return [] if low is None else [low + step for step in ISLANDS if low + step < count]


def arm_of(config: Config, setting: Setting, rate: float) -> Arm:
    """A setting as an arm."""
    return Arm(
        setting.network,
        setting.placement,
        optimizer="momentum",
        initializer="he",
        use_bias=True,
        batch_size=setting.batch_size,
        learning_rate=rate,
        num_steps=config.num_steps,
    )


def find_limits(
    config: Config, settings: Sequence[Setting], trainer: Trainer, num_classes: int
) -> dict[Setting, Search]:
    """What tuning on the seed apart, and then a search on each of the others, find."""
    rates = grid(config.lowest_log2_rate, config.highest_log2_rate, config.rates_per_octave)
    seeds = range(config.seeds)
    count, stride = len(rates), config.tuning_stride
    places = list(range(0, count, stride))
    known = {
        setting: [(arm_of(config, setting, rates[place]), config.seeds) for place in places]
        for setting in settings
    }
    tuned = iter(trainer.tune([one for setting in settings for one in known[setting]]))
    tuning: dict[Setting, list[Record]] = {s: [next(tuned) for _ in places] for s in settings}
    losses = {setting: [final_loss(record) for record in tuning[setting]] for setting in settings}
    starts: dict[tuple[Setting, int], int] = {}
    for setting in settings:
        trains = [is_stable(record, num_classes) for record in tuning[setting]]
        start = start_place(places, losses[setting], trains)
        starts |= {(setting, seed): start for seed in seeds}

    def run(wanted: Sequence[tuple[tuple[Setting, int], int]]) -> list[bool]:
        runs = [(arm_of(config, setting, rates[place]), seed) for (setting, seed), place in wanted]
        # A sweep of fewer members than devices would be another program, to be compiled for one
        # round: runs that stand in the ledger already fill it up.
        devices = min(jax.local_device_count(), max(len(places), config.seeds))
        sizes = collections.Counter(setting for (setting, _), _ in wanted)
        for setting, size in sizes.items():
            runs += known[setting][: max(0, devices - size)]
        records = trainer.tune(runs)[: len(wanted)]
        return [is_stable(record, num_classes) for record in records]

    outcomes = search(starts, run, count=count, stride=stride)
    limits = {key: limit(found, rates) for key, found in outcomes.items()}
    above = {key: places_above(found, count) for key, found in outcomes.items()}
    wanted = [(key, place) for key in above for place in above[key] if place not in outcomes[key]]
    for (key, place), stable in zip(wanted, run(wanted), strict=True):
        outcomes[key][place] = stable
    islands = {
        key: any(outcomes[key][place] for place in tried) if tried else None
        for key, tried in above.items()
    }
    return {
        setting: Search(
            [rates[place] for place in places],
            losses[setting],
            rates[places[int(np.argmin(losses[setting]))]],
            [limits[setting, seed] for seed in seeds],
            [islands[setting, seed] for seed in seeds],
        )
        for setting in settings
    }
