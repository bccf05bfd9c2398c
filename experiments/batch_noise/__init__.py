"""How noisy is an example seen in conjunction with others?

With batch normalization "a training example is seen in conjunction with other examples in the
mini-batch", say Ioffe & Szegedy (2015, section 3.4): its normalized value is noisy. This experiment
holds a law of that noise against batches of Gaussian samples, and against the pre-activations of a
small trained CNN, in convolutions and dense layers, each layer normalized by the whole set. Whether
the noise regularizes is the question of `experiments.regularization`.

    python -m experiments.batch_noise --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 30 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 seeds: within 40 min on 2 CPU cores

With x̃ = (x − μ)/σ, normalized by the population of skewness γ₁ and kurtosis κ, and m examples that
share statistics, to first order

    Var(x̂ | x) = (1 + γ₁·x̃ + (κ − 1)·x̃²/4)/m    which for Gaussian features is (1 + x̃²/2)/m

`bn_research.probes.batch_noise` has the theory.

| claim | expected |
|---|---|
| batch-noise-law | within 10 % for m ≥ 128 |
| batch-noise-law-of-real-features | likewise, with each feature's own γ₁ and κ |
| pixels-are-not-examples | a batch of m images counts as fewer than m·h·w examples |
"""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from bn_research.lab import fields
from bn_research.lab.experiment import Experiment
from bn_research.models.spec import Conv, Dense, parse_spec


@dataclass(frozen=True)
class Config(fields.OnImages):
    """Settings of a run."""

    seeds: fields.Count = 3  # 0, 1, …

    law_network: fields.Network = "c8 P c16 f32 f32 f10"
    law_images: Annotated[int, Field(ge=4, strict=True)] = 10_000  # at most: the population
    law_batch_size: fields.Several = 64
    law_rate: fields.Positive = 0.05
    law_steps: fields.Count = 200
    law_steps_per_dispatch: fields.Count = 50
    # m; below 3 the others of a batch have no variance.
    law_sizes: fields.Some[Annotated[int, Field(ge=3, strict=True)]] = (8, 32, 128, 256)
    law_points: fields.Some[fields.NonNegative] = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # x̃
    law_samples: fields.Several = 40_000  # batches of Gaussian samples
    law_batches: fields.Several = 1000  # of images
    law_examples: fields.Count = 64  # whose variance is measured

    def __post_init__(self) -> None:
        """Checks fields against each other, and the network's layers."""
        fields.whole_dispatches(self, "law_steps")
        kinds = {type(layer) for layer in parse_spec(self.law_network)[:-1]}
        if not {Conv, Dense} <= kinds:
            raise ValueError(
                f"law_network={self.law_network!r} is not allowed: it needs a convolution and a "
                "dense layer before its head"
            )


PRESETS = {
    "smoke": Config(
        seeds=2,
        law_network="c4 P c4 f8 f10",
        law_images=400,
        law_steps=10,
        law_steps_per_dispatch=5,
        law_sizes=(8, 128),
        law_points=(0.0, 2.0),
        law_samples=500,
        law_batches=100,
        law_examples=16,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        law_network="c16 P c32 c32 P f64 f64 f10",
        law_steps=600,
        law_steps_per_dispatch=100,
        law_sizes=(8, 32, 128, 512, 1024),
        law_samples=20_000,
        law_batches=4000,
    ),
}

EXPERIMENT = Experiment(__name__, PRESETS)
