"""What does batch normalization do to its input, and what would whitening cost instead?

Ioffe & Szegedy (2015, section 3) normalize each feature by itself because whitening all of them
together is expensive. This experiment checks the transform on batches of real and synthetic
features in float64: that it gives zero mean and unit variance, that γ and β can undo it, and that
it leaves correlations alone. Then it times the transform against the whitening it stands for.

    python -m experiments.transform --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds, time up to d = 512: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST, 5 seeds, time up to d = 1024: within 15 min on 2 CPU cores

Features are real: pixels from 0 to 1 (at the border many hardly ever change), and pre-activations
of a random dense and a random convolutional layer (whose m counts positions too, as in section
3.2). Controls: Gaussian features with a mean of up to 1e6 standard deviations, features with heavy
tails (Student's t, 3 degrees of freedom), and one outlier among zeros.

Theory. For x̂ = (x − μ)/√(σ² + ε) over m elements the variance is σ²/(σ² + ε), and no |x̂| exceeds
√(m − 1), which one outlier among equals attains. With γ = √(σ² + ε) and β = μ of the same batch
y = x. With γ and β of batch A on batch B, for ε = 0, the mean of (y − x)² is
(μ_A − μ_B)² + (σ_A − σ_B)², about σ²·(2/m)·(1 + (k − 1)/4) with the kurtosis k, 3 for a Gaussian:
the error falls as m^(−1/2). Where k is infinite it falls more slowly, for these heavy tails as
m^(−1/4) in the end. The covariance of m examples has rank m − 1 at most. BN costs O(m·d); whitening
forms a d × d covariance, O(m·d²), and its inverse root, O(d³).

| claim | expected |
|---|---|
| unit-normalization | every deviation below 1e-12 |
| identity-recoverable | same batch: below 1e-12; another: slope −0.5, heavy tails −0.5 to −0.25 |
| no-decorrelation | correlations differ by less than 1e-12; ZCA takes them to 0 |
| whitening-cost | rank min(m − 1, d); at d = 512 ZCA costs some ten times BN, or more |
"""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from bn_research.lab.experiment import Experiment
from bn_research.lab.fields import Count, NonNegative, OnDataset, OrNone, Several, Some, at_most

Sizes = Annotated[Some[Several], Field(min_length=2)]  # a slope is asked of them


@dataclass(frozen=True)
class Config(OnDataset):
    """Settings of a run."""

    seeds: Count = 3  # 0, 1, …; a seed draws the random layers, the controls and the batches
    examples: OrNone = 0  # of the training split; 0 is all
    batch_sizes: Sizes = (8, 16, 32, 64, 128, 256)
    pairs: Count = 64  # of disjoint batches, for each size and seed; they take the ε in turn
    epsilons: Some[NonNegative] = (0.0, 1e-5, 1e-3)
    dims: Sizes = (64, 128, 256, 512)  # features of the timed transforms
    timed_batch: Several = 2048  # twice the largest d: every covariance has full rank
    repeats: Count = 11  # of each timing

    def __post_init__(self) -> None:
        """Each ε needs a pair, and a covariance more examples than features."""
        if self.pairs < len(self.epsilons):
            raise ValueError(
                f"pairs={self.pairs} is not allowed: at least one for each of "
                f"epsilons={self.epsilons}"
            )
        what = f"below timed_batch={self.timed_batch}, or the covariance is singular"
        at_most(self, self.timed_batch - 1, what, "dims")


PRESETS = {
    "smoke": Config(seeds=2, batch_sizes=(8, 32), pairs=3, dims=(8, 16), timed_batch=64, repeats=2),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        examples=8192,
        batch_sizes=(8, 16, 32, 64, 128, 256, 512),
        dims=(64, 128, 256, 512, 1024),
        repeats=25,
    ),
}

EXPERIMENT = Experiment(__name__, PRESETS, title="What does batch normalization do to its input?")
