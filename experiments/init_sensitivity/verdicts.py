"""The claims of `experiments.init_sensitivity`, with their criteria, and the verdicts on them."""

import math
from collections.abc import Mapping

import numpy as np

from bn_research.claims import Claim, Finding, decide, estimate, paired_difference
from bn_research.claims.estimate import Estimate, slope
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, conjunction
from bn_research.claims.formatting import format_interval
from bn_research.claims.judging import Record, by_seed, listed, numbers, with_intervals
from bn_research.models.spec import num_logits
from experiments.init_sensitivity import Config, training
from experiments.init_sensitivity.training import Best, Cell, Records, final_loss

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam"}
RESCUED = Cell(0.0)  # BN on the last layer as the claims mean it: ε = 0, SGD, no biases
_UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0)

CLAIMS = (
    Claim(
        id="tiny-init-vanishing-signal",
        statement="With weights from U(-0.001, 0.001) pre-activations shrink layer by layer, to "
        "the order of 1e-11 at the last",
        source="Notes on Ioffe & Szegedy (2015)",
        criterion="Reproduced if for every listed network, input scale and layer the measured "
        "log10 σ is within 0.5 of theory (interval over seeds of the largest deviation) and some "
        "network's last σ lies in [1e-12, 1e-10]; not reproduced if none does, or the largest "
        "deviation is surely above 0.5",
        expected="last σ from 1e-14 to 1e-11, by network and input scale",
    ),
    Claim(
        id="no-training-without-bn",
        statement="Without BN the badly initialized network does not train at all",
        source="Notes on Ioffe & Szegedy (2015)",
        criterion="Reproduced if plain SGD ends within 0.01 of the loss of guessing, ln(classes), "
        "at every rate of the grid and every seed, while the same network with He's init trains "
        "(accuracy above 0.5); not reproduced if the deviation is surely above 0.01",
        expected="loss = ln 10 at every rate; He init trains",
    ),
    Claim(
        id="bn-last-layer-suffices",
        statement="BN on the last layer alone, right before the softmax, is enough to train",
        source="Notes on Ioffe & Szegedy (2015)",
        criterion="Reproduced if with ε = 0, SGD (rate chosen on a seed apart) and no biases, "
        "accuracy is above 0.5, and the steps to leave the plateau grow as ε to the power "
        "0.5 ± 0.1; not reproduced if the accuracy is surely below 0.5",
        expected="ε = 0 trains; slope 0.5; at ε = 1e-5 SGD stays at ln 10",
    ),
    Claim(
        id="init-robustness",
        statement="With BN the initial weights need less tweaking",
        source="Notes on Ioffe & Szegedy (2015); Paper section 3.3",
        criterion="Over a = 1e-4 … 1 (quick: 1e-3 … 1), rates chosen from one grid on a seed "
        "apart: reproduced if BN on all layers spreads by at most 3 points of accuracy, and by at "
        "least 10 points less than plain; not reproduced if the difference of the spreads is "
        "surely below 10 points",
        expected="BN at most 3 points, plain about 90",
    ),
    Claim(
        id="last-layer-only",
        statement="The last layer is the only one whose BN alone rescues the network",
        source="prediction of the theory above: below a BN on layer k the layers k + 1, k + 2, … "
        "shrink the signal again",
        criterion="With plain SGD and ε = 0, rates chosen on a seed apart: reproduced if BN on the "
        "last layer alone reaches accuracy 0.5 and BN on any other single layer stays below it "
        "(interval over seeds of the largest); not reproduced if another surely reaches it, or the "
        "last surely does not",
        expected="last above 0.5, all others at 0.1",
    ),
)


def judge(config: Config, records: Records) -> list[Finding]:
    """A finding for each claim."""
    return [
        judge_signal(config, records.signal),
        judge_plain(config, records.plain, records.best),
        judge_last(config, records.best),
        judge_robustness(config, records.best),
        judge_layers(config, records.best),
    ]


def accuracies(best: Best, role: str | Cell) -> np.ndarray:
    """Test accuracy of each seed."""
    return numbers(best[str(role)], "accuracy")


def judge_signal(config: Config, signal: list[Record]) -> Finding:
    """tiny-init-vanishing-signal."""

    def deviation(record: Record) -> float:
        return np.abs(np.subtract(record["measured"], record["predicted"])).max()

    here = [record for record in signal if record["a"] == config.a]
    largest = estimate(
        [numbers(by_seed(here, seed=seed), deviation).max() for seed in range(config.seeds)]
    )
    measured = {"largest |log10 σ - theory|": largest.mean}
    if elsewhere := [deviation(record) for record in signal if record["a"] != config.a]:
        measured["largest |log10 σ - theory|, other a"] = max(elsewhere)
    last = {}
    for network, scale in dict.fromkeys((r["network"], r["input_scale"]) for r in here):
        group = by_seed(here, network=network, input_scale=scale)
        last[f"log10 σ_last, {network}, {scale}"] = numbers(group, "measured")[:, -1].mean()
    in_range = sum(-12 <= value <= -10 for value in last.values())
    return Finding(
        CLAIMS[0],
        measured | last,
        largest.interval,
        decide(largest, at_most=0.5) if in_range else NOT_REPRODUCED,
        note=f"{in_range} of {len(last)} combinations of network and input scale end between 1e-12 "
        "and 1e-10; interval: of the largest deviation over all layers",
    )


def judge_plain(config: Config, plain: list[list[Record]], best: Best) -> Finding:
    """no-training-without-bn."""
    losses = np.array([numbers(row, final_loss) for row in plain])
    deviations = np.abs(losses - math.log(num_logits(config.network))).max(axis=0)
    he = estimate(accuracies(best, "plain, he"))
    measured = {"largest |loss - ln C|": deviations.max()}
    others = [f"plain, {scheme}" for scheme in config.schemes if scheme != "he"]
    for role in (training.PLAIN, "plain, he", "plain, Adam", *others):
        measured[f"accuracy, {role}"] = accuracies(best, role).mean()
    note = (
        "interval: of the largest deviation over the rates. Control with Adam (optax's defaults): "
        f"loss {numbers(best['plain, Adam'], final_loss).mean():.4g} after {config.num_steps} steps"
    )
    if diverged := sum(record["diverged"] > 0 for row in plain for record in row):
        note += f"; {diverged} plain runs diverged"
    if not np.isfinite(deviations).all():
        return Finding(CLAIMS[1], measured, None, INCONCLUSIVE, note)
    largest = estimate(deviations)
    control = REPRODUCED if decide(he, at_least=0.5) == REPRODUCED else INCONCLUSIVE
    verdict = conjunction(decide(largest, at_most=0.01), control)
    return Finding(CLAIMS[1], measured, largest.interval, verdict, note)


def escape(
    config: Config, best: Best, optimizer: str = "sgd", use_bias: bool = False
) -> tuple[np.ndarray, np.ndarray, Estimate | None]:
    """Each ε; the steps until a batch's loss left the plateau; their exponent in ε, over seeds.

    Steps are [ε, seed], NaN where it did not in time; without three ε that all seeds escaped at
    there is no exponent.
    """
    level = training.escape_level(config)

    def steps(record: Record) -> float:
        below = np.flatnonzero(np.array(record["loss"], dtype=float) < level)
        return below[0] + 1 if len(below) else math.nan

    cells = training.escape_cells(config, optimizer, use_bias)
    epsilons = np.array([cell.epsilon for cell in cells])
    rows = [numbers(best[f"escape {cell}"], steps) for cell in cells]
    found = np.reshape(rows, (len(cells), config.seeds))
    whole = np.isfinite(found).all(axis=1)
    if whole.sum() < 3:
        return epsilons, found, None
    x = np.log10(epsilons[whole])
    slopes = [slope(x, np.log10(column)).mean for column in found[whole].T]
    return epsilons, found, estimate(slopes)


def judge_last(config: Config, best: Best) -> Finding:
    """bn-last-layer-suffices."""
    accuracy = estimate(accuracies(best, RESCUED))
    _, steps, exponent = escape(config, best)
    measured = {
        "accuracy, ε = 0": accuracy.mean,
        "best rate, ε = 0": best[str(RESCUED)][0]["learning_rate"],
        **with_intervals({"escape exponent": exponent or _UNKNOWN}),
    }
    others = []
    for optimizer, use_bias in config.columns:
        if (optimizer, use_bias) == ("sgd", False):
            continue
        _, found, other = escape(config, best, optimizer, use_bias)
        name = f"{optimizer}{' bias' if use_bias else ''}"
        measured[f"escape exponent, {name}"] = (other or _UNKNOWN).mean
        others.append(f"{name}: {other or 'fewer than 3 ε had all left the plateau'}")
        if censored := np.isnan(found).sum():
            others[-1] += f", {censored} runs had not left"
    for cell in training.last_cells(config):
        measured[f"accuracy, {cell}"] = accuracies(best, cell).mean()
    verdict = decide(accuracy, at_least=0.5)
    if verdict != NOT_REPRODUCED:
        law = decide(exponent, at_least=0.4, at_most=0.6) if exponent else INCONCLUSIVE
        verdict = REPRODUCED if verdict == law == REPRODUCED else INCONCLUSIVE
    note = "interval: of the accuracy with ε = 0"
    if censored := np.isnan(steps).sum():
        note += f"; {censored} runs had not left the plateau after {config.escape_steps} steps "
        note += "and their ε is left out of the fit"
    note += listed("Escape exponents with intervals", others, "; ")
    return Finding(CLAIMS[2], measured, accuracy.interval, verdict, note)


def judge_robustness(config: Config, best: Best) -> Finding:
    """init-robustness."""
    roles = [{f"{a:g}": f"{where} a={a:g}" for a in config.widths} for where in ("none", "all")]
    found = np.array([[accuracies(best, role) for role in group.values()] for group in roles])
    plain, normalized = np.ptp(found, axis=1)  # spreads of each seed
    small, difference = estimate(normalized), paired_difference(plain, normalized)
    verdict = decide(difference, at_least=0.1)
    if verdict == REPRODUCED and decide(small, at_most=0.03) != REPRODUCED:
        verdict = INCONCLUSIVE
    plain_told, told = (_by_setting(best, group) for group in roles)
    return Finding(
        CLAIMS[3],
        {
            "spread, BN on all layers": small.mean,
            "spread, plain": plain.mean(),
            "difference of spreads": difference.mean,
            "lowest accuracy, BN on all layers": found[1].mean(axis=1).min(),
        },
        small.interval,
        verdict,
        note="interval: of the spread with BN; difference of the spreads in "
        f"{format_interval(difference.interval)}. Accuracy by a, with intervals: BN on all layers "
        f"{told}; plain {plain_told}",
    )


def judge_layers(config: Config, best: Best) -> Finding:
    """last-layer-only."""
    last = estimate(accuracies(best, RESCUED))
    rows = training.layer_rows(config)
    others = [cell for row in rows for cell in row[:-1]]
    measured = {"accuracy, last layer, ε = 0, SGD": last.mean}
    measured |= {f"accuracy, {cell}": accuracies(best, cell).mean() for cell in others}
    if not config.layers:
        note = "only the last layer was run (layers=())"
        return Finding(CLAIMS[4], measured, None, INCONCLUSIVE, note)
    like_last = next(row[:-1] for row in rows if row[-1] == RESCUED)
    largest = estimate(np.max([accuracies(best, cell) for cell in like_last], axis=0))
    told = [
        f"{OPTIMIZERS[row[0].optimizer]}, ε = {row[0].epsilon:g}: "
        + _by_setting(best, {str(cell.placement): str(cell) for cell in row})
        for row in rows
    ]
    return Finding(
        CLAIMS[4],
        measured,
        largest.interval,
        conjunction(decide(last, at_least=0.5), decide(largest, at_most=0.5)),
        note="interval: of the largest accuracy with BN on one other layer, SGD, ε = 0. Accuracy "
        f"by layer, with intervals: {'; '.join(told)}",
    )


def _by_setting(best: Best, roles: Mapping[str, str]) -> str:
    """Mean accuracy with its interval, of those of several roles that were run, in a line."""
    run = {name: role for name, role in roles.items() if role in best}
    return ", ".join(f"{name}: {estimate(accuracies(best, run[name]))}" for name in run)
