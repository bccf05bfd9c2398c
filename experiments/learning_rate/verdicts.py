"""The claims of `experiments.learning_rate`, and how records of trainings decide them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.bounded import Bounded, Ratio, ratio
from bn_research.claims.claim import Claim
from bn_research.claims.estimate import estimate
from bn_research.claims.finding import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Finding,
    conjunction,
    decide,
)
from bn_research.claims.formatting import format_interval, format_number
from bn_research.models.cnn import NormPlacement
from experiments.learning_rate.search import Searches, Setting, final_loss

PUBLISHED_BATCH = 32  # of the paper, and of the first claim's headline
PUBLISHED_FACTOR = 30  # 0.045 over 0.0015
REPRODUCED_FROM, NOT_BELOW = 10, 3  # of BN/plain
BN_NAMES: dict[NormPlacement, str] = {
    "all": "BN on all layers",
    "hidden": "BN on the hidden layers",
    "last": "BN on the last layer alone",
}
NAMES: dict[NormPlacement, str] = {"none": "plain", **BN_NAMES}
BOOSTED = ("plain at its best rate", "BN at 30× that", "BN at its best rate")
Records = Sequence[Mapping[str, Any]]  # of one arm, by seed

CLAIMS = (
    Claim(
        id="higher-learning-rates",
        statement="BN allows a 30 times larger learning rate",
        source="Notes on Ioffe & Szegedy (2015); Paper section 4.2",
        criterion="Largest stable rate of momentum SGD on a log grid, CNN, batch "
        f"{PUBLISHED_BATCH}, BN on all layers over plain with He initialization, geometric mean "
        "over seeds. Stable: no step non-finite, and the mean training loss of the last tenth of "
        f"the steps below half of ln C. Reproduced if the interval begins at {REPRODUCED_FROM} or "
        f"above; not reproduced if it ends below {NOT_BELOW}. Whether {PUBLISHED_FACTOR} times the "
        "plain network's best rate trains is reported apart",
        expected=f"BN/plain at least {REPRODUCED_FROM}",
    ),
    Claim(
        id="advantage-shrinks-with-batch",
        statement="The advantage in the largest rate shrinks with the batch",
        source="De & Smith (2020), arXiv 2002.10444: larger rates have minimal benefits when the "
        "batch is small; that this holds for the largest stable rate is this project's reading",
        criterion="Slope of log(BN on all layers/plain) over log(batch), by seed, for each "
        "network. Reproduced if on every network its interval lies above 0; not reproduced if on "
        "some it lies below 0: the advantage is larger at small batches",
        expected="a positive slope",
    ),
)


def network_name(network: str) -> str:
    """CNN or MLP, whichever a spec describes."""
    return "CNN" if network.startswith("c") else "MLP"


def advantage(searches: Searches, network: str, batch_size: int, placement: Any) -> Ratio:
    """Largest stable rate with BN over that of plain, paired by seed."""
    bn, plain = (
        searches[Setting(network, where, batch_size)].limits for where in (placement, "none")
    )
    return ratio(bn, plain)


def geometric_mean(numbers: Sequence[Bounded]) -> Bounded:
    """Of positive numbers, a bound where one of them is."""
    return ratio(numbers, [Bounded(1.0, 1.0)] * len(numbers)).mean


def bounded_slope(
    x: Sequence[float], numerators: Sequence[Bounded], denominators: Sequence[Bounded]
) -> tuple[float, float]:
    """Bounds of the least-squares slope of log(numerator/denominator) over x.

    The slope is the sum of cᵢ·yᵢ with cᵢ = (xᵢ − x̄)/Σ(xⱼ − x̄)², so each bound of y enters by the
    sign of its c.
    """
    centred = np.asarray(x, float) - np.mean(x)
    weights = centred / np.sum(centred**2)
    low = high = 0.0
    for weight, n, d in zip(weights, numerators, denominators, strict=True):
        ends = [_log(n.low) - _log(d.high), _log(n.high) - _log(d.low)]
        if weight:
            low += min(weight * end for end in ends)
            high += max(weight * end for end in ends)
    return low, high


def slope_over_batches(
    searches: Searches, network: str, batch_sizes: Sequence[int], placement: Any = "all"
) -> tuple[float, float, float] | None:
    """Mean slope over seeds and its interval; infinite ends where nothing bounds it.

    None where there are fewer than two batch sizes.
    """
    if len(batch_sizes) < 2:
        return None
    bn, plain = (
        [searches[Setting(network, where, size)].limits for size in batch_sizes]
        for where in (placement, "none")
    )
    x = [math.log(size) for size in batch_sizes]
    bounds = [
        bounded_slope(x, [row[s] for row in bn], [row[s] for row in plain])
        for s in range(len(bn[0]))
    ]
    lows, highs = (np.array(ends) for ends in zip(*bounds, strict=True))
    low = estimate(lows) if np.isfinite(lows).all() else None
    high = estimate(highs) if np.isfinite(highs).all() else None
    mean = (low.mean + high.mean) / 2 if low and high else math.nan
    return mean, low.low if low else -math.inf, high.high if high else math.inf


def judge_rates(
    searches: Searches, cnn: str, boosted: Mapping[str, Records], num_classes: int
) -> Finding:
    """higher-learning-rates."""
    headline = advantage(searches, cnn, PUBLISHED_BATCH, "all")
    measured: dict[str, float] = {}
    for setting in sorted(searches, key=lambda s: _rank(s, cnn)):  # the headline first
        measured |= _numbers(searches, setting)
    censored = sum(number.is_censored for found in searches.values() for number in found.limits)
    tried = [
        island for found in searches.values() for island in found.islands if island is not None
    ]
    if tried:
        measured["share of searches above whose limit a rate trains again"] = float(np.mean(tried))
    note = (
        "interval: of BN on all layers/plain on the CNN at the paper's batch. Other placements at "
        + _sentence(searches, cnn)
    )
    lost = 0
    for name, records in boosted.items():
        lost += sum(record["diverged"] > 0 for record in records)
        sound = [final_loss(record) for record in records]
        measured[f"training loss at the end, {name}"] = (
            float(np.mean(sound)) if np.isfinite(sound).all() else math.nan
        )
        measured |= with_interval(f"test accuracy, {name}", accuracies(records))
        measured[f"rate, {name}"] = records[0]["learning_rate"]
    plain, high, own = (boosted[name] for name in BOOSTED)
    trains = sum(final_loss(record) < math.log(num_classes) / 2 for record in high)
    note += (
        f". At {PUBLISHED_FACTOR}× the plain network's best rate BN on all layers trains for "
        f"{trains} of {len(high)} seeds, test accuracy {in_words(high)}, against plain at its "
        f"best rate {in_words(plain)} and BN at its own {in_words(own)}"
    )
    if tried:
        note += (
            f". {sum(tried)} of {len(tried)} searches had a rate 2 or 4 places of the grid above "
            "their limit that trained again"
        )
    note += f". {censored} limits are bounds only" if censored else ""
    note += (
        f". {lost} of the runs at those three rates had steps that were not finite" if lost else ""
    )
    note += _ends(searches)
    verdict = decide(headline.interval, at_least=REPRODUCED_FROM)
    if verdict == NOT_REPRODUCED and not headline.high < NOT_BELOW:
        verdict = INCONCLUSIVE
    return Finding(CLAIMS[0], measured, headline.interval, verdict, note)


def _rank(setting: Setting, cnn: str) -> tuple[bool, bool, bool]:
    return setting.network != cnn, setting.batch_size != PUBLISHED_BATCH, setting.placement != "all"


def _numbers(searches: Searches, setting: Setting) -> dict[str, float]:
    """What was found for a setting, by name."""
    network, placement, size = setting
    found, words = searches[setting], NAMES[placement]
    where = f"{network_name(network)}, batch {size}"
    numbers = {}
    if placement != "none":
        gain = advantage(searches, network, size, placement)
        name = f"{words}/plain, {where}"
        numbers = {name: _middle(gain.mean), f"{name}, low": gain.low, f"{name}, high": gain.high}
    mean = _middle(geometric_mean(found.limits))
    numbers[f"largest stable rate, {words}, {where}"] = mean
    numbers[f"best rate, {words}, {where}"] = found.best
    numbers[f"largest stable/best rate, {words}, {where}"] = mean / found.best
    return numbers


def _sentence(searches: Searches, cnn: str) -> str:
    """The placements of BN that the headline is not about, on the same network and batch."""
    parts = []
    others: tuple[NormPlacement, ...] = ("hidden", "last")
    for placement in others:
        if Setting(cnn, placement, PUBLISHED_BATCH) in searches:
            gain = advantage(searches, cnn, PUBLISHED_BATCH, placement)
            parts.append(f"{NAMES[placement]} {gain.mean} {format_interval(gain.interval)}")
    return f"the same batch: {'; '.join(parts)}" if parts else "this batch were not run"


def _ends(searches: Searches) -> str:
    """Says which best rates lie at an end of the tuning grid."""
    at_end = [
        f"{NAMES[setting.placement]} ({network_name(setting.network)}, batch {setting.batch_size})"
        for setting, found in searches.items()
        if found.best in (found.rates[0], found.rates[-1])
    ]
    return f". Best rate at an end of the grid: {', '.join(at_end)}" if at_end else ""


def judge_batches(searches: Searches, batch_sizes: Mapping[str, Sequence[int]]) -> Finding:
    """advantage-shrinks-with-batch.

    Args:
      searches: of all settings.
      batch_sizes: of each network, rising; the interval shown is the first network's.
    """
    measured: dict[str, float] = {}
    verdicts, first, signs = [], None, []
    for network, sizes in batch_sizes.items():
        for placement in BN_NAMES:
            if Setting(network, placement, sizes[0]) not in searches:
                continue
            found = slope_over_batches(searches, network, sizes, placement)
            if found is None:
                continue
            mean, low, high = found
            name = f"slope, {NAMES[placement]}, {network_name(network)}"
            measured |= {name: mean, f"{name}, low": low, f"{name}, high": high}
            if placement == "all":
                verdicts.append(
                    REPRODUCED if low > 0 else NOT_REPRODUCED if high < 0 else INCONCLUSIVE
                )
                first = first or (low, high)
                signs.append(
                    f"{network_name(network)} {format_number(mean)} {format_interval((low, high))}"
                )
    if not verdicts:
        note = "fewer than two batch sizes were run"
        return Finding(CLAIMS[1], measured, None, INCONCLUSIVE, note)
    note = (
        f"interval: of the first network's slope. BN on all layers: {'; '.join(signs)}; above 0 "
        "the advantage grows with the batch. Every batch size has the same number of steps, so a "
        "larger batch sees more examples"
    )
    return Finding(CLAIMS[1], measured, first, conjunction(*verdicts), note)


def _log(value: float) -> float:
    return math.log(value) if math.isfinite(value) else math.inf


def _middle(number: Bounded) -> float:
    """The number, or not a number where it is known as a bound only."""
    return math.nan if number.is_censored else number.low


def accuracies(records: Records) -> list[float]:
    """Test accuracy of each seed."""
    return [record["accuracy"] for record in records]


def with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds with both ends of its interval, by name."""
    found = estimate(values)
    return {name: found.mean, f"{name}, low": found.low, f"{name}, high": found.high}


def in_words(records: Records) -> str:
    """Mean test accuracy with its interval."""
    found = estimate(accuracies(records))
    return f"{format_number(found.mean)} {format_interval(found.interval)}"
