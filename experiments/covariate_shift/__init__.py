"""Does batch normalization reduce internal covariate shift?

Ioffe & Szegedy (2015, section 4.1) train a small sigmoid network and show in their figure 1 that BN
makes it more accurate and keeps the inputs of one typical last hidden unit steady. Santurkar et al.
(2018) measure the shift on gradients instead and find that BN does not reduce it. This experiment
rebuilds that figure, with the drift of all units of the last hidden layer, and measures the
gradient shift in the same runs.

    python -m experiments.covariate_shift --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, few steps: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 28×28, 5 seeds, the paper's 50,000 steps: about 10 min on 2 CPU cores

The paper's network: 3 fully connected hidden layers of 100 sigmoid units, 10-way softmax, batches
of 60, small Gaussian weights, BN on each hidden layer. It trains on MNIST: --config.dataset=mnist
takes it where its files are. Rate, momentum, width of the Gaussian and ε are not given there; here
they are chosen from one grid for both networks, by the training loss of short runs on a seed apart.
The claims compare both at the settings that suit the plain network, as the paper trains both alike;
BN at its own best is reported beside it, and so is a comparison with small weights alone: tuned,
the width of the plain network's weights is a remedy of its own.

Drift. With p_l(t) the {15, 50, 85} percentiles of what a unit's nonlinearity receives (after BN),
on images that stay the same, and r = p_85 − p_15 its width,

    drift = Σ_t ⟨|p_l(t + 1) − p_l(t)|⟩_l / ½(r(t) + r(t + 1))

A unit on a plateau hardly drifts, and one whose width has just begun to grow drifts by much of it;
so the part after the plain network has left its plateau is reported too, for both.

Gradient shift. Layer i takes its step along G, while the layers below take theirs:

    G  = ∇_{W_i} L(W_1, …, W_k)        G′ = ∇_{W_i} L(W⁺_1, …, W⁺_{i−1}, W_i, …, W_k)

and ‖G − G′‖/‖G‖ and the cosine of the two say how far G was out of date. The same distance between
two batches at the same weights is the noise that SGD lives with anyway.

| claim | expected |
|---|---|
| distribution-drift-reduced | drift BN/plain at most 0.5, accuracy higher |
| gradient-shift-not-reduced | gradient shift BN/plain at least 1 |
"""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bn_research.lab import Experiment, fields
from bn_research.models.spec import Dense, num_weight_layers, parse_spec

Activation = Literal["sigmoid", "relu", "tanh", "gelu", "silu", "softplus"]  # of jax.nn


@dataclass(frozen=True)
class Config(fields.OnDataset):
    """Settings of a run."""

    seeds: fields.Count = 3  # 0, 1, …; the next one chooses the settings and enters no verdict
    network: fields.Network = "f100 f100 f100 f10"
    activations: fields.Some[Activation] = ("sigmoid",)  # the claims are about the first
    batch_size: fields.Several = 60
    num_steps: fields.Count = 3000
    other_steps: fields.Count = 3000  # of the comparisons that no verdict rests on
    steps_per_dispatch: fields.Count = 100  # measured before each dispatch
    # Of the test set, for the percentiles; two halves are compared.
    measuring_images: Annotated[int, Field(ge=4, strict=True)] = 800
    evaluation_images: fields.OrNone = 0  # likewise, for the accuracy while training; 0 is all
    tuning_steps: fields.Count = 500
    learning_rates: fields.Some[fields.Positive] = (0.03, 0.1, 0.3, 1.0, 3.0)
    momenta: fields.Some[fields.Share] = (0.0, 0.9)
    init_stds: fields.Some[fields.Positive] = (0.03, 0.1, 0.3)  # of the Gaussian weights
    small_init_std: fields.NonNegative = 0.03  # as small as the paper's may be; 0 leaves it out
    epsilons: fields.Some[fields.NonNegative] = (1e-5,)  # of BN

    def __post_init__(self) -> None:
        """Raises ValueError where fields do not fit each other."""
        fields.whole_dispatches(self, "num_steps", "other_steps", least=2)
        fields.whole_dispatches(self, "tuning_steps")
        if not all(isinstance(layer, Dense) for layer in parse_spec(self.network)):
            raise ValueError(f"network={self.network!r} is not allowed: dense layers only")
        if num_weight_layers(self.network) < 2:
            raise ValueError(f"network={self.network!r} is not allowed: it needs a hidden layer")


PRESETS = {
    "smoke": Config(
        seeds=2,
        network="f12 f12 f10",
        num_steps=60,
        steps_per_dispatch=20,
        measuring_images=100,
        evaluation_images=100,
        tuning_steps=20,
        learning_rates=(0.3, 1.0),
        other_steps=40,
        init_stds=(0.1,),
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        activations=("sigmoid", "relu"),
        num_steps=50_000,
        other_steps=10_000,
        steps_per_dispatch=1000,
        measuring_images=1000,
        evaluation_images=2000,
        tuning_steps=2000,
        epsilons=(1e-5, 1e-3),
    ),
}

EXPERIMENT = Experiment(__name__, PRESETS)
