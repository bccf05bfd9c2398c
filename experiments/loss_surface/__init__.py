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

import dataclasses

from bn_research.lab.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3  # 0, 1, …; the next one chooses the rates and enters no verdict
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    image_size: int = 0  # height and width the images are resized to; 0 keeps theirs
    network: str = "c8 c8 P c16 P f32 f10"
    batch_size: int = 64  # of SGD
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)  # of SGD, both arms choose from them
    num_steps: int = 200  # of SGD
    steps_per_dispatch: int = 10  # the surface is measured before the first of them
    curvature_steps: tuple[int, ...] = (0, 50, 190)  # of SGD, at which λmax is measured
    num_iterations: int = 12  # of Lanczos
    fixed_examples: int = 256  # of the batch of λmax and of gradient descent
    descent_factors: tuple[float, ...] = (1, 4, 8, 16, 32, 64, 128)  # times 2/λmax
    descent_steps: int = 40
    edge_factor: float = 2.0  # likewise, of the descent along which λmax is followed
    edge_steps: int = 100


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
        descent_factors=(1, 8, 11, 16, 23, 32, 45, 64, 91, 128),
        edge_steps=300,
    ),
}

EXPERIMENT = Experiment(
    __name__,
    title="Is the loss surface smoother with batch normalization?",
    presets=PRESETS,
)
