"""Do networks converge faster on whitened inputs?

The notes on Ioffe & Szegedy (2015) recall from LeCun et al. (1998) that networks converge faster
when their inputs are whitened: linearly transformed to zero means and unit variances, and
decorrelated. BN does the first two to every layer and leaves out the third. This experiment holds
the theory of gradient descent to the digit, on linear regression, and then trains a network on real
images as they are, centred, scaled and whitened, each at its own best rate.

    python -m experiments.whitening --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST, 5 seeds: within 10 min on 2 CPU cores

Regression (float64). With H = E[x̃·x̃ᵀ], x̃ = (x, 1), and κ its condition number, gradient descent at
η = 2/(λmax + λmin) contracts the error by (κ − 1)/(κ + 1) a step; a mean μ of the inputs adds an
eigenvalue near ‖μ‖². Steps from 1 to 1e-6 are counted from a start on both extreme eigenvectors.

Images. raw is pixels from 0 to 1, centred x − μ, scaled also divided by each pixel's standard
deviation, zca and pca whitened, all fitted to the training set; ε is relative to the mean variance
of a pixel and the same for the last three (0.1: of 0.001, 0.01, 0.1 and 1 whitening at 0.1 and 1
was fastest in a trial at 14×14). The network is trained by plain SGD from He's initialization, with
and without BN on its hidden layers; each arm takes the rate that reached the target loss in the
fewest steps on a seed apart, from one grid. The loss is that of training, averaged over the last
`window` steps. A first run at standard had whitened images behind scaled ones at the target and
ahead of them at lower losses; since then other losses and ε stand beside it, and the criterion is
as it was.

| claim | expected |
|---|---|
| whitened-inputs-converge-faster | regression as predicted; steps: raw > scaled ≥ whitened |
"""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from bn_research.lab import fields
from bn_research.lab.experiment import Experiment
from bn_research.lab.fields import Count, NonNegative, OnImages, OrNone, Positive, Several, Some

ConditionNumber = Annotated[float, Field(ge=1, allow_inf_nan=False, strict=True)]


@dataclass(frozen=True)
class Config(OnImages):
    """Settings of a run."""

    seeds: Count = 3  # 0, 1, …; the next one chooses the rates and enters no verdict
    examples: OrNone = 0  # of each split; 0 is all
    features: Several = 16  # of the regression
    condition_numbers: Some[ConditionNumber] = (1.0, 10.0, 100.0)
    mean_norms: Some[NonNegative] = (0.0, 1.0, 3.0, 10.0)
    regression_examples: Count = 128
    epsilon: NonNegative = 0.1  # of scaled and whitened images
    other_epsilons: tuple[NonNegative, ...] = (0.01, 1.0)  # of ZCA; no verdict rests on them
    network: fields.Network = "f100 f100 f10"
    batch_size: Several = 60
    rates: Some[Positive] = (0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    target_loss: Positive = 0.1  # in nats
    other_targets: tuple[Positive, ...] = (0.3, 0.03, 0.01)  # beside it
    window: Count = 10  # steps that the loss is averaged over
    num_steps: Count = 400
    steps_per_dispatch: Count = 100

    def __post_init__(self) -> None:
        """ValueError where fields do not go together."""
        if self.regression_examples <= self.features:
            raise ValueError(
                f"regression_examples={self.regression_examples} is not allowed: more than "
                f"features={self.features} are needed for a covariance of full rank"
            )
        for name, others in (("epsilon", "other_epsilons"), ("target_loss", "other_targets")):
            value, more = getattr(self, name), getattr(self, others)
            if len({value, *more}) <= len(more):
                raise ValueError(
                    f"{name}={value} with {others}={more} is not allowed: all must be different"
                )
        fields.whole_dispatches(self, "num_steps")
        if self.window > self.num_steps:
            raise ValueError(
                f"window={self.window} is not allowed: at most num_steps={self.num_steps}"
            )


PRESETS = {
    "smoke": Config(
        seeds=2,
        examples=256,
        features=4,
        condition_numbers=(1.0, 10.0),
        mean_norms=(0.0, 3.0),
        regression_examples=32,
        network="f8 f10",
        batch_size=32,
        rates=(0.1, 1.0),
        other_epsilons=(1.0,),
        target_loss=2.0,
        other_targets=(1.5,),
        num_steps=40,
        steps_per_dispatch=20,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        features=32,
        condition_numbers=(1.0, 10.0, 100.0, 1000.0),
        regression_examples=256,
        rates=(0.016, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0),
        target_loss=0.5,
        other_targets=(0.7, 0.6, 0.45, 0.4, 0.35, 0.3),
        window=50,
        num_steps=2000,
    ),
}

EXPERIMENT = Experiment(__name__, PRESETS)
