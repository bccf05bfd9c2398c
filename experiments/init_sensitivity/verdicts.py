"""The claims of `experiments.init_sensitivity`, with their criteria, and the verdicts on them."""

import math
from typing import Any

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate, paired_difference, slope
from bn_research.claims.finding import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Finding,
    conjunction,
    decide,
)
from bn_research.claims.formatting import format_interval, format_number
from bn_research.models.spec import num_logits

PLAIN = "plain"  # the role whose claim is about every rate, not about the best
Best = dict[str, list[dict[str, Any]]]  # role -> records of its best rate, by seed


def grid_cell(epsilon: float, optimizer: str, use_bias: bool, placement: str | int = "last") -> str:
    """Role of BN on one layer with an ε, an optimizer, and biases or none."""
    return f"{placement} ε={epsilon:g} {optimizer}{' bias' if use_bias else ''}"


def layer_cells(config: Any) -> list[tuple[str, float]]:
    """Optimizers and ε of the runs with BN on a single layer before the last."""
    cells = [("sgd", epsilon) for epsilon in config.layer_epsilons]
    return cells + [("adam", epsilon) for epsilon in config.adam_layer_epsilons]


def escape_role(epsilon: float, optimizer: str, use_bias: bool) -> str:
    """Role of a run that counts the steps to leave the plateau."""
    return f"escape {grid_cell(epsilon, optimizer, use_bias)}"


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


def final_loss(record) -> float:
    """Mean loss of the last steps; infinite when the run diverged."""
    if record["diverged"]:
        return math.inf
    return float(np.mean(record["loss"][-20:]))


def accuracies(records: list[dict]) -> list[float]:
    """Test accuracy of each seed."""
    return [record["accuracy"] for record in records]


def judge_signal(config: Any, signal: list[dict]) -> Finding:
    """tiny-init-vanishing-signal."""
    deviations: list[list[float]] = [[] for _ in range(config.seeds)]
    last: dict[tuple[str, str], list[float]] = {}
    elsewhere: list[float] = []
    for record in signal:
        gap = np.subtract(record["measured"], record["predicted"])
        if record["a"] != config.a:
            elsewhere.append(float(np.max(np.abs(gap))))
            continue
        deviations[record["seed"]].append(float(np.max(np.abs(gap))))
        key = record["network"], record["input_scale"]
        last.setdefault(key, []).append(record["measured"][-1])
    largest = estimate([max(values) for values in deviations])
    means = {key: float(np.mean(values)) for key, values in last.items()}
    in_range = [key for key, value in means.items() if -12 <= value <= -10]
    measured = {"largest |log10 σ - theory|": largest.mean}
    if elsewhere:
        measured["largest |log10 σ - theory|, other a"] = max(elsewhere)
    measured |= {
        f"log10 σ_last, {network}, {scale}": value for (network, scale), value in means.items()
    }
    verdict = decide(largest, at_most=0.5) if in_range else NOT_REPRODUCED
    return Finding(
        CLAIMS[0],
        measured,
        largest.interval,
        verdict,
        note=f"{len(in_range)} of {len(means)} combinations of network and input scale end "
        "between 1e-12 and 1e-10; interval: of the largest deviation over all layers",
    )


def judge_plain(config: Any, plain: list[list[dict]], best: Best) -> Finding:
    """no-training-without-bn."""
    guessing = math.log(num_logits(config.network))
    by_seed = [
        max(abs(final_loss(row[seed]) - guessing) for row in plain) for seed in range(config.seeds)
    ]
    diverged = sum(record["diverged"] > 0 for row in plain for record in row)
    he = estimate(accuracies(best["plain, he"]))
    measured = {
        "largest |loss - ln C|": max(by_seed),
        "accuracy, plain": float(np.mean(accuracies(best[PLAIN]))),
        "accuracy, plain, he": he.mean,
        "accuracy, plain, Adam": float(np.mean(accuracies(best["plain, Adam"]))),
    }
    measured |= {
        f"accuracy, plain, {scheme}": float(np.mean(accuracies(best[f"plain, {scheme}"])))
        for scheme in config.schemes
        if scheme != "he"
    }
    note = (
        "interval: of the largest deviation over the rates. Control with Adam (optax's defaults): "
        f"loss {np.mean([final_loss(r) for r in best['plain, Adam']]):.4g} after "
        f"{config.num_steps} steps"
    )
    if diverged:
        note += f"; {diverged} plain runs diverged"
    if not np.all(np.isfinite(by_seed)):
        return Finding(CLAIMS[1], measured, None, INCONCLUSIVE, note)
    deviation = estimate(by_seed)
    control = REPRODUCED if decide(he, at_least=0.5) == REPRODUCED else INCONCLUSIVE
    verdict = conjunction(decide(deviation, at_most=0.01), control)
    return Finding(CLAIMS[1], measured, deviation.interval, verdict, note)


def escape_level(config: Any) -> float:
    """A loss that only a network that has begun to learn reaches: 0.1 below guessing."""
    return math.log(num_logits(config.network)) - 0.1


def escape_epsilons(config: Any, optimizer: str) -> tuple[float, ...]:
    """ε at which the steps to leave the plateau are counted with an optimizer."""
    ladders = {"sgd": config.escape_epsilons, "adam": config.adam_escape_epsilons}
    return ladders[optimizer]


def escape_steps(
    config: Any, best: Best, optimizer: str = "sgd", use_bias: bool = False
) -> np.ndarray:
    """Steps until a batch's loss left the plateau, [ε, seed]; NaN where it did not in time."""
    epsilons = escape_epsilons(config, optimizer)
    steps = np.full((len(epsilons), config.seeds), np.nan)
    for row, epsilon in enumerate(epsilons):
        records = best[escape_role(epsilon, optimizer, use_bias)]
        for seed, record in enumerate(records):
            below = np.flatnonzero(np.array(record["loss"], dtype=float) < escape_level(config))
            if len(below):
                steps[row, seed] = below[0] + 1
    return steps


def escape_slope(
    config: Any, best: Best, optimizer: str = "sgd", use_bias: bool = False
) -> Estimate | None:
    """Exponent of the escape time in ε, over seeds; None when fewer than 3 ε have all escaped."""
    steps = escape_steps(config, best, optimizer, use_bias)
    whole = np.isfinite(steps).all(axis=1)
    if whole.sum() < 3:
        return None
    x = np.log10(np.array(escape_epsilons(config, optimizer))[whole])
    return estimate([slope(x, np.log10(column)).mean for column in steps[whole].T])


def judge_last(config: Any, best: Best) -> Finding:
    """bn-last-layer-suffices."""
    rescued = best[grid_cell(0.0, "sgd", False)]
    accuracy = estimate(accuracies(rescued))
    exponent = escape_slope(config, best)
    measured = {
        "accuracy, ε = 0": accuracy.mean,
        "best rate, ε = 0": rescued[0]["learning_rate"],
        "escape exponent": exponent.mean if exponent else math.nan,
        "escape exponent, low": exponent.low if exponent else math.nan,
        "escape exponent, high": exponent.high if exponent else math.nan,
    }
    others = ""
    for optimizer in config.optimizers:
        for use_bias in config.biases:
            if (optimizer, use_bias) != ("sgd", False):
                other = escape_slope(config, best, optimizer, use_bias)
                column = f"{optimizer}{' bias' if use_bias else ''}"
                measured[f"escape exponent, {column}"] = other.mean if other else math.nan
                lost = int(np.isnan(escape_steps(config, best, optimizer, use_bias)).sum())
                others += f"; {column}: " + (
                    f"{format_number(other.mean)} {format_interval(other.interval)}"
                    if other
                    else "fewer than 3 ε had all left the plateau"
                )
                others += f", {lost} runs had not left" if lost else ""
    for epsilon in config.epsilons:
        for optimizer in config.optimizers:
            for use_bias in config.biases:
                cell = grid_cell(epsilon, optimizer, use_bias)
                measured[f"accuracy, {cell}"] = float(np.mean(accuracies(best[cell])))
    trains = decide(accuracy, at_least=0.5)
    if trains != NOT_REPRODUCED:
        law = decide(exponent, at_least=0.4, at_most=0.6) if exponent else INCONCLUSIVE
        trains = REPRODUCED if trains == law == REPRODUCED else INCONCLUSIVE
    censored = int(np.isnan(escape_steps(config, best)).sum())
    note = "interval: of the accuracy with ε = 0"
    if censored:
        note += (
            f"; {censored} runs had not left the plateau after {config.escape_steps} steps and "
            "their ε is left out of the fit"
        )
    if others:
        note += f". Escape exponents with intervals{others.replace(';', ':', 1)}"
    return Finding(CLAIMS[2], measured, accuracy.interval, trains, note)


def spreads(config: Any, best: Best, placement: str) -> list[float]:
    """Largest minus smallest accuracy over a, of each seed."""
    table = np.array([accuracies(best[f"{placement} a={a:g}"]) for a in config.widths])
    return list(table.max(axis=0) - table.min(axis=0))


def judge_robustness(config: Any, best: Best) -> Finding:
    """init-robustness."""
    plain, normalized = (spreads(config, best, placement) for placement in ("none", "all"))
    small = estimate(normalized)
    difference = paired_difference(plain, normalized)
    measured = {
        "spread, BN on all layers": small.mean,
        "spread, plain": float(np.mean(plain)),
        "difference of spreads": difference.mean,
        "lowest accuracy, BN on all layers": min(
            float(np.mean(accuracies(best[f"all a={a:g}"]))) for a in config.widths
        ),
    }
    verdict = decide(difference, at_least=0.1)
    if verdict == REPRODUCED and decide(small, at_most=0.03) != REPRODUCED:
        verdict = INCONCLUSIVE
    return Finding(
        CLAIMS[3],
        measured,
        small.interval,
        verdict,
        note="interval: of the spread with BN; difference of the spreads in "
        f"{format_interval(difference.interval)}. Accuracy by a, with intervals: BN on all layers "
        f"{_by_setting({f'{a:g}': best[f'all a={a:g}'] for a in config.widths})}; plain "
        f"{_by_setting({f'{a:g}': best[f'none a={a:g}'] for a in config.widths})}",
    )


def judge_layers(config: Any, best: Best) -> Finding:
    """last-layer-only."""
    others = config.layers
    last = estimate(accuracies(best[grid_cell(0.0, "sgd", False)]))
    measured = {"accuracy, last layer, ε = 0, SGD": last.mean}
    for optimizer, epsilon in layer_cells(config):
        for layer in others:
            role = grid_cell(epsilon, optimizer, False, layer)
            measured[f"accuracy, {role}"] = float(np.mean(accuracies(best[role])))
    if not others:
        note = "only the last layer was run (layers=())"
        return Finding(CLAIMS[4], measured, None, INCONCLUSIVE, note)
    table = [accuracies(best[grid_cell(0.0, "sgd", False, layer)]) for layer in others]
    largest = estimate(np.max(table, axis=0))
    verdict = conjunction(decide(last, at_least=0.5), decide(largest, at_most=0.5))
    return Finding(
        CLAIMS[4],
        measured,
        largest.interval,
        verdict,
        note="interval: of the largest accuracy with BN on one other layer, SGD, ε = 0. Accuracy "
        f"by layer, with intervals: {'; '.join(_by_layer(config, best))}",
    )


def _by_layer(config: Any, best: Best) -> list[str]:
    found = []
    for optimizer, epsilon in layer_cells(config):
        roles = {
            str(layer): grid_cell(epsilon, optimizer, False, layer)
            for layer in (*config.layers, "last")
        }
        records = {name: best[role] for name, role in roles.items() if role in best}
        title = {"sgd": "SGD", "adam": "Adam"}[optimizer]
        found.append(f"{title}, ε = {epsilon:g}: {_by_setting(records)}")
    return found


def _by_setting(records: dict[str, list[dict[str, Any]]]) -> str:
    """Mean accuracy with its interval over seeds, of several settings, in a line."""
    found = {name: estimate(accuracies(group)) for name, group in records.items()}
    return ", ".join(
        f"{name}: {format_number(value.mean)} {format_interval(value.interval)}"
        for name, value in found.items()
    )
