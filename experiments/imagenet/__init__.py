"""How fast and how well do BN-Inception networks train on ImageNet?

The training job behind the published figures of Ioffe & Szegedy (2015, section 4.2): one of their
five settings, on one accelerator or many, in one process or several. Without the hardware and the
data the published figures stay what they are, published; anyone who has both gets their own beside
them from the same command.

    python -m experiments.imagenet --preset=smoke|quick|paper --workdir=DIR [--parallel=MODE]

    smoke   digits, a small network, 20 steps: every line runs
    quick   digits, a small network, 600 steps: what a job does, within 90 s on 2 CPU cores
    paper   BN-x30 on imagenet2012, 6 million steps of 32 images: 53 hours at 1,000 images/s. Not
            run here

docs/scaling.md has the commands for several accelerators and several machines, and says what a
job's numbers depend on: not on the number of devices or processes.

The settings, with the published figures (single crop, 50,000 validation images):

| setting | rate | what else | steps to 72.2 % | best top-1 |
|---|---|---|---|---|
| inception | 0.0015 | no BN; dropout 40 %, local response normalization | 31.0 million | 72.2 % |
| bn_baseline | 0.0015 | the same with BN before each nonlinearity | 13.3 million | 72.7 % |
| bn_x5 | 0.0075 | BN; no dropout or LRN, L2 ÷5, decay ×6, less distortion | 2.1 million | 73.0 % |
| bn_x30 | 0.045 | as bn_x5 | 2.7 million | 74.8 % |
| bn_x5_sigmoid | 0.0075 | as bn_x5, sigmoid for ReLU | never | 69.8 % |

The paper gives neither the weight of L2 nor the decay of its baseline nor the strength of its
distortions: ours are 4e-5, 4 % every 8 epochs (GoogLeNet's) and ±50 %, and ±25 % where weaker.
"""

import dataclasses
from typing import Literal

from pydantic.dataclasses import dataclass

from bn_research.lab import Experiment
from bn_research.lab.fields import Count, OnDataset, OrNone, Positive, whole_dispatches
from bn_research.models.spec import num_logits


@dataclass(frozen=True)
class Config(OnDataset):
    """A job."""

    setting: Literal["inception", "bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid"] = "bn_x30"
    dataset: str = "imagenet2012"  # the figures are of this one
    # "inception", or a spec such as "c16 P c32 f10" of a network that a laptop trains: it has the
    # setting's BN, activation, rates and L2; dropout and LRN are Inception's own.
    network: str = "inception"
    width: Positive = 1.0  # times the channels of "inception"
    # imagenet: crops of image_size, flips and the setting's distortions, in color; cifar: shifts
    # and flips.
    augmentation: Literal["imagenet", "cifar", "none"] = "imagenet"
    image_size: OrNone = 224  # height and width of the crops; 0 without them
    batch_size: Count = 32  # examples of a step, over all devices
    microbatches: Count = 1  # pieces in which a step takes its batch, to save memory
    microbatch_statistics: Literal["", "microbatch", "batch"] = ""  # of what BN's are
    group_size: OrNone = 0  # examples that share statistics; 0 is the whole batch, of all devices
    dtype: Literal["float32", "bfloat16"] = "float32"  # in "inception"; parameters are float32
    seeds: Count = 1
    num_steps: Count = 6_000_000
    steps_per_dispatch: Count = 100  # between two looks at the loss
    evaluate_every: Count = 50_000  # steps; on the whole evaluation split
    checkpoint_every: Count = 5_000  # steps
    keep_checkpoints: Count = 3  # the newest
    num_workers: OrNone = 8  # that read and augment, beside each training process; 0 for threads

    def __post_init__(self) -> None:
        """Raises ValueError where fields do not fit each other."""
        whole_dispatches(self, "num_steps", "evaluate_every", "checkpoint_every")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"microbatches={self.microbatches} does not divide batch_size={self.batch_size}"
            )
        named = self.microbatch_statistics
        if (named != "") != (self.microbatches > 1):
            raise ValueError(
                f"microbatch_statistics={named!r} is not allowed with microbatches="
                f"{self.microbatches}: say 'microbatch' or 'batch' with several, nothing with one"
            )
        if named == "batch" and self.group_size:
            raise ValueError(
                f"group_size={self.group_size} is not allowed with microbatch_statistics='batch': "
                "those are of the whole batch"
            )
        if (self.image_size > 0) != (self.augmentation == "imagenet"):
            raise ValueError(
                f"image_size={self.image_size} is not allowed with augmentation="
                f"{self.augmentation!r}: at least 1 with 'imagenet', which crops, else 0"
            )
        if self.network != "inception":
            num_logits(self.network)


_TOY = Config(
    setting="bn_x5",
    dataset="digits",
    network="c16 P c32 f10",
    image_size=0,
    augmentation="none",
    num_workers=0,
)
PRESETS = {
    "smoke": dataclasses.replace(
        _TOY, num_steps=20, steps_per_dispatch=5, evaluate_every=10, checkpoint_every=10
    ),
    "quick": dataclasses.replace(
        _TOY, seeds=3, num_steps=600, steps_per_dispatch=20, evaluate_every=60, checkpoint_every=200
    ),
    "paper": Config(),
}

EXPERIMENT = Experiment(
    __name__,
    PRESETS,
    title="BN-Inception on ImageNet: the published figures, and a job that can test them",
    distributed=True,
)
