"""The claims of `experiments.loss_surface`, what of the records they compare, and the verdicts."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bn_research.claims.bounded import UNBOUNDED, Bounded, Ratio, known, mean_of_curve, open_ratio
from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate
from bn_research.claims.finding import INCONCLUSIVE, Finding, conjunction, decide, verdict_of
from bn_research.claims.formatting import format_interval, format_number
from bn_research.claims.judging import Record, at_end, final, numbers, with_intervals
from bn_research.claims.plots import padded
from bn_research.models.spec import num_logits
from experiments.loss_surface import Config

PLAIN, SAME, OWN = "plain", "BN, plain's rate", "BN, own rate"  # roles of the SGD runs
LOW, LOW_BN = "plain, lower rate", "BN, lower rate"  # the rate of the grid below plain's best
ARMS = {"plain": PLAIN, "BN": SAME}  # and the roles in which each also descends by one batch
TRAINS = 0.2  # nats below the loss of guessing
_AGREE = 4.0
_EDGE = (1.5, 3.0)


class Records(NamedTuple):
    """Of a run; each list is in order of seeds."""

    surfaces: Mapping[str, Sequence[Record]]  # of SGD, by role
    descents: Mapping[tuple[str, float], Sequence[Record]]  # by one batch, by arm and factor
    edges: Mapping[str, Sequence[Record]]  # likewise, λmax followed, by arm


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


def judge(config: Config, records: Records) -> list[Finding]:
    """A finding for each claim."""
    return [f(config, records) for f in (judge_surface, judge_sharpness, judge_edge)]


def judge_surface(config: Config, records: Records) -> Finding:
    """smoother-along-the-step."""
    trained = records.surfaces
    dispatches = config.num_steps // config.steps_per_dispatch
    curves = {role: [surface_curves(r, dispatches) for r in runs] for role, runs in trained.items()}

    def compare(role: str, name: str, part: slice = slice(None)) -> Ratio:
        sides = (curves[side] for side in (role, LOW if role == LOW_BN else PLAIN))
        return open_ratio(*([mean_of_curve(c[name][part]) for c in side] for side in sides))

    measured: dict[str, float | Ratio] = {}
    names = [name for name in curves[PLAIN][0] if name != "cosine at the step"]
    for role, words in ((SAME, "same rate"), (OWN, "own rates"), (LOW_BN, "same lower rate")):
        measured |= {f"{n}, BN/plain, {words}": compare(role, n) for n in names}
    first, half = slice(1), slice(dispatches // 2, None)
    for words, part in (("at the first step", first), ("second half", half)):
        words = f"BN/plain, same rate, {words}"
        measured |= {f"{name}, {words}": compare(SAME, name, part) for name in names[:3]}
    for role, runs in trained.items():
        cosines = [np.nanmean(c["cosine at the step"]) for c in curves[role]]
        norms = numbers(runs, lambda record: record["surface"]["param_norm"][-1])
        measured |= {
            f"cosine at the step, {role}": np.mean(cosines),
            f"‖θ‖ at the end, {role}": norms.mean(),
            f"training loss at the end, {role}": numbers(runs, final_loss).mean(),
            f"rate, {role}": runs[0]["rate"],
        }
    (loss, gradient), own, low = (
        [compare(role, name) for name in ("loss range", "gradient distance")]
        for role in (SAME, OWN, LOW_BN)
    )
    note = (
        "interval: of the ratio of ranges of the loss; that of the gradient distances is "
        f"{gradient}. Each arm at its own best rate: {own[0]} and {own[1]}. At the next lower rate "
        f"of the grid, {trained[LOW][0]['rate']:g}: {low[0]} and {low[1]}. Distances are in units "
        "of the weights and of the gradient, of which BN changes the scale; free of it are the "
        "relative distance and the cosine." + _notes(config, trained)
    )
    verdict = conjunction(decide(loss.interval, at_most=1), decide(gradient.interval, at_most=1))
    return Finding(CLAIMS[0], _numbers(measured), loss.interval, verdict, note)


def judge_sharpness(config: Config, records: Records) -> Finding:
    """sharpness-sets-the-rate."""
    trained = records.surfaces
    start = {arm: sharpness(trained[role]) for arm, role in ARMS.items()}
    frozen = sharpness(trained[SAME], "frozen")
    factors = {arm: stable_factors(config, records.descents, arm) for arm in ARMS}
    rates = {
        arm: [
            Bounded(low * limit, high * limit)
            for (low, high), limit in zip(factors[arm], limits(trained[role]), strict=True)
        ]
        for arm, role in ARMS.items()
    }
    flatter = open_ratio(known(start["plain"]), known(start["BN"]))
    stable = open_ratio(rates["BN"], rates["plain"])
    explained = open_ratio(factors["BN"], factors["plain"])  # since a rate is a factor times 2/λmax
    measured: dict[str, float | Ratio] = {
        "1/λmax at the start, BN/plain": flatter,
        "largest stable rate, BN/plain": stable,
        "the second over the first": explained,
    }
    limit = known(np.ones(config.seeds))
    for arm in ARMS:
        measured[f"largest stable rate/(2/λmax), {arm}"] = open_ratio(factors[arm], limit)
        measured[f"λmax at the start, {arm}"] = start[arm].mean()
    measured |= {
        "λmax at the start, BN, statistics frozen": frozen.mean(),
        "1/λmax at the start, frozen, BN/plain": open_ratio(known(start["plain"]), known(frozen)),
    }
    for role, runs in trained.items():
        for kind, words in (("through", ""), ("frozen", ", statistics frozen")):
            if kind in runs[0]:
                last = sharpness(runs, kind, at=-1) * numbers(runs, "rate")
                measured[f"rate·λmax late in SGD, {role}{words}"] = last.mean()
    measured["largest relative residual of λmax"] = largest_residual(trained)
    lows, highs = np.transpose([*factors["plain"], *factors["BN"]])
    none, beyond = np.sum(lows == UNBOUNDED.low), np.sum(np.isinf(highs))
    return Finding(
        CLAIMS[1],
        _numbers(measured),
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


def judge_edge(config: Config, records: Records) -> Finding:
    """edge-of-stability."""
    measured: dict[str, float | Estimate] = {}
    ends = {}
    for arm, runs in records.edges.items():
        curves = edge_curves(config, runs)
        last = curves[:, -max(1, curves.shape[1] // 4) :].mean(axis=1)
        died = int(np.isnan(last).sum())
        ends[arm] = None if died else estimate(last)
        measured |= {
            f"rate·λmax at the end, {arm}": ends[arm] or math.nan,
            f"rate·λmax at the start, {arm}": curves[:, 0].mean(),
            f"rate, {arm}": numbers(runs, "rate").mean(),
            f"largest rate·λmax, {arm}": np.nanmax(curves, axis=1).mean(),
            f"loss at the end, {arm}": numbers(runs, final_loss).mean(),
            f"runs that were lost, {arm}": died,
        }
    measured["largest relative residual of λmax"] = largest_residual(records.edges)
    found, (low, high), verdict = ends["plain"], _EDGE, INCONCLUSIVE
    if found:
        reproduced = low <= found.low and found.high <= high
        verdict = verdict_of(reproduced=reproduced, refuted=found.low > high)
    return Finding(
        CLAIMS[2],
        with_intervals(measured),
        found and found.interval,
        verdict,
        f"interval: of the plain network. {config.edge_steps} steps by {config.fixed_examples} "
        f"examples at {config.edge_factor:g} times each network's own 2/λmax at the start, "
        "statistics of that batch differentiated through",
    )


def surface_curves(record: Record, dispatches: int) -> dict[str, np.ndarray]:
    """What is compared of an SGD run, of each of the dispatches that a whole one has.

    NaN where a loss was not finite or the run had ended.
    """
    found = {name: np.array(leaf, float) for name, leaf in record["surface"].items()}
    curves = {
        "loss range": found["loss"].max(axis=1) - found["loss"].min(axis=1),
        "gradient distance": found["gradient_distance"].max(axis=1),
        "effective smoothness": found["smoothness"],
        "relative gradient distance": found["relative_gradient_distance"].max(axis=1),
        "gradient norm": found["start_gradient_norm"],
        "smoothness·‖θ‖²": found["smoothness"] * found["param_norm"] ** 2,
        "cosine at the step": found["cosine"][:, 1],
    }
    return dict(zip(curves, padded(list(curves.values()), dispatches), strict=True))


def edge_curves(config: Config, runs: Sequence[Record]) -> np.ndarray:
    """rate·λmax of each run and dispatch; NaN from where a run had ended."""
    dispatches = config.edge_steps // config.steps_per_dispatch
    found = padded([run["through"]["largest"] for run in runs], dispatches)
    return found * numbers(runs, "rate")[:, None]


def sharpness(runs: Sequence[Record], kind: str = "through", *, at: int = 0) -> np.ndarray:
    """λmax of each seed when it was first measured, or at another time; NaN unless positive."""
    found = numbers(runs, lambda run: run[kind]["largest"][at])
    return np.where(found > 0, found, np.nan)


def limits(runs: Sequence[Record]) -> list[float]:
    """2/λmax of each seed at the start; beyond all bounds where λmax is not known."""
    return (2 / np.nan_to_num(sharpness(runs), nan=UNBOUNDED.low)).tolist()


def stable_factors(config: Config, descents: Mapping, arm: str) -> list[Bounded]:
    """Largest multiple of 2/λmax that is stable, of each seed; the next of the grid is not."""
    factors = sorted(config.descent_factors)
    ends = [UNBOUNDED.low, *factors, UNBOUNDED.high]
    found = []
    for seed in range(config.seeds):
        stable = [is_stable(config, descents[arm, factor][seed]) for factor in factors]
        best = max(itertools.compress(range(1, len(ends)), stable), default=0)
        found.append(Bounded(ends[best], ends[best + 1]))
    return found


def is_stable(config: Config, record: Record) -> bool:
    """Whether a descent ends below the loss of guessing, as one that is thrown out does not."""
    guessing = math.log(num_logits(config.network))
    return not record["diverged"] and final_loss(record) < guessing - TRAINS


def final_loss(record: Record) -> float:
    """Mean training loss over the last tenth of the steps; infinite if one is not finite."""
    loss = final(record["loss"])
    return loss if math.isfinite(loss) else math.inf


def largest_residual(runs: Mapping[str, Sequence[Record]]) -> float:
    """Of λmax, relative to it, over all runs."""
    found = [
        np.abs(np.array(record[kind]["largest_residual"], float))
        / np.abs(np.array(record[kind]["largest"], float))
        for record in itertools.chain(*runs.values())
        for kind in ("through", "frozen")
        if kind in record
    ]
    return float(np.nanmax(np.concatenate(found)))


def _numbers(found: Mapping[str, float | Ratio]) -> dict[str, float]:
    """Ratios with their intervals; where a mean is a bound, its middle on a log scale."""
    means = {name: number.mean for name, number in found.items() if isinstance(number, Ratio)}
    return with_intervals(found) | {
        name: math.sqrt(mean.low * mean.high) if mean.is_censored else mean.low
        for name, mean in means.items()
    }


def _notes(config: Config, trained: Mapping[str, Sequence[Record]]) -> str:
    """Runs that were lost, and rates at an end of the grid."""
    text, guessing = "", math.log(num_logits(config.network)) - TRAINS
    flat = "did not learn: where all units are dead the surface is flat, and counts as smooth."
    for role, records in trained.items():
        if died := sum(record["diverged"] > 0 for record in records):
            text += f" {died} of {role} diverged."
    for role, records in trained.items():
        if dead := sum(final_loss(record) > guessing for record in records):
            text += f" {dead} of {len(records)} of {role} {flat}"
    for role in (PLAIN, OWN):
        rate = trained[role][0]["rate"]
        if at_end(rate, config.rates):
            text += f" The best rate of {role}, {rate:g}, lies at an end of the grid."
    return text
