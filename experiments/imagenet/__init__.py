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

from bn_research.lab.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Config:
    """A job."""

    setting: str = "bn_x30"  # one of the paper's five
    dataset: str = "imagenet2012"  # the figures are of this one
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    # "inception", or a spec such as "c16 P c32 f10" of a network that a laptop trains: it has the
    # setting's BN, activation, rates and L2; dropout and LRN are Inception's own.
    network: str = "inception"
    width: float = 1.0  # times the channels of "inception"
    # "imagenet": crops of image_size, flips and the setting's distortions, in color; "cifar":
    # shifts and flips; or "none".
    augmentation: str = "imagenet"
    image_size: int = 224  # height and width of the crops; 0 without them
    batch_size: int = 32  # examples of a step, over all devices
    microbatches: int = 1  # pieces in which a step takes its batch, to save memory
    microbatch_statistics: str = ""  # of several: BN's are of a "microbatch" or the "batch"
    group_size: int = 0  # examples that share statistics; 0 is the whole batch, of all devices
    dtype: str = "float32"  # of the computation in "inception", or bfloat16; parameters keep this
    seeds: int = 1
    num_steps: int = 6_000_000
    steps_per_dispatch: int = 100  # between two looks at the loss
    evaluate_every: int = 50_000  # steps; on the whole evaluation split
    checkpoint_every: int = 5_000  # steps
    keep_checkpoints: int = 3  # the newest
    num_workers: int = 8  # that read and augment, beside each training process; 0 for threads


_SMALL = Config(
    setting="bn_x5",
    dataset="digits",
    network="c16 P c32 f10",
    image_size=0,
    augmentation="none",
    num_workers=0,
)
PRESETS = {
    "smoke": dataclasses.replace(
        _SMALL, num_steps=20, steps_per_dispatch=5, evaluate_every=10, checkpoint_every=10
    ),
    "quick": dataclasses.replace(
        _SMALL,
        seeds=3,
        num_steps=600,
        steps_per_dispatch=20,
        evaluate_every=60,
        checkpoint_every=200,
    ),
    "paper": Config(),
}


EXPERIMENT = Experiment(
    __name__,
    title="BN-Inception on ImageNet: the published figures, and a job that can test them",
    presets=PRESETS,
    distributed=True,
)
