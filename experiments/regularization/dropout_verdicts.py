"""Claims about dropout and BN of `experiments.regularization`, and how records decide them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate, paired_difference
from bn_research.claims.finding import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Finding,
    conjunction,
    decide,
)
from bn_research.claims.formatting import format_number
from bn_research.models.cnn import DROPOUT_PLACEMENTS

UNSHIFTED = 0.05  # of |ratio − 1|: up to it a BN layer counts as left alone
_SOURCE = "Li et al. (2018), arXiv 1801.05134"

CLAIMS = (
    Claim(
        id="less-need-for-dropout",
        statement="BN reduces the need for dropout",
        source="Notes on Ioffe & Szegedy (2015); Paper section 3.4",
        criterion="Two by two, BN × dropout, each cell at the learning rate, and the two with "
        "dropout at the dropout rate above 0, of the highest validation accuracy on seeds apart. "
        "Dropout's gain in test accuracy without BN, less that with BN, paired by seed. Reproduced "
        "if the interval over seeds lies above 0; not reproduced if it ends at 0 or below",
        expected="dropout gains less with BN",
    ),
    Claim(
        id="dropout-before-bn-shifts-variance",
        statement="Below a BN layer, dropout makes its statistics wrong in inference; above the "
        "last one it does not",
        source=f"{_SOURCE}; the margin is this project's",
        criterion="Variance of a BN layer's input in inference over that of its population "
        "statistics, taken with dropout on; median over units, ratio r of each layer. Reproduced "
        f"if |r − 1| is at least {UNSHIFTED} in every layer with dropout below it (dropout before "
        "every BN: all; after every activation: all but the first), and with dropout after the "
        f"last hidden layer at most {UNSHIFTED} in all (intervals over seeds, of the smallest "
        "and the largest). Not reproduced if one of the two is surely violated",
        expected="r ≤ 1 − p where dropout is right before BN; r = 1 above the last BN",
    ),
)

Records = Sequence[Mapping[str, Any]]


class Cell(NamedTuple):
    """One of two by two."""

    norm: str
    dropout: bool

    @property
    def name(self) -> str:
        """For readers."""
        network = "no BN" if self.norm == "none" else "BN"
        return f"{network}, {'dropout' if self.dropout else 'no dropout'}"

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is of the cell, at whatever rates."""
        return record["norm"] == self.norm and (record["dropout"] > 0) == self.dropout


CELLS = tuple(Cell(norm, dropout) for norm in ("none", "batch") for dropout in (False, True))


def judge(config: Any, records: Mapping[str, Records]) -> list[Finding]:
    """Findings of CLAIMS, in their order.

    Args:
      config: of the run.
      records: of `regularization_dropout.measure`.
    """
    return [judge_need(config, records["cells"]), judge_shift(config, records)]


def gains(records: Records) -> tuple[Estimate, Estimate, Estimate]:
    """Dropout's gain in test accuracy without BN, with BN, and their difference; by seed."""
    accuracy = {cell: np.array(_by_seed(records, cell)) for cell in CELLS}
    plain, bn = (
        accuracy[Cell(norm, dropout=True)] - accuracy[Cell(norm, dropout=False)]
        for norm in ("none", "batch")
    )
    return estimate(plain), estimate(bn), paired_difference(plain, bn)


def _by_seed(records: Records, cell: Cell, key: str = "test_accuracy") -> list[float]:
    found = sorted((r for r in records if cell.holds(r)), key=lambda record: record["seed"])
    return [_number(record[key]) for record in found]


def judge_need(config: Any, records: Records) -> Finding:
    """less-need-for-dropout."""
    plain, bn, interaction = gains(records)
    verdict = INCONCLUSIVE
    if interaction.low > 0:
        verdict = REPRODUCED
    elif interaction.high <= 0:
        verdict = NOT_REPRODUCED
    measured = {
        **_with_interval("dropout's gain without BN less that with BN", interaction),
        **_with_interval("dropout's gain without BN", plain),
        **_with_interval("dropout's gain with BN", bn),
    }
    ends = []
    for cell in CELLS:
        of_cell = [record for record in records if cell.holds(record)]
        accuracy = estimate(_by_seed(records, cell))
        measured |= _with_interval(f"test accuracy, {cell.name}", accuracy)
        for key, words in (
            ("train_accuracy", "training accuracy"),
            ("test_loss", "test loss"),
            ("train_loss", "training loss"),
        ):
            measured[f"{words}, {cell.name}"] = float(np.mean(_by_seed(records, cell, key)))
        for field, words, grid in (
            ("rate", "learning rate", config.dropout_learning_rates),
            ("dropout", "dropout rate", config.dropout_rates),
        ):
            value = of_cell[0][field]
            if field == "dropout" and not cell.dropout:
                continue
            measured[f"{words}, {cell.name}"] = value
            if value in (min(grid), max(grid)):
                ends.append(f"{words} {format_number(value)} ({cell.name})")
    note = (
        f"interval: over {config.dropout_seeds} seeds. {config.dropout_network}, "
        f"{config.dropout_examples} training examples, batch {config.dropout_batch_size}, "
        f"{config.dropout_steps} steps; dropout placed {_placed(config.dropout_placement)}. Losses "
        "and accuracies in inference mode, by population statistics"
    )
    if plain.low <= 0:
        note += ". Dropout's own gain without BN is not surely above 0 here"
    if ends:
        note += f". Chosen at an end of its grid: {', '.join(ends)}"
    return Finding(CLAIMS[0], measured, interaction.interval, verdict, note + _lost(records))


def shifted(placement: str, layers: int) -> list[int]:
    """Indices of the BN layers that have dropout below them."""
    first = {"before": 0, "after": 1, "last": layers}[placement]
    return list(range(first, layers))


def judge_shift(config: Any, records: Mapping[str, Records]) -> Finding:
    """dropout-before-bn-shifts-variance."""
    shift = {
        placement: sorted(
            (r for r in records["shift"] if r["dropout_placement"] == placement),
            key=lambda record: record["seed"],
        )
        for placement in DROPOUT_PLACEMENTS
    }
    ratios = {
        placement: np.array([[_number(r) for r in record["ratio"]] for record in found])
        for placement, found in shift.items()
    }  # [seeds, layers]
    lost = _lost(records["shift"])
    if not all(np.isfinite(found).all() for found in ratios.values()):
        note = f"a layer's variance is not finite or 0 in some run{lost}"
        return Finding(CLAIMS[1], {}, None, INCONCLUSIVE, note)
    layers = ratios["last"].shape[1]
    below = np.concatenate(
        [ratios[place][:, shifted(place, layers)] for place in ("before", "after")], axis=1
    )
    smallest = estimate(np.abs(below - 1).min(axis=1))
    largest = estimate(np.abs(ratios["last"] - 1).max(axis=1))
    measured = {
        **_with_interval("smallest |r − 1|, dropout below", smallest),
        **_with_interval("largest |r − 1|, dropout after the last hidden layer", largest),
    }
    for placement, found in shift.items():
        named = _placed(placement)
        for layer in range(layers):
            ratio = estimate(ratios[placement][:, layer])
            measured |= _with_interval(f"r of BN {layer + 1}, dropout {named}", ratio)
        cost = _cost(found)
        measured |= _with_interval(f"accuracy lost to the shift, dropout {named}", cost)
    closed = [
        [_number(value) for value in record["population_over_closed_form"]]
        for record in shift["before"]
    ]
    for layer, values in enumerate(np.array(closed).T):
        name = f"population variance over its closed form, BN {layer + 1}"
        measured |= _with_interval(name, estimate(values))
    tuned = [record for record in records["cells"] if CELLS[3].holds(record)]
    measured |= _with_interval("accuracy lost to the shift, tuned cell", _cost(tuned))
    first = records["shift"][0]
    note = (
        f"interval: over {config.seeds} seeds, of the smallest |r − 1| of all BN layers with "
        f"dropout below. Dropout {format_number(first['dropout'])}, learning rate "
        f"{format_number(first['rate'])}, that of BN without dropout. Accuracy lost: on the test "
        "set by statistics taken anew with dropout off, less that by statistics taken with it on. "
        "Closed form, of dropout right before BN: (Var z + p·(E z)²)/(1 − p), z the "
        "pre-activation in training"
    )
    return Finding(
        CLAIMS[1],
        measured,
        smallest.interval,
        conjunction(decide(smallest, at_least=UNSHIFTED), decide(largest, at_most=UNSHIFTED)),
        note + lost,
    )


def _cost(records: Records) -> Estimate:
    """Of accuracy: statistics taken with dropout off against on, paired."""
    off, on = (
        [_number(record[key]) for record in records] for key in ("off_accuracy", "test_accuracy")
    )
    return paired_difference(off, on)


def _placed(placement: str) -> str:
    return {
        "before": "before every BN",
        "after": "after every activation",
        "last": "after the last hidden layer",
    }[placement]


def _lost(records: Records) -> str:
    lost = sum(record["diverged"] > 0 for record in records)
    if not lost:
        return ""
    return f". Of {len(records)} runs {lost} had steps that were not finite and not taken"


def _with_interval(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.mean, f"{name}, low": found.low, f"{name}, high": found.high}


def _number(value: float | None) -> float:
    """A number of the ledger, where None stands for one that was not finite."""
    return float("nan") if value is None else float(value)
