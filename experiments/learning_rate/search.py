"""The search of `experiments.learning_rate` for the largest rate that still trains.

Rates lie on one logarithmic grid. The tuning grid is every few of them, run on a seed that enters
no verdict; it gives the best rate, and where the search of each other seed starts.
"""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from bn_research.claims.bounded import Bounded
from bn_research.claims.judging import Record, final
from bn_research.claims.threshold import Outcomes, highest_passing, search, threshold
from bn_research.lab.arms import Arm, Trainer
from experiments.learning_rate import Config, Placement

ISLANDS = (2, 4)  # grid places above the largest stable rate that are tried as well
_UNSEEN = float(np.finfo(np.float32).tiny)  # below it a rate is no float32 number


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


def start_place(places: Sequence[int], losses: Sequence[float], stable: Sequence[bool]) -> int:
    """Where to start: up from the best place of the tuning grid, before one that is not stable."""
    at = int(np.argmin(losses))
    while at + 1 < len(places) and stable[at + 1]:
        at += 1
    return places[at]


def places_above(outcomes: Outcomes, count: int) -> list[int]:
    """Places above the largest stable one at which to look for islands; none if it is censored."""
    low = highest_passing(outcomes)
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
    limits = {key: threshold(found, rates, floor=_UNSEEN) for key, found in outcomes.items()}
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
