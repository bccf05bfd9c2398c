"""Why can a network with batch normalization take larger steps: is its loss surface smoother?

Santurkar et al. (2018) answer that BN does not work by reducing internal covariate shift but by
making the loss smoother: along a training step, loss and gradient change less with BN than without.
This experiment measures both along the steps of plain SGD, up to four times their length, and the
largest eigenvalue λmax of the Hessian, with and without BN, at the same learning rate (the plain
network's best, and the next lower one) and with each network at its own best rate. It then asks
whether λmax at the start says how large a rate a network takes, as it would for a quadratic, and
whether it settles at 2 over the rate during training.

    python -m experiments.loss_surface --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds, a tiny network: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 seeds: within 6 min on 2 CPU cores

Networks are convolutional, without skip connections, with biases and He's initialization; BN stands
on all layers but the head. SGD has no momentum, as in the paper's measurement, so that the step is
−η times the gradient. Every measurement of a dispatch is of the state that it begins with: loss and
gradient at ½ to 4 times the step, on the very batch that gives the step.

λmax is of one fixed batch, by Lanczos. With BN there are two Hessians: of training, where the
statistics of the batch are differentiated through, and of a network whose statistics are frozen,
where BN is a fixed affine map. Gradient descent on that batch is governed by the first. On a
quadratic it is stable for rates below 2/λmax. Networks are no quadratics: a ReLU network that is
thrown out may land where λmax is smaller (Lewkowycz et al., 2020), so that a rate is called stable
here if it trains. A scale-invariant weight that is thrown out has grown, and its curvature has
fallen as the square of its norm.

| claim | expected |
|---|---|
| smoother-along-the-step | ranges of loss and of gradient smaller with BN at the same rate |
| sharpness-sets-the-rate | 1/λmax larger with BN, by as much as the largest stable rate |
| edge-of-stability | rate·λmax about 2 at the end, without BN |
"""

from pydantic.dataclasses import dataclass

from bn_research.lab.experiment import Experiment
from bn_research.lab.fields import (
    Count,
    Network,
    OnImages,
    OrNone,
    Positive,
    Several,
    Some,
    whole_dispatches,
)


@dataclass(frozen=True)
class Config(OnImages):
    """Settings of a run."""

    seeds: Count = 3  # 0, 1, …; the next one chooses the rates and enters no verdict
    network: Network = "c8 c8 P c16 P f32 f10"
    batch_size: Several = 64  # of SGD
    rates: Some[Positive] = (0.03, 0.1, 0.3, 1.0, 3.0)  # of SGD, both arms choose from them
    num_steps: Count = 200  # of SGD
    steps_per_dispatch: Count = 10  # the surface is measured before the first of them
    curvature_steps: Some[OrNone] = (0, 50, 190)  # of SGD, at which λmax is measured
    num_iterations: Count = 12  # of Lanczos
    fixed_examples: Several = 256  # of the batch of λmax and of gradient descent
    descent_factors: Some[Positive] = (1.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # times 2/λmax
    descent_steps: Count = 40
    edge_factor: Positive = 2.0  # likewise, of the descent along which λmax is followed
    edge_steps: Count = 100

    def __post_init__(self) -> None:
        """ValueError where steps are no whole dispatches, or λmax is not due at the start."""
        whole_dispatches(self, "num_steps", "descent_steps", "edge_steps")
        begun = range(0, self.num_steps, self.steps_per_dispatch)
        if 0 not in self.curvature_steps or not set(self.curvature_steps) <= set(begun):
            raise ValueError(
                f"curvature_steps={self.curvature_steps} is not allowed: 0 and multiples of "
                f"steps_per_dispatch={self.steps_per_dispatch} below num_steps={self.num_steps}"
            )


PRESETS = {
    "smoke": Config(
        seeds=2,
        network="c4 P f10",
        batch_size=16,
        rates=(0.1, 0.3),
        num_steps=6,
        steps_per_dispatch=2,
        curvature_steps=(0, 4),
        num_iterations=3,
        fixed_examples=32,
        descent_factors=(4.0,),
        descent_steps=4,
        edge_steps=6,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        network="c8 c8 P c16 c16 P f64 f64 f10",
        rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        num_steps=500,
        steps_per_dispatch=20,
        curvature_steps=(0, 120, 480),
        descent_factors=(1.0, 8.0, 11.0, 16.0, 23.0, 32.0, 45.0, 64.0, 91.0, 128.0),
        edge_steps=300,
    ),
}

EXPERIMENT = Experiment(
    __name__, PRESETS, title="Is the loss surface smoother with batch normalization?"
)
