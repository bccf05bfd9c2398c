"""Where do deep networks with batch normalization fail at initialization all the same?

Ioffe & Szegedy (2015, section 3.3) conjecture that BN leads the Jacobians of layers to have
singular values near 1, which keeps gradients in range. Mean-field theory says the opposite: without
skip connections BN itself makes gradients explode with depth. This experiment measures gradients,
variances and ranks of networks before training, against theory, and then trains plain and residual
networks of growing depth to see what comes of it.

    python -m experiments.signal_propagation --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, narrow and shallow: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 seeds: within 10 min on 2 CPU cores

Gradients: layers h ← W·φ(BN(h)) with Gaussian weights, Gaussian input and a Gaussian gradient at
the top; no bias, ε = 0. The mean-field growth of the squared gradient norm per layer is derived in
`bn_research.probes.mean_field`: (B − 2)/(B − 3) without φ, and for ReLU a closed form that falls to
π/(π − 1) as the batch grows. Control: He initialization without BN, where it is 1.

Residual stream: x ← x + W·relu(BN(x)) against x ← x + W·relu(x), weights of variance 2/n, input of
variance 1. Variance is the mean square over units and examples. 2^l is a law of wide layers: the
mean over networks of n units lies above it, at l = 12 by about 7/n (21 %, 10 % and 5 % for n = 32,
64 and 128). A first run at standard, 12 layers of 256 units, was inconclusive for that (0.8 to
5.1 %), and one at quick, 96 networks a seed, for the scatter (−1.8 to 5.6 %). Since then there are
more networks, wider and less deep; the criterion is as it was.

Ranks: linear networks of d units on d examples, h ← BN(W·h) against h ← W·h. Soft rank is the
participation ratio (Σλ)²/Σλ² of HHᵀ, a lower bound of the rank, and beside it the number of λ at
least τ = 0.5 times their mean (Daneshmand et al., 2020). That the depth must be many times d for
the collapse follows from the Lyapunov exponents of Gaussian products: the two largest are 1/(2d)
apart, so that the second λ falls as exp(−l/d) of the first.

Training: momentum SGD; plain and residual networks have the same parameters and take their rate
from the same grid, by training loss on a seed apart.

| claim | expected |
|---|---|
| gradient-explosion | within 3 % of theory: 1.79 at batch 8, 1.48 at batch 128 |
| residual-variance | within 5 % of 1 + l and of 2^l |
| rank-collapse | without BN 1; with BN an exponent of at least 0.5 in d |
| deep-bn-untrainable | plain near chance at the largest depth, residual not |
"""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from bn_research.lab.experiment import Experiment
from bn_research.lab.fields import Count, OnImages, Positive, Several, Some, whole_dispatches

Examples = Annotated[int, Field(ge=4, strict=True)]  # in a batch; E[1/σ²] is infinite below


@dataclass(frozen=True)
class Config(OnImages):
    """Settings of a run."""

    seeds: Count = 3  # 0, 1, …
    dataset: str = "digits"  # of the training; all else has Gaussian input
    batch_sizes: Some[Examples] = (8, 16, 32, 64, 128)  # of the gradients
    gradient_width: Several = 1024
    gradient_depth: Annotated[int, Field(ge=8, strict=True)] = 32  # below are no middle layers
    residual_width: Several = 512
    residual_depth: Annotated[int, Field(ge=1, le=100, strict=True)] = 8  # 2^l in float32's range
    residual_networks: Count = 160  # a seed: their mean tells the law from its scatter
    residual_batch: Examples = 64
    # d, units and examples alike
    rank_widths: Annotated[Some[Examples], Field(min_length=2)] = (8, 16, 32, 64)
    rank_depth: Several = 1280  # many times the largest width
    train_width: Several = 64
    train_depths: Annotated[Some[Count], Field(min_length=2)] = (5, 10, 20, 40)
    learning_rates: Some[Positive] = (0.001, 0.003, 0.01, 0.03, 0.1)  # both arms choose from them
    batch_size: Several = 32  # of the training
    num_steps: Count = 300
    steps_per_dispatch: Count = 50

    def __post_init__(self) -> None:
        """Raises ValueError."""
        whole_dispatches(self, "num_steps")


PRESETS = {
    "smoke": Config(
        seeds=2,
        batch_sizes=(4, 8),
        gradient_width=32,
        gradient_depth=8,
        residual_width=16,
        residual_depth=3,
        residual_networks=4,
        residual_batch=8,
        rank_widths=(4, 8),
        rank_depth=40,
        train_width=8,
        train_depths=(1, 3),
        learning_rates=(0.01, 0.1),
        num_steps=10,
        steps_per_dispatch=5,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        gradient_depth=40,
        residual_width=1024,
        residual_depth=10,
        residual_networks=64,
        rank_widths=(8, 16, 32, 64, 128),
        rank_depth=2560,
        train_width=100,
        train_depths=(5, 10, 20, 40, 80),
        learning_rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
        batch_size=64,
        num_steps=500,
    ),
}

EXPERIMENT = Experiment(
    __name__, PRESETS, title="Where do deep BN networks fail at initialization?"
)
