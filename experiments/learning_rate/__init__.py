"""How much larger may the learning rate be with batch normalization?

Ioffe & Szegedy (2015, section 4.2) train BN networks at 5 and 30 times the rate of Inception. This
experiment searches the largest rate at which momentum SGD still trains, for networks without BN,
with BN on all layers, on the hidden layers (as in the paper) and on the last layer alone, at
several batch sizes; trains BN at 30 times the plain network's best rate; and asks whether deep
networks of sigmoids, which do not train without BN, train with it.

    python -m experiments.learning_rate --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, tiny networks: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds, the CNN at two batch sizes: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 seeds, CNN and MLP: within 12 min on 2 CPU cores

Method. A rate is stable if of all steps none was non-finite and the mean training loss over the
last tenth of them is below half of ln C, C the number of classes. The largest stable rate is found
by bisection on a log grid, for each seed by itself, from a bracket whose two ends were run; see
`search`. Whether a rate above it trains again is looked at afterwards. Plain networks
have He initialization and biases, the same optimizer (momentum 0.9), steps and grid. In a trial of
one seed, 200 steps and batch 8 no rate brought the MLP with BN on all layers below half of ln C:
the smallest batch of standard is 16, and it has 300 steps.

Theory. On a quadratic, momentum SGD is stable up to η = 2(1 + μ)/λ_max, so without BN the limit is
set by the curvature and, at a small batch, by the noise. Weights below a BN are scale-invariant: a
step that is too large makes them longer, and the next one shorter in angle by as much, so that no
rate is too large for them. What sets the limit with BN are the parameters that are not
scale-invariant: γ and β, and a head without BN. Which way the batch should act was settled after
trials: on digits, where the advantage grew with it, and a short one on Fashion-MNIST, which decided
nothing.

| claim | expected |
|---|---|
| higher-learning-rates | the largest stable rate with BN at least 10 times that without |
| sigmoid-trainable | plain at chance, BN at 3 times chance or more |
| advantage-shrinks-with-batch | a positive slope of the ratio over the batch |
"""

from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from bn_research.lab import Experiment, fields

PUBLISHED_BATCH = 32  # of the paper, and of the first claim's headline
PUBLISHED_FACTOR = 30  # 0.045 over 0.0015
Placement = Literal["none", "last", "hidden", "all"]  # of BN
Placements = Annotated[fields.Some[Placement], fields.holding("none", "all")]


@dataclass(frozen=True)
class Config(fields.OnImages):
    """Settings of a run."""

    seeds: fields.Count = 3  # 0, 1, …; the next one chooses the rates and enters no verdict
    examples: fields.OrNone = 0  # of each split; 0 is all
    cnn: fields.Network = "c8 P c16 P f64 f10"
    cnn_batch_sizes: Annotated[fields.Some[fields.Several], fields.holding(PUBLISHED_BATCH)] = (
        8,
        32,
    )
    mlp: fields.Network = "f100 f100 f100 f10"
    mlp_batch_sizes: fields.Distinct[fields.Several] = ()
    placements: Placements = ("none", "last", "hidden", "all")
    num_steps: fields.Count = 150
    steps_per_dispatch: fields.Count = 50
    strategy: fields.Strategy = "devices"
    lowest_log2_rate: int = -10  # of the grid
    highest_log2_rate: int = 8
    rates_per_octave: fields.Count = 2
    tuning_stride: fields.Count = 4  # each so many-th rate of the grid is tried when tuning
    # The deepest last.
    sigmoid_networks: fields.Some[fields.Network] = ("c8 P f10", "c8 c8 P c16 c16 P f64 f64 f10")
    sigmoid_batch_size: fields.Several = 32
    sigmoid_steps: fields.Count = 150
    sigmoid_rates: fields.Some[fields.Positive] = (1 / 32, 1 / 8, 1 / 2, 2.0)

    def __post_init__(self) -> None:
        """Checks between fields."""
        fields.whole_dispatches(self, "num_steps", "sigmoid_steps")
        octaves = self.highest_log2_rate - self.lowest_log2_rate
        if octaves < 1 or octaves * self.rates_per_octave < self.tuning_stride:
            raise ValueError(
                f"highest_log2_rate={self.highest_log2_rate} is not allowed: from "
                f"lowest_log2_rate={self.lowest_log2_rate} up the grid must hold at least "
                f"{self.tuning_stride + 1} rates, tuning_stride={self.tuning_stride} apart"
            )
        for name, first in (("cnn", "c"), ("mlp", "f")):
            if not getattr(self, name).startswith(first):
                raise ValueError(f"{name}={getattr(self, name)!r} must begin with a layer {first}N")

    @property
    def batch_sizes(self) -> dict[str, list[int]]:
        """Those of each network that is run, rising; the CNN first."""
        found = {self.cnn: self.cnn_batch_sizes, self.mlp: self.mlp_batch_sizes}
        return {network: sorted(sizes) for network, sizes in found.items() if sizes}


PRESETS = {
    "smoke": Config(
        seeds=2,
        examples=128,
        cnn="c4 P f10",
        placements=("none", "all"),
        num_steps=20,
        steps_per_dispatch=10,
        lowest_log2_rate=-6,
        highest_log2_rate=6,
        rates_per_octave=1,
        sigmoid_networks=("c4 P f10",),
        sigmoid_steps=20,
        sigmoid_rates=(1 / 8, 2.0),
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        cnn_batch_sizes=(16, 32, 128),
        mlp_batch_sizes=(16, 32, 128, 512),
        num_steps=300,
        sigmoid_networks=("c8 P f10", "c8 P c16 P f10", "c8 c8 P c16 c16 P f64 f64 f10"),
        sigmoid_steps=300,
        sigmoid_rates=(1 / 128, 1 / 32, 1 / 8, 1 / 2, 2.0, 8.0),
    ),
}

EXPERIMENT = Experiment(__name__, PRESETS)
