"""How much less do six batch-normalized networks err together than one?

Ioffe & Szegedy (2015, section 4.2.3) average the class probabilities of six networks and report
a top-5 error of 4.9 % on ImageNet, against 5.82 % of one network; top-1 20.1 % against 21.99 %. The
six are BN-x30 "modified via some of" three changes: larger initial weights of convolutions,
dropout of 5 or 10 %, and per-activation BN in the last hidden layers. This experiment trains such
ensembles on small images, asks whether the different settings help or different seeds are as good,
whether the ensemble's probabilities are better calibrated, and how near to it one network comes
that is asked several times, each time with the BN statistics of another training batch.

    python -m experiments.ensemble --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 ensembles of each kind, one module, 20 s
    quick     digits, 3 ensembles of each kind: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST at 14×14, 5 ensembles of each kind: within 25 min on 2 CPU cores

Network: Inception of figure 5 with fewer modules and channels and a stem for small images. Momentum
SGD at 30 times the base rate that `experiments.training_steps` gives the paper's Inception, falling
to 0 by half a cosine; L2 on weights; batch 32, reshuffled. Without the paper's crops, photometric
distortion and bias towards hard examples.

| network | initial kernels | dropout | BN of the last module |
|---|---|---|---|
| 1 | × gain | | per channel |
| 2 | | 5 % | per channel |
| 3 | | 10 % | per channel |
| 4 | × gain | 5 % | per channel |
| 5 | | | per activation |
| 6 | × gain | 10 % | per activation |

Which network had which change the paper does not say. Ensemble k has seeds 6k … 6k + 5; the
control, six networks of BN-x30 unmodified, has the same seeds, and so the same draws of weights and
order of examples. Inference is by population statistics (algorithm 2) over random training batches.

Theory. p̄ = (1/6)·Σ p_i. −log is convex, so −log p̄(y) ≤ (1/6)·Σ −log p_i(y): the negative log
likelihood of an ensemble never exceeds the mean of its networks, nor does the Brier score. Of error
and calibration nothing is certain: averaging makes predictions less confident, which mends networks
that are too confident and spoils those that are not confident enough. BN(aWu) = BN(Wu), so a
larger initial kernel leaves the function as it is, and makes the rate smaller by a², at first.

MC-BN (Teye et al., 2018): p̄ = (1/T)·Σ_t p(· | μ_t, σ_t), the statistics of training batch t of the
size that training used. One network instead of six, but T predictions; a batch serves all test
images here.

| claim | expected |
|---|---|
| ensemble-of-six | 5 to 20 % less error than the mean single network (paper: 8.6 %; top-5 15.8 %) |
| varied-settings-help | unknown |
| ensemble-calibrates | a lower calibration error, if single networks are too confident |
| mc-bn-calibrates | a lower negative log likelihood |
"""

from pydantic.dataclasses import dataclass

from bn_research.lab import Experiment, fields


@dataclass(frozen=True)
class Config(fields.OnImages):
    """Settings of a run."""

    seeds: fields.Count = 3  # ensembles of each kind
    train_examples: fields.Several = 800
    eval_examples: fields.OrNone = 0  # of the test set; 0 is all of it
    width: fields.Positive = 0.0625  # times the channels of figure 5
    modules: fields.Some[str] = ("3a", "3c")  # of figure 5
    batch_size: fields.Several = 32
    num_steps: fields.Count = 500
    steps_per_dispatch: fields.Count = 20
    rate: fields.Positive = 0.3  # of the first step; it falls to 0 by half a cosine
    l2: fields.NonNegative = 1e-4  # λ of g + λ·θ, on weights alone
    gain: fields.Positive = 2.0  # of the initial kernels that are increased
    draws: fields.Some[fields.Count] = (6, 24)  # of MC-BN; algorithm 2 takes the most of them, too
    strategy: fields.Strategy = "devices"  # of the sweeps
    compiler_level: fields.CompilerLevel = 1

    def __post_init__(self) -> None:
        """A draw of MC-BN is a batch of training images."""
        fields.whole_dispatches(self, "num_steps")
        batches = self.train_examples // self.batch_size
        what = f"the batches of {self.batch_size} in train_examples={self.train_examples}"
        fields.at_most(self, batches, what, "draws")


PRESETS = {
    "smoke": Config(
        seeds=2,
        train_examples=96,
        eval_examples=50,
        width=0.03125,
        modules=("3c",),
        num_steps=10,
        steps_per_dispatch=5,
        draws=(2, 3),
        compiler_level=0,
    ),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        image_size=14,
        train_examples=6400,
        width=0.125,
        modules=("3a", "3c", "4a", "5b"),
        num_steps=1600,
        steps_per_dispatch=10,
        draws=(6, 32),
        strategy="auto",
    ),
}

EXPERIMENT = Experiment(
    __name__, PRESETS, title="How much less do six batch-normalized networks err together?"
)
