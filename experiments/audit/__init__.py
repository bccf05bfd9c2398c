"""Which weights of a network are scale-invariant, and why are the others not?

BN divides by the size of what it is given, and so takes the scale of the weights in front of it
away (Ioffe & Szegedy 2015, section 3.3). In a whole network that is true of some parameters, of
others only together, and of the head not at all. This experiment audits the project's own models by
`bn_research.probes.scale_invariance`, with BN and without, at a random initialization on real
images, and says of every parameter why it is invariant or not.

    python -m experiments.audit --config.model=cnn|mlp|resnet|preactivation_resnet|inception

    smoke     a small MLP on digits, 2 seeds
    quick     a small ResNet on digits, 3 seeds: 90 s on 2 CPU cores
    standard  ResNet-20 on Fashion-MNIST, 5 seeds: within 40 min on 2 CPU cores

Of Inception XLA compiles for minutes: one of the six audits at quick took three on 2 CPU cores, and
with --config.seeds=1 --config.width=0.0625 --config.batch_size=32 both together 2.5.

Whether BN comes after a parameter is measured too: then, and only then, some layer's batch
statistics change when the parameter is replaced by random numbers.

| claim | expected |
|---|---|
| bn-makes-kernels-invariant | each kernel with BN after it, alone or in a group; nothing else |
"""

from typing import Literal, get_args

from pydantic.dataclasses import dataclass

from bn_research.lab.experiment import Experiment
from bn_research.lab.fields import Count, Inside, OnDataset, OrNone, Positive, Several

Model = Literal["cnn", "mlp", "resnet", "preactivation_resnet", "inception"]
MODELS: tuple[Model, ...] = get_args(Model)


@dataclass(frozen=True)
class Config(OnDataset):
    """Settings of a run."""

    seeds: Count = 3
    image_size: OrNone = 0  # height and width of the images; 0: theirs, and 32 for inception
    model: Model = "resnet"
    network: str = ""  # spec of cnn and mlp; "" is their default
    blocks: Count = 1  # in each of the ResNet's three stages; 3 is ResNet-20
    width: Positive = 0.25  # of ResNet and Inception, multiplies their numbers of channels
    epsilon: Positive = 1e-6  # of BN; 1e-5 already shows where a variance is small
    batch_size: Several = 64
    tolerance: Inside = 1e-4
    learning_rate: Positive = 0.1  # for the effective learning rates

    def __post_init__(self) -> None:
        """ValueError for a spec of a model that has none."""
        if self.network and self.model not in ("cnn", "mlp"):
            raise ValueError(
                f"network={self.network!r} is the spec of cnn and mlp: {self.model} has blocks and "
                "width"
            )


PRESETS = {
    "smoke": Config(seeds=2, model="mlp", network="f8 f8 f10"),
    "quick": Config(),
    "standard": Config(
        seeds=5, dataset="fashion_mnist", image_size=14, blocks=3, width=1.0, batch_size=128
    ),
}

EXPERIMENT = Experiment(__name__, PRESETS, title="Which weights of a network are scale-invariant?")
