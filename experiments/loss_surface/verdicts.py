"""The claims of `experiments.loss_surface`, with their criteria, and the verdicts on them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.bounded import Bounded, Ratio
from bn_research.claims.claim import Claim
from bn_research.claims.estimate import estimate
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, Finding, conjunction, decide
from bn_research.claims.formatting import format_interval, format_number
from bn_research.models.spec import num_logits
from experiments.loss_surface.summaries import (
    TRAINS,
    UNBOUNDED,
    Descents,
    Record,
    compared,
    edge_curve,
    exact,
    final_loss,
    geometric_mean,
    largest_residual,
    sharpness_at_start,
    stable_factors,
    surface_curves,
)

ARMS = ("plain", "BN")
PLAIN, SAME, OWN = "plain", "BN, plain's rate", "BN, own rate"  # roles of the SGD runs
LOW, LOW_BN = "plain, lower rate", "BN, lower rate"  # the rate of the grid below plain's best
_AGREE = 4.0
_EDGE = (1.5, 3.0)

CLAIMS = (
    Claim(
        id="smoother-along-the-step",
        statement="At the same learning rate loss and gradient vary less along the step with BN",
        source="Santurkar et al. (2018), arXiv 1805.11604, figure 4",
        criterion="Over ½ to 4 times each step of SGD: range of the loss, and largest distance of "
        "the gradient from that at the start, geometric means over training. Reproduced if both "
        "ratios BN/plain lie below 1 (intervals over seeds, both arms at the plain network's best "
        "rate); not reproduced if one is surely above 1",
        expected="both below 1; the published figure shows them smaller by far",
    ),
    Claim(
        id="sharpness-sets-the-rate",
        statement="With BN a larger learning rate is stable because λmax of the Hessian at "
        "initialization is smaller: gradient descent is stable up to about 2/λmax",
        source="classical limit of gradient descent on a quadratic; Cohen et al. (2021), arXiv "
        "2103.00065, on networks",
        criterion="Gradient descent by one fixed batch, λmax with its statistics differentiated "
        "through. Reproduced if 1/λmax is larger with BN (ratio BN/plain surely above 1) and "
        "explains the rates: the ratio of the largest stable rates over that of 1/λmax lies within "
        f"1/{_AGREE:g} to {_AGREE:g}. Not reproduced if the first is surely below 1, or the second "
        "surely outside",
        expected="1/λmax larger with BN; both arms stable to a few times 2/λmax",
    ),
    Claim(
        id="edge-of-stability",
        statement="In gradient descent λmax settles at about 2 over the rate",
        source="Cohen et al. (2021), arXiv 2103.00065",
        criterion="Mean of rate·λmax over the last quarter of the steps of the plain network: "
        f"reproduced if it lies within {_EDGE[0]:g} to {_EDGE[1]:g} (interval over seeds); not "
        "reproduced if it is surely above. Below, the runs may have been too short, or have fitted "
        "their examples, after which λmax falls: that is inconclusive. BN is reported beside it",
        expected="about 2; with BN below it, if the examples are fitted before λmax has risen",
    ),
)


def judge_surface(config: Any, trained: Mapping[str, Sequence[Record]]) -> Finding:
    """smoother-along-the-step."""
    dispatches = config.num_steps // config.steps_per_dispatch
    curves = {
        role: [surface_curves(record, dispatches) for record in records]
        for role, records in trained.items()
    }

    def compare(role: str, name: str, part: slice = slice(None), base: str = PLAIN) -> Ratio:
        sides = [[geometric_mean(c[name][part]) for c in curves[r]] for r in (role, base)]
        return compared(*sides)

    loss, gradient = compare(SAME, "loss range"), compare(SAME, "gradient distance")
    measured: dict[str, float] = {}
    names = [name for name in curves[PLAIN][0] if name != "cosine at the step"]
    for role, words in ((SAME, "same rate"), (OWN, "own rates")):
        for name in names:
            _put(measured, f"{name}, BN/plain, {words}", compare(role, name))
    for name in names:
        found = compare(LOW_BN, name, base=LOW)
        _put(measured, f"{name}, BN/plain, same lower rate", found)
    half = dispatches // 2
    for words, part in (("at the first step", slice(1)), ("second half", slice(half, None))):
        for name in names[:3]:
            _put(measured, f"{name}, BN/plain, same rate, {words}", compare(SAME, name, part))
    for role, records in trained.items():
        cosines = [np.nanmean(c["cosine at the step"]) for c in curves[role]]
        measured[f"cosine at the step, {role}"] = float(np.mean(cosines))
        norms = [record["surface"]["param_norm"][-1] for record in records]
        measured[f"‖θ‖ at the end, {role}"] = float(np.mean(np.array(norms, float)))
        measured[f"training loss at the end, {role}"] = float(
            np.mean([final_loss(record) for record in records])
        )
        measured[f"rate, {role}"] = records[0]["rate"]
    own = compare(OWN, "loss range"), compare(OWN, "gradient distance")
    low = [compare(LOW_BN, name, base=LOW) for name in ("loss range", "gradient distance")]
    note = (
        "interval: of the ratio of ranges of the loss; that of the gradient distances is "
        f"{format_number(gradient.mean.low)} {format_interval(gradient.interval)}. Each arm at its "
        f"own best rate: {format_number(own[0].mean.low)} {format_interval(own[0].interval)} and "
        f"{format_number(own[1].mean.low)} {format_interval(own[1].interval)}. At the next lower "
        f"rate of the grid, {trained[LOW][0]['rate']:g}: {format_number(low[0].mean.low)} "
        f"{format_interval(low[0].interval)} and {format_number(low[1].mean.low)} "
        f"{format_interval(low[1].interval)}. Distances are in "
        "units of the weights and of the gradient, of which BN changes the scale; free of it are "
        "the relative distance and the cosine." + _notes(config, trained)
    )
    verdict = conjunction(decide(loss.interval, at_most=1), decide(gradient.interval, at_most=1))
    return Finding(CLAIMS[0], measured, loss.interval, verdict, note.strip())


def judge_sharpness(
    config: Any, trained: Mapping[str, Sequence[Record]], descents: Descents
) -> Finding:
    """sharpness-sets-the-rate."""
    roles = dict(zip(ARMS, (PLAIN, SAME), strict=True))
    sharpness = {arm: sharpness_at_start(trained[role]) for arm, role in roles.items()}
    factors = {arm: stable_factors(config, descents, arm) for arm in ARMS}
    rates = {
        arm: [
            _scaled(f, 2 / value.low) for f, value in zip(factors[arm], sharpness[arm], strict=True)
        ]
        for arm in ARMS
    }
    flatter = compared(sharpness["plain"], sharpness["BN"])
    stable = compared(rates["BN"], rates["plain"])
    explained = compared(factors["BN"], factors["plain"])  # since a rate is a factor times 2/λmax
    frozen = [exact(record["frozen"]["largest"][0]) for record in trained[SAME]]
    measured: dict[str, float] = {}
    _put(measured, "1/λmax at the start, BN/plain", flatter)
    _put(measured, "largest stable rate, BN/plain", stable)
    _put(measured, "the second over the first", explained)
    for arm in ARMS:
        one = [exact(1.0)] * len(factors[arm])
        _put(measured, f"largest stable rate/(2/λmax), {arm}", compared(factors[arm], one))
        measured[f"λmax at the start, {arm}"] = _mean(sharpness[arm])
    measured["λmax at the start, BN, statistics frozen"] = _mean(frozen)
    _put(measured, "1/λmax at the start, frozen, BN/plain", compared(sharpness["plain"], frozen))
    for role, records in trained.items():
        for kind, words in (("through", ""), ("frozen", ", statistics frozen")):
            if kind in records[0]:
                last = [_scaled(exact(r[kind]["largest"][-1]), r["rate"]) for r in records]
                measured[f"rate·λmax late in SGD, {role}{words}"] = _mean(last)
    measured["largest relative residual of λmax"] = largest_residual(
        [record for records in trained.values() for record in records]
    )
    beyond = sum(math.isinf(f.high) for arm in ARMS for f in factors[arm])
    none = sum(f.low == UNBOUNDED.low for arm in ARMS for f in factors[arm])
    return Finding(
        CLAIMS[1],
        measured,
        flatter.interval,
        conjunction(
            decide(flatter.interval, at_least=1),
            decide(explained.interval, at_least=1 / _AGREE, at_most=_AGREE),
        ),
        "interval: of the ratio of 1/λmax; the ratio of the largest stable rates over it is "
        f"{format_interval(explained.interval)}, that ratio itself "
        f"{format_interval(stable.interval)}. A rate is stable if after {config.descent_steps} "
        f"steps the loss is finite and {TRAINS:g} nats below guessing. The largest lies between "
        "two of a grid of multiples of each network's own 2/λmax, "
        f"{format_number(min(config.descent_factors))} to "
        f"{format_number(max(config.descent_factors))}: of {2 * config.seeds} networks {beyond} "
        f"were stable to its end and {none} nowhere. λmax is of {config.fixed_examples} examples",
    )


def judge_edge(config: Any, edges: Mapping[str, Sequence[Record]]) -> Finding:
    """edge-of-stability."""
    measured: dict[str, float] = {}
    for arm, records in edges.items():
        curves = [edge_curve(config, record) for record in records]
        last = [curve[-max(1, len(curve) // 4) :] for curve in curves]
        lost = sum(not np.isfinite(part).all() for part in last)
        name = f"rate·λmax at the end, {arm}"
        verdict = INCONCLUSIVE
        if lost:
            measured[name] = math.nan
        else:
            found = estimate([float(np.mean(part)) for part in last])
            measured |= {name: found.mean, f"{name}, low": found.low, f"{name}, high": found.high}
            verdict = decide(found, at_least=_EDGE[0], at_most=_EDGE[1])
            if verdict == NOT_REPRODUCED and found.low <= _EDGE[1]:
                verdict = INCONCLUSIVE
        if arm == "plain":
            decided = verdict, None if lost else found.interval
        measured[f"rate·λmax at the start, {arm}"] = float(np.mean([c[0] for c in curves]))
        measured[f"rate, {arm}"] = float(np.mean([record["rate"] for record in records]))
        measured[f"largest rate·λmax, {arm}"] = float(np.mean([np.nanmax(c) for c in curves]))
        measured[f"loss at the end, {arm}"] = float(np.mean([final_loss(r) for r in records]))
        measured[f"runs that were lost, {arm}"] = lost
    everyone = [record for records in edges.values() for record in records]
    measured["largest relative residual of λmax"] = largest_residual(everyone)
    verdict, interval = decided
    return Finding(
        CLAIMS[2],
        measured,
        interval,
        verdict,
        f"interval: of the plain network. {config.edge_steps} steps by {config.fixed_examples} "
        f"examples at {config.edge_factor:g} times each network's own 2/λmax at the start, "
        "statistics of that batch differentiated through",
    )


def _scaled(bounds: Bounded, factor: float) -> Bounded:
    return Bounded(bounds.low * factor, bounds.high * factor)


def _mean(values: Sequence[Bounded]) -> float:
    return float(np.mean([math.nan if value.is_censored else value.low for value in values]))


def _put(measured: dict[str, float], name: str, found: Ratio) -> None:
    """A ratio with its interval; where the mean is a bound, its middle on a log scale."""
    mean = found.mean
    middle = mean.low if not mean.is_censored else math.sqrt(mean.low * mean.high)
    measured |= {name: middle, f"{name}, low": found.low, f"{name}, high": found.high}


def _notes(config: Any, trained: Mapping[str, Sequence[Record]]) -> str:
    """Runs that were lost, and rates at an end of the grid."""
    lost = {role: sum(r["diverged"] > 0 for r in records) for role, records in trained.items()}
    text = "".join(f" {count} of {role} diverged." for role, count in lost.items() if count)
    guessing = math.log(num_logits(config.network)) - TRAINS
    for role, records in trained.items():
        flat = sum(final_loss(record) > guessing for record in records)
        if flat:
            text += (
                f" {flat} of {len(records)} of {role} did not learn: where all units are dead the "
                "surface is flat, and counts as smooth."
            )
    for role in (PLAIN, OWN):
        rate = trained[role][0]["rate"]
        if rate in (min(config.rates), max(config.rates)):
            text += f" The best rate of {role}, {rate:g}, lies at an end of the grid."
    return text
