"""Why does batch normalization regularize?

"One thing remained unclear", say the notes on Ioffe & Szegedy's paper. The paper's own words are
that "a training example is seen in conjunction with other examples in the mini-batch": its
normalized value is noisy; how noisy, `experiments.batch_noise` measures. This experiment changes
the noise alone and watches the generalization gap, and asks whether BN makes dropout needless.

    python -m experiments.regularization --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14: within 40 min on 2 CPU cores

Networks have BN on their hidden layers, as the paper's; momentum SGD whose rate a cosine takes to
0. Settings are chosen by a validation set, on seeds that enter no verdict. Every accuracy is that
of inference by population statistics (algorithm 2).

Groups. One network, one SGD batch, one stream of examples. What changes is the noise in x̂ alone:

  - how many examples share statistics, from a few to the whole SGD batch, whose noise is least;
  - whether an example meets other examples in each epoch, or always those it met first;
  - whether the noise is BN's, or there is none (population statistics), or it is drawn: by the
    measured law, from another group of the batch, or, as the wrong law of the same power, for
    each element alone; see `bn_research.layers.stochastic_norm`.

The generalization gap, training less test accuracy in inference mode, also closes when training
gets worse, so test accuracy is judged beside it. All arms with BN share one learning rate, chosen
for statistics of the whole batch: the end of the ladder that has least noise. The network without
BN has its own.

Dropout. Two by two: with and without BN, with and without dropout, each cell at its best learning
rate, and the two with dropout at their best dropout rate, of the same grids. Ioffe & Szegedy (2015,
section 3.4) could leave dropout out of their BN networks. The standard network is the one of four,
in trials of one or two seeds of no verdict, where dropout gained most without BN: a need that BN
could reduce. On the others it gained about as much with BN, or more.

Variance shift (Li et al. 2018, arXiv 1801.05134, "Understanding the disharmony between dropout and
batch normalization by variance shift"): the population statistics of a BN layer are those of
training passes, with dropout on; in inference it is off and the layer's input has another variance.
Where dropout stands right before BN, z → z·mask/(1 − p),

    Var_train = (Var z + p·(E z)²)/(1 − p)    so that    Var/Var_train ≤ 1 − p.

| claim | expected |
|---|---|
| batch-noise-regularizes | the gap grows with the group; drawn noise has half the effect |
| batch-noise-regularizes-by-loss | likewise |
| reshuffling-regularizes | about 1 point (paper) |
| less-need-for-dropout | dropout gains less with BN |
| dropout-before-bn-shifts-variance | BN above dropout sees another variance in inference |
"""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bn_research.lab import fields
from bn_research.lab.experiment import Experiment
from bn_research.models.spec import num_weight_layers


@dataclass(frozen=True)
class Config(fields.OnImages):
    """Settings of a run; those of one part begin with its name."""

    seeds: fields.Count = 3  # 0, 1, …; settings are chosen on others
    train_examples: fields.Several = 512  # at most; few, so that the networks can overfit
    validation_examples: fields.Count = 256  # next in the training split: they choose settings
    test_examples: fields.Count = 899
    compiler_level: fields.CompilerLevel = 1  # less compiles faster and steps slower

    groups_network: fields.Network = "f64 f64 f10"
    groups_examples: fields.Several = 512  # of the training set
    # Examples that share statistics; the last is the SGD batch.
    groups_sizes: Annotated[fields.Ascending[fields.Several], Field(min_length=2)] = (8, 32, 256)
    groups_size: fields.Several = 8  # g*: of the arms with frozen groups or drawn noise
    groups_rates: fields.Some[fields.Positive] = (0.03, 0.1, 0.3, 1.0)
    groups_slower: fields.NonNegative = 0.0  # divides the rate of a second ladder; 0 is none
    groups_steps: fields.Count = 100
    groups_steps_per_dispatch: fields.Count = 20
    groups_tuning_seeds: fields.Count = 1
    groups_seeds: fields.Count = 3

    dropout_network: fields.Network = "f64 f64 f10"
    dropout_placement: Literal["before", "after", "last"] = "last"  # of the two by two
    dropout_rates: fields.Some[fields.Inside] = (0.3, 0.6)
    dropout_learning_rates: fields.Some[fields.Positive] = (0.03, 0.1, 0.3)
    dropout_shift_rate: fields.Inside = 0.5  # where the variance shift is measured
    dropout_examples: fields.Several = 512  # of the training set
    dropout_batch_size: fields.Several = 64
    dropout_steps: fields.Count = 300
    dropout_steps_per_dispatch: fields.Count = 100
    dropout_tuning_seeds: fields.Count = 1
    dropout_seeds: fields.Count = 5  # of the two by two

    def __post_init__(self) -> None:
        """Checks fields against each other."""
        fields.whole_dispatches(self, "groups_steps", "dropout_steps")
        for part in ("groups_examples", "dropout_examples"):
            fields.at_most(self, self.train_examples, "train_examples", part)
        fields.at_most(self, self.groups_examples, "groups_examples", "groups_sizes")
        fields.at_most(self, self.dropout_examples, "dropout_examples", "dropout_batch_size")
        *sizes, batch = self.groups_sizes
        layers = num_weight_layers(self.dropout_network)
        for name, is_bad, why in (
            ("groups_sizes", any(batch % size for size in sizes), "each must divide the last"),
            ("groups_size", self.groups_size not in sizes, "one of groups_sizes but the last"),
            ("groups_slower", 0 < self.groups_slower <= 1, "above 1, or 0 for no second ladder"),
            # So that a BN layer has dropout after an activation below it.
            ("dropout_network", layers < 3, "it needs two hidden layers"),
        ):
            if is_bad:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: {why}")


PRESETS = {
    "smoke": Config(
        seeds=2,
        # All sets, and the networks of both parts, are alike: programs take the time.
        train_examples=128,
        validation_examples=128,
        test_examples=128,
        compiler_level=0,
        groups_network="f16 f16 f10",
        groups_examples=128,
        groups_sizes=(4, 32),
        groups_size=4,
        groups_rates=(0.1,),
        groups_steps=4,
        groups_steps_per_dispatch=2,
        groups_tuning_seeds=2,  # as many as of the rest: so many lanes are one program
        groups_seeds=2,
        dropout_network="f16 f16 f10",
        dropout_rates=(0.5,),
        dropout_learning_rates=(0.1,),
        dropout_examples=128,
        dropout_batch_size=32,
        dropout_steps=20,
        dropout_steps_per_dispatch=10,
        dropout_tuning_seeds=2,
        dropout_seeds=2,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        train_examples=2048,
        validation_examples=5000,
        test_examples=10_000,
        groups_network="f256 f256 f256 f10",
        groups_examples=2048,
        groups_sizes=(8, 16, 32, 64, 128, 256, 512),
        groups_size=16,
        groups_rates=(0.01, 0.03, 0.1, 0.3),
        groups_slower=4.0,
        groups_steps=600,
        groups_steps_per_dispatch=100,
        groups_tuning_seeds=2,
        groups_seeds=10,
        dropout_network="f512 f512 f10",
        dropout_rates=(0.2, 0.4, 0.6, 0.8),
        dropout_learning_rates=(0.002, 0.006, 0.02, 0.06),
        dropout_examples=1000,
        dropout_steps=1200,
        dropout_steps_per_dispatch=400,
        dropout_tuning_seeds=3,
        dropout_seeds=30,
    ),
}

EXPERIMENT = Experiment(__name__, PRESETS)
