"""The networks of sigmoids of `experiments.learning_rate`: their training, claim and verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import estimate
from bn_research.claims.finding import Finding, conjunction, decide
from bn_research.claims.formatting import format_interval, format_number
from bn_research.lab.arms import Arm, Trainer
from bn_research.models.cnn import NormPlacement
from experiments.learning_rate.search import final_loss
from experiments.learning_rate.verdicts import (
    NAMES,
    Records,
    accuracies,
    in_words,
    with_interval,
)

TRAINS, CHANCE = 3.0, 1.5  # times the accuracy of guessing
_PLACEMENTS: tuple[NormPlacement, ...] = ("none", "all")
Sigmoids = Mapping[tuple[str, NormPlacement], Records]

CLAIM = Claim(
    id="sigmoid-trainable",
    statement="With BN a deep network of sigmoids trains that does not train without it",
    source="Paper section 4.2.2: Inception with sigmoids stays at 1/1000, with BN and 5 times "
    "the rate it reaches 69.8 %",
    criterion="Deepest sigmoid CNN, Glorot initialization, each arm at its best rate of the "
    "same grid, after the same number of steps. Reproduced if BN's test accuracy is at least "
    f"{TRAINS:g} times that of guessing and plain's at most {CHANCE:g} times (intervals "
    "over seeds); not reproduced if both or neither train: plain surely above, or BN surely below",
    expected="plain at chance, BN at 3 times chance or more",
)


def train_sigmoids(config: Any, trainer: Trainer) -> Sigmoids:
    """Records by seed of each sigmoid network, plain and BN, at the best rate of the grid."""
    arms = {
        (network, placement): Arm(
            network,
            placement,
            optimizer="momentum",
            initializer="glorot",
            use_bias=True,
            activation="sigmoid",
            batch_size=config.sigmoid_batch_size,
            num_steps=config.sigmoid_steps,
        )
        for network in config.sigmoid_networks
        for placement in _PLACEMENTS
    }
    rates = config.sigmoid_rates
    trials = [
        (arm.replace(learning_rate=rate), config.seeds) for arm in arms.values() for rate in rates
    ]
    losses = np.reshape([final_loss(record) for record in trainer.tune(trials)], (-1, len(rates)))
    best = [rates[place] for place in losses.argmin(axis=1)]
    seeds = range(config.seeds)
    records = trainer.train(
        [
            (arm.replace(learning_rate=rate), seed)
            for arm, rate in zip(arms.values(), best, strict=True)
            for seed in seeds
        ]
    )
    return {key: records[i * config.seeds : (i + 1) * config.seeds] for i, key in enumerate(arms)}


def judge_sigmoid(
    networks: Sequence[str],
    trained: Sigmoids,
    grid: Sequence[float],
    num_classes: int,
) -> Finding:
    """sigmoid-trainable.

    Args:
      networks: sigmoid CNNs from shallow to deep; the claim is about the last.
      trained: (network, placement) -> records at the best rate.
      grid: of the rates.
      num_classes: of the data set.
    """
    measured: dict[str, float] = {}
    at_end, lost = [], 0
    for network in networks:
        for placement in _PLACEMENTS:
            records = trained[network, placement]
            name = f"{NAMES[placement]}, {network}"
            measured |= with_interval(f"test accuracy, {name}", accuracies(records))
            measured[f"rate, {name}"] = records[0]["learning_rate"]
            lost += sum(record["diverged"] > 0 for record in records)
            if records[0]["learning_rate"] in (min(grid), max(grid)):
                at_end.append(name)
    plain, bn = (estimate(accuracies(trained[networks[-1], p])) for p in _PLACEMENTS)
    verdict = conjunction(
        decide(bn, at_least=TRAINS / num_classes), decide(plain, at_most=CHANCE / num_classes)
    )
    note = (
        f"interval: of BN's test accuracy on {networks[-1]}; plain's is "
        f"{format_number(plain.mean)} {format_interval(plain.interval)}, that of guessing "
        f"{format_number(1 / num_classes)}"
    )
    if len(networks) > 1:
        shallow = networks[0]
        note += (
            f". Control, {shallow}: plain {in_words(trained[shallow, 'none'])}, BN "
            f"{in_words(trained[shallow, 'all'])}"
        )
    note += f". Best rate at an end of the grid: {'; '.join(at_end)}" if at_end else ""
    note += f". {lost} runs had steps that were not finite" if lost else ""
    return Finding(CLAIM, measured, bn.interval, verdict, note)
