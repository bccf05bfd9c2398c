"""The claims of `experiments.learning_rate`, and how records of trainings decide them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bn_research.claims import Claim, Finding, decide, estimate
from bn_research.claims.bounded import Bounded, Ratio, geometric_mean, log_slope, ratio
from bn_research.claims.estimate import Estimate
from bn_research.claims.finding import INCONCLUSIVE, conjunction, verdict_of
from bn_research.claims.formatting import format_number
from bn_research.claims.judging import Record, at_end, listed, numbers, with_intervals
from experiments.learning_rate import PUBLISHED_BATCH, PUBLISHED_FACTOR, Config, Placement
from experiments.learning_rate.search import Searches, Setting, final_loss
from experiments.learning_rate.training import BOOSTED, Boosted, Records, Sigmoids

REPRODUCED_FROM, NOT_BELOW = 10, 3  # of BN/plain
TRAINS, CHANCE = 3.0, 1.5  # of sigmoids, times the accuracy of guessing
NAMES: dict[Placement, str] = {
    "none": "plain",
    "all": "BN on all layers",
    "hidden": "BN on the hidden layers",
    "last": "BN on the last layer alone",
}
OTHERS: tuple[Placement, ...] = ("hidden", "last")  # which the claims are not about

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
        id="sigmoid-trainable",
        statement="With BN a deep network of sigmoids trains that does not train without it",
        source="Paper section 4.2.2: Inception with sigmoids stays at 1/1000, with BN and 5 times "
        "the rate it reaches 69.8 %",
        criterion="Deepest sigmoid CNN, Glorot initialization, each arm at its best rate of the "
        "same grid, after the same number of steps. Reproduced if BN's test accuracy is at least "
        f"{TRAINS:g} times that of guessing and plain's at most {CHANCE:g} times (intervals "
        "over seeds); not reproduced if both or neither train: plain surely above, or BN surely "
        "below",
        expected="plain at chance, BN at 3 times chance or more",
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


def judge(config: Config, records: Records) -> list[Finding]:
    """A finding for each claim."""
    searches, boosted, sigmoid, num_classes = records
    return [
        judge_rates(searches, config.cnn, boosted, num_classes),
        judge_sigmoid(config.sigmoid_networks, sigmoid, config.sigmoid_rates, num_classes),
        judge_batches(searches, config.batch_sizes),
    ]


def network_name(network: str) -> str:
    """CNN or MLP, whichever a spec describes."""
    return "CNN" if network.startswith("c") else "MLP"


def advantage(searches: Searches, network: str, batch_size: int, placement: Placement) -> Ratio:
    """Largest stable rate with BN over that of plain, paired by seed."""
    bn, plain = (searches[Setting(network, p, batch_size)].limits for p in (placement, "none"))
    return ratio(bn, plain)


def advantage_slope(
    searches: Searches, network: str, batch_sizes: Sequence[int], placement: Placement = "all"
) -> Estimate:
    """Slope of the logarithm of the advantage over that of the batch size."""
    bn, plain = (
        [searches[Setting(network, p, size)].limits for size in batch_sizes]
        for p in (placement, "none")
    )
    return log_slope([math.log(size) for size in batch_sizes], bn, plain)


def judge_rates(searches: Searches, cnn: str, boosted: Boosted, num_classes: int) -> Finding:
    """higher-learning-rates."""

    def rank(setting: Setting) -> tuple[bool, bool, bool]:  # the headline first
        network, placement, size = setting
        return network != cnn, size != PUBLISHED_BATCH, placement != "all"

    measured: dict[str, float] = {}
    for setting in sorted(searches, key=rank):
        network, placement, size = setting
        found, words = searches[setting], NAMES[placement]
        where = f"{network_name(network)}, batch {size}"
        if placement != "none":
            gain, name = advantage(searches, network, size, placement), f"{words}/plain, {where}"
            measured |= with_intervals({name: gain}) | {name: _exact(gain.mean)}
        limit = _exact(geometric_mean(found.limits))
        measured[f"largest stable rate, {words}, {where}"] = limit
        measured[f"best rate, {words}, {where}"] = found.best
        measured[f"largest stable/best rate, {words}, {where}"] = limit / found.best
    tried = [again for s in searches.values() for again in s.islands if again is not None]
    if tried:
        share = sum(tried) / len(tried)
        measured["share of searches above whose limit a rate trains again"] = share
    for name, records in boosted.items():
        losses = numbers(records, final_loss)
        loss = losses.mean() if np.isfinite(losses).all() else math.nan
        measured[f"training loss at the end, {name}"] = loss
        measured |= with_intervals({f"test accuracy, {name}": _accuracy(records)})
        measured[f"rate, {name}"] = records[0]["learning_rate"]
    others = "; ".join(
        f"{NAMES[placement]} {advantage(searches, cnn, PUBLISHED_BATCH, placement)}"
        for placement in OTHERS
        if Setting(cnn, placement, PUBLISHED_BATCH) in searches
    )
    plain, high, own = (boosted[name] for name in BOOSTED)
    trains = sum(final_loss(record) < math.log(num_classes) / 2 for record in high)
    note = (
        "interval: of BN on all layers/plain on the CNN at the paper's batch. Other placements at "
        f"{f'the same batch: {others}' if others else 'this batch were not run'}. "
        f"At {PUBLISHED_FACTOR}× the plain network's best rate BN on all layers trains for "
        f"{trains} of {len(high)} seeds, test accuracy {_accuracy(high)}, against plain at its "
        f"best rate {_accuracy(plain)} and BN at its own {_accuracy(own)}"
    )
    censored = sum(limit.is_censored for found in searches.values() for limit in found.limits)
    lost = sum(record["diverged"] > 0 for records in boosted.values() for record in records)
    for told, words in (
        (
            len(tried),
            f"{sum(tried)} of {len(tried)} searches had a rate 2 or 4 places of the grid "
            "above their limit that trained again",
        ),
        (censored, f"{censored} limits are bounds only"),
        (lost, f"{lost} of the runs at those three rates had steps that were not finite"),
    ):
        note += f". {words}" if told else ""
    ends = [
        f"{NAMES[placement]} ({network_name(network)}, batch {size})"
        for (network, placement, size), found in searches.items()
        if at_end(found.best, found.rates)
    ]
    note += listed("Best rate at an end of the grid", ends)
    headline = advantage(searches, cnn, PUBLISHED_BATCH, "all")
    verdict = verdict_of(
        reproduced=headline.low >= REPRODUCED_FROM, refuted=headline.high < NOT_BELOW
    )
    return Finding(CLAIMS[0], measured, headline.interval, verdict, note)


def judge_sigmoid(
    networks: Sequence[str], trained: Sigmoids, grid: Sequence[float], num_classes: int
) -> Finding:
    """sigmoid-trainable; networks are from shallow to deep, and the claim is about the last."""
    measured: dict[str, float] = {}
    ends, lost, reached = [], 0, {}
    for (network, placement), records in trained.items():
        name, rate = f"{NAMES[placement]}, {network}", records[0]["learning_rate"]
        reached[network, placement] = _accuracy(records)
        measured |= with_intervals({f"test accuracy, {name}": reached[network, placement]})
        measured[f"rate, {name}"] = rate
        lost += sum(record["diverged"] > 0 for record in records)
        ends += [name] * at_end(rate, grid)
    shallow, deep = networks[0], networks[-1]
    plain, bn = reached[deep, "none"], reached[deep, "all"]
    note = (
        f"interval: of BN's test accuracy on {deep}; plain's is {plain}, that of guessing "
        f"{format_number(1 / num_classes)}"
    )
    if len(networks) > 1:
        control = f"plain {reached[shallow, 'none']}, BN {reached[shallow, 'all']}"
        note += f". Control, {shallow}: {control}"
    note += listed("Best rate at an end of the grid", ends, "; ")
    note += f". {lost} runs had steps that were not finite" if lost else ""
    verdict = conjunction(
        decide(bn, at_least=TRAINS / num_classes), decide(plain, at_most=CHANCE / num_classes)
    )
    return Finding(CLAIMS[1], measured, bn.interval, verdict, note)


def judge_batches(searches: Searches, batch_sizes: Mapping[str, Sequence[int]]) -> Finding:
    """advantage-shrinks-with-batch; the interval shown is the first network's."""
    measured: dict[str, float] = {}
    slopes: dict[str, Estimate] = {}  # with BN on all layers
    for network, sizes in batch_sizes.items():
        for placement in ("all", *OTHERS):
            if len(sizes) < 2 or Setting(network, placement, sizes[0]) not in searches:
                continue
            slope, name = (
                advantage_slope(searches, network, sizes, placement),
                network_name(network),
            )
            measured |= with_intervals({f"slope, {NAMES[placement]}, {name}": slope})
            if placement == "all":
                slopes[name] = slope
    if not slopes:
        note = "fewer than two batch sizes were run"
        return Finding(CLAIMS[2], measured, None, INCONCLUSIVE, note)
    note = (
        "interval: of the first network's slope. BN on all layers: "
        f"{'; '.join(f'{name} {slope}' for name, slope in slopes.items())}; above 0 the advantage "
        "grows with the batch. Every batch size has the same number of steps, so a larger batch "
        "sees more examples"
    )
    verdicts = [verdict_of(reproduced=s.low > 0, refuted=s.high < 0) for s in slopes.values()]
    first = next(iter(slopes.values()))
    return Finding(CLAIMS[2], measured, first.interval, conjunction(*verdicts), note)


def _accuracy(records: Sequence[Record]) -> Estimate:
    """On the test set, over seeds."""
    return estimate(numbers(records, "accuracy"))


def _exact(number: Bounded) -> float:
    return math.nan if number.is_censored else number.low
