"""Which statistics should inference with batch normalization use?

Ioffe & Szegedy (2015, section 3.1) freeze the weights and average the statistics of training
batches, algorithm 2; practice keeps a moving average during training. This experiment measures how
far each is from the statistics of the whole training set, and what each does to test accuracy, from
early to late in training, at a low and a high learning rate and several batch sizes.

    python -m experiments.population_stats --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, tiny: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds, two batch sizes: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 seeds, three batch sizes: within 20 min on 2 CPU cores

Method. A convolutional network with BN on its hidden layers is trained by momentum SGD at a
constant rate, and carries moving averages of every momentum at once, which do not influence it. At
each of some steps the weights are frozen. Algorithm 2: E[x] is the mean over batches of μ_B, Var[x]
that of m/(m − 1)·σ_B². Merged: the moments of the same batches merged exactly (Chan et al., 1983),
which adds the spread of the μ_B. The batches have training's size and are drawn independently.
How far statistics are from those of the whole training set is defined in `statistics.py`. Low rate:
a tenth of the best of a grid, by training loss on a seed apart; high: the next of the grid above
the best if it still trains.

Theory. With momentum β a moving average is the mean of about (1 + β)/(1 − β) batches in its noise:
19, 199 and 1999 for 0.9, 0.99 and 0.999. It looks back 1/(1 − β) steps, over which the weights have
moved, and of its start, mean 0 and variance 1, βᵗ is left after t steps. Algorithm 2's error falls
as 1/√K with K batches, so where the weights hardly move an average of more than K batches is
closer. Both share a bias that no number of batches removes: while their statistics are taken, lower
layers are normalized by each batch, at inference by one set of statistics. Flax's average has
m2/n, without n/(n − 1); n counts examples and positions, so it matters in dense layers.

Controls: averages without their start; the same with n/(n − 1); the high rate decayed to 0 by a
cosine, where the weights stand still in the end and the lag should vanish.

| claim | expected |
|---|---|
| population-beats-ema | ratio of distances above 1, largest early and at a high rate |
| population-statistics-classify-better | above 0 early, about 0 late at a low rate |
"""

from pydantic.dataclasses import dataclass

from bn_research.lab import fields
from bn_research.lab.experiment import Experiment


@dataclass(frozen=True)
class Config(fields.OnImages):
    """Settings of a run."""

    seeds: fields.Count = 3  # 0, 1, …; the next one chooses the rates and enters no verdict
    examples: fields.OrNone = 0  # of each split, 0 is all; for truth they are one batch
    network: fields.Network = "c8 P c16 P f32 f10"
    batch_sizes: fields.Some[fields.Several] = (16, 64)
    momenta: fields.Some[fields.Inside] = (0.9, 0.99, 0.999)  # of the averages, as Flax has it
    snapshots: fields.Some[fields.Count] = (10, 40, 160, 640)  # steps that are measured
    steps_per_dispatch: fields.Count = 10
    learning_rates: fields.Some[fields.Positive] = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)
    tuning_steps: fields.Count = 160
    population_batches: fields.Count = 32  # of Algorithm 2
    most_population_batches: fields.Several = 128  # at the last step

    def __post_init__(self) -> None:
        """A training ends with a dispatch; population batches are seen in chunks."""
        fields.whole_dispatches(self, "tuning_steps")
        for name, values, unit in (
            ("snapshots", self.snapshots, "steps_per_dispatch"),
            ("most_population_batches", [self.most_population_batches], "population_batches"),
        ):
            each = getattr(self, unit)
            if any(value % each for value in values):
                must = f"must be a multiple of {unit}={each}"
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: {must}")


PRESETS = {
    "smoke": Config(
        seeds=2,
        examples=256,
        network="c4 P f8 f10",
        batch_sizes=(32,),
        momenta=(0.9, 0.99),
        snapshots=(5, 20),
        steps_per_dispatch=5,
        learning_rates=(1 / 16, 1 / 4),
        tuning_steps=20,
        population_batches=4,
        most_population_batches=8,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        examples=4096,
        image_size=14,
        network="c8 c8 P c16 P f64 f10",
        batch_sizes=(8, 32, 128),
        snapshots=(10, 40, 160, 640, 2560),
        learning_rates=(1 / 1024, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0),
        tuning_steps=320,
    ),
}

EXPERIMENT = Experiment(__name__, PRESETS)
