"""Regression, and trainings on images: raw, centred, scaled and whitened."""

import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bn_research.lab.arms import Arm, Trainer
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, check_network, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.normalization.input_whitening import TRANSFORMS, second_moment, transform_inputs
from bn_research.training.cores import use_cpu_cores
from bn_research.training.step import Batch
from experiments.whitening import Config
from experiments.whitening.regression import measure_regression
from experiments.whitening.verdicts import PLACES, Records, choose, other


def prepare(config: Config) -> Images:
    """The images; each core becomes a device, for the sweeps."""
    use_cpu_cores()
    images = images_of(config, scale="unit", limit=config.examples)
    check_network(config.network, images, config.dataset)
    at_most(config, len(images.train.label), "the training set", "batch_size")
    return images


def measure(config: Config, images: Images, path: Path) -> Records:
    """Regression for each seed, then each kind of images: its spectrum, its trainings."""
    kinds = {name: (name, config.epsilon) for name in TRANSFORMS}
    kinds |= {other(epsilon): ("zca", epsilon) for epsilon in config.other_epsilons}
    arms = len(kinds) * len(PLACES)
    total = arms * (len(config.rates) + config.seeds) * config.num_steps
    pixels = np.asarray(images.train.image), np.asarray(images.test.image)
    spectra, trained = {}, []
    ledger = Ledger(path / "metrics.jsonl")
    with Runner(path, ledger, total_steps=total, strategy="devices") as runner:
        regressions = [
            runner.get(f"regression seed={seed}", measure_regression, seed, config)
            for seed in range(config.seeds)
        ]
        for name, (transform, epsilon) in kinds.items():
            train, test = transform_inputs(*pixels, transform, epsilon=epsilon)
            spectra[name] = runner.get(f"second moment {name}", second_moment, train)
            transformed = images._replace(
                train=Batch(jnp.asarray(train), images.train.label),
                test=Batch(jnp.asarray(test), images.test.label),
            )
            each = config.steps_per_dispatch
            trainer = Trainer(transformed, runner, steps_per_dispatch=each, tag=name)
            trained += [{**record, "inputs": name} for record in _train(config, trainer)]
    return Records(regressions, spectra, trained)


def _train(config: Config, trainer: Trainer) -> list[dict[str, Any]]:
    """Records of all placements on one kind of inputs, each at its best rate."""
    arms = {
        (placement, rate): Arm(
            config.network,
            placement,
            initializer="he",
            use_bias=True,
            batch_size=config.batch_size,
            learning_rate=rate,
            num_steps=config.num_steps,
        )
        for placement, rate in itertools.product(PLACES, config.rates)
    }
    trials = trainer.tune([(arm, config.seeds) for arm in arms.values()])
    runs = []
    for placement in PLACES:
        best = choose(config, [trial for trial in trials if trial["placement"] == placement])
        runs += [(arms[placement, best], seed) for seed in range(config.seeds)]
    return trainer.train(runs)
