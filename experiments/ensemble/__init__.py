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

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bn_research.lab.experiment import Experiment
from bn_research.lab.images import Images, load_images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.training.cores import use_cpu_cores
from bn_research.training.lanes import STRATEGIES
from experiments.ensemble import verdicts
from experiments.ensemble.figures import draw
from experiments.ensemble.members import Trainer
from experiments.ensemble.networks import BASE, Network, Run, make_model, six
from experiments.ensemble.verdicts import SEEDS, VARIED


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3  # ensembles of each kind
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    image_size: int = 0  # height and width the images are resized to; 0 keeps theirs
    train_examples: int = 800
    eval_examples: int = 0  # of the test set; 0 is all of it
    width: float = 0.0625  # times the channels of figure 5
    modules: tuple[str, ...] = ("3a", "3c")  # of figure 5
    batch_size: int = 32
    num_steps: int = 500
    steps_per_dispatch: int = 20
    rate: float = 0.3  # of the first step
    l2: float = 1e-4
    gain: float = 2.0  # of the initial kernels that are increased
    draws: tuple[int, ...] = (6, 24)  # of MC-BN; algorithm 2 takes the most of them, too
    strategy: str = "devices"  # of the sweeps; "auto" measures which is fastest
    compiler_level: int = 1  # XLA's optimization, 0 to 3: less compiles faster and steps slower


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

_WHOLE = {  # the least that each number may be
    "seeds": 1,
    "image_size": 0,
    "train_examples": 2,
    "eval_examples": 0,
    "batch_size": 2,  # one example has no variance
    "num_steps": 1,
    "steps_per_dispatch": 1,
    "compiler_level": 0,
}


def prepare(config: Config) -> Images:
    """Checks the config and loads the images; each core becomes a device, for the sweeps."""
    for name, least in _WHOLE.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value} is not allowed: a whole number from {least} up")
    for name in ("width", "rate", "gain"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} is not allowed: it must be positive and finite")
    if not 0 <= config.l2 < math.inf:
        raise ValueError(f"l2={config.l2} is not allowed: it must be 0 or more, and finite")
    if config.num_steps % config.steps_per_dispatch:
        raise ValueError(
            f"num_steps={config.num_steps} is not allowed: it must be a multiple of "
            f"steps_per_dispatch={config.steps_per_dispatch}"
        )
    if config.strategy not in ("auto", *STRATEGIES):
        raise ValueError(
            f"strategy={config.strategy!r} is not allowed: one of auto, {', '.join(STRATEGIES)}"
        )
    batches, draws = config.train_examples // config.batch_size, config.draws
    if not draws or not all(isinstance(n, int) and 1 <= n <= batches for n in draws):
        raise ValueError(
            f"draws={draws} is not allowed: give whole numbers from 1 to {batches}, the batches of "
            f"{config.batch_size} in train_examples={config.train_examples}"
        )
    use_cpu_cores()
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="standardized",
        size=config.image_size,
    )
    for split, name in ((images.train, "train_examples"), (images.test, "eval_examples")):
        if getattr(config, name) > len(split.label):
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: {config.dataset} has "
                f"{len(split.label)}"
            )
    images = images._replace(
        train=jax.tree.map(lambda leaf: leaf[: config.train_examples], images.train),
        test=jax.tree.map(lambda leaf: leaf[: config.eval_examples or None], images.test),
    )
    sample = jax.ShapeDtypeStruct((1, *images.train.image.shape[1:]), jnp.float32)
    # Modules that are unknown, and images too small for them, are refused here.
    model = make_model(_network(config, images), per_activation=False)
    jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), sample)
    return images


def _network(config: Config, images: Images) -> Network:
    return Network(
        num_classes=images.num_classes,
        width=config.width,
        modules=tuple(config.modules),
        image_shape=images.train.image.shape[1:],
        batch_size=config.batch_size,
        num_steps=config.num_steps,
        steps_per_dispatch=config.steps_per_dispatch,
        rate=config.rate,
        l2=config.l2,
        compiler_level=config.compiler_level,
    )


def plan(config: Config) -> dict[str, list[list[Run]]]:
    """The networks of each ensemble, by kind; ensembles of both kinds share their seeds."""
    varied = six(config.gain)
    return {
        kind: [
            [Run(setting, k * len(varied) + i) for i, setting in enumerate(settings)]
            for k in range(config.seeds)
        ]
        for kind, settings in ((VARIED, varied), (SEEDS, (BASE,) * len(varied)))
    }


def run(config: Config, images: Images, path: Path):
    """Trains what is not yet in the workdir, decides, and draws."""
    ensembles = plan(config)
    runs = [run for kind in ensembles.values() for ensemble in kind for run in ensemble]
    with Runner(
        path,
        Ledger(path / "metrics.jsonl"),
        total_steps=len(runs) * config.num_steps,
        strategy=config.strategy,
    ) as runner:
        network = _network(config, images)
        trainer = Trainer(runner, network, images, path / "predictions", config.draws)
        sampled = [ensemble[0] for ensemble in ensembles[SEEDS]]
        trained = dict(zip(runs, trainer.train(runs, sampled=sampled), strict=True))
        records: dict[str, list[dict[str, Any]]] = {}
        for kind, of_kind in ensembles.items():
            records[kind] = []
            for k, ensemble in enumerate(of_kind):
                members = [trained[run] for run in ensemble]
                combined = runner.get(
                    f"ensemble of {kind} seed={k}", functools.partial(trainer.combine, members)
                )
                records[kind].append({"members": members, **combined})
    findings = verdicts.judge(config, records, images.num_classes)
    return findings, draw(config, records, path / "figures")


CLAIMS = verdicts.CLAIMS

EXPERIMENT = Experiment(
    __name__,
    title="How much less do six batch-normalized networks err together?",
    presets=PRESETS,
)
