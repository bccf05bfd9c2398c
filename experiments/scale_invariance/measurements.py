"""What `experiments.scale_invariance` measures; each measurement is a record of the ledger."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_research.claims.judging import Record
from bn_research.lab.fields import at_most
from bn_research.lab.images import check_network, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.settings import Training, train
from bn_research.lab.workdir import Ledger
from bn_research.models.cnn import hidden_layers
from bn_research.probes.angular_updates import equilibrium_angle
from bn_research.training.exponential_rates import exponential_rates
from bn_research.training.loop import History
from bn_research.training.state import TrainState
from bn_research.training.step import Batch
from experiments.scale_invariance import Config, dynamics, identities
from experiments.scale_invariance.dynamics import Norms, Run

_POINTS = 200  # of a trajectory that are kept for the figures


def prepare(config: Config) -> Batch:
    """The training images, from 0 to 1."""
    exponential_rates([config.learning_rate], config.weight_decay, config.momentum)
    images = images_of(config, scale="unit")
    at_most(config, len(images.train.label), "the training set", "batch_size")
    for network in (config.network, config.wide_network):
        if not hidden_layers(network):
            raise ValueError(f"network {network!r} has no hidden layer: give one before the head")
        check_network(network, images, config.dataset)
    return Batch(np.asarray(images.train.image), np.asarray(images.train.label))  # type: ignore[arg-type]


def measure(config: Config, examples: Batch, path: Path) -> dict[str, Sequence[Record]]:
    """Records by kind: backprop, losses, tangent, effective, exponential, equilibrium."""
    momenta = tuple(dict.fromkeys((0.0, config.momentum)))
    trainings = _to_equilibrium(config, momenta)
    ledger, steps = Ledger(path / "metrics.jsonl"), len(trainings) * config.equilibrium_steps
    with Runner(path, ledger, total_steps=steps, strategy="devices") as runner:

        def each(name: str, measurement: Callable[..., Record], *choices: Any) -> list[Record]:
            """Records for all choices and seeds, which the name in the ledger tells."""
            return [
                runner.get(name.format(*given), measurement, config, examples, *given)
                for given in itertools.product(*choices, range(config.seeds))
            ]

        return {
            "backprop": each("identities {} seed={}", identities.measure, identities.LAYERS),
            "losses": each("loss seed={}", measure_losses),
            "tangent": each("tangent {} seed={}", measure_tangent, networks(config)),
            "effective": each("effective rate momentum={:g} seed={}", _measure_effective, momenta),
            "exponential": each("exponential rate seed={}", _measure_exponential),
            "equilibrium": train(
                runner,
                trainings,
                lambda run: dynamics.equilibrium_programs(
                    run, examples.image.shape[1:], config.batch_size, config.steps_per_dispatch
                ),
                Batch(jnp.asarray(examples.image), jnp.asarray(examples.label)),
                record=_equilibrium_record,
                name=_name,
                describe=lambda training: f"equilibrium {training.setting.spec}",
            ),
        }


def networks(config: Config) -> dict[str, Run]:
    """The network with BN, and the controls."""
    return {
        "BN": Run(config.network, "hidden"),
        "no BN": Run(config.network, "none"),
        "BN, bias inside": Run(config.network, "last", use_bias=True),
    }


def _kept(steps: int) -> np.ndarray:
    """Steps of a trajectory that a figure shows."""
    return np.unique(np.linspace(0, steps - 1, _POINTS).astype(int))


def _trajectory(
    config: Config, examples: Batch, name: str, seed: int, rate: Any, **options: float
) -> tuple[np.ndarray, Norms]:
    """Losses and norms of one of the networks, at a rate or at one for each step."""
    rates = np.full(config.num_steps, rate, np.float64)
    run = networks(config)[name].replace(rates=rates, other_rate=config.other_rate, **options)
    return dynamics.trajectory(run, examples, seed, config.batch_size)


def measure_losses(config: Config, examples: Batch, seed: int) -> Record:
    """Network -> loss at initialization at each scale of its hidden kernels."""
    first, nets = jax.tree.map(lambda leaf: leaf[:256], examples), networks(config)
    nets["BN, ε > 0"] = nets["BN"].replace(epsilon=config.epsilon)
    return {name: dynamics.losses(run, first, config.scales, seed) for name, run in nets.items()}


def measure_tangent(config: Config, examples: Batch, name: str, seed: int) -> Record:
    """Orthogonality and Pythagoras over a run of plain SGD, [steps, kernels] at their worst."""
    loss, norms = _trajectory(config, examples, name, seed, config.learning_rate)
    size = np.sqrt(norms.squared * norms.gradient_squared)
    share = np.abs(norms.radial) / np.where(size > 0, size, 1)  # a dead network has no gradient
    growth = config.learning_rate**2 * norms.gradient_squared
    error = np.abs(norms.squared_after - norms.squared - growth) / norms.squared
    predicted = norms.squared[0] + np.cumsum(growth, axis=0)
    kept = _kept(config.num_steps)
    return {
        "network": name,
        "seed": seed,
        "share": share.max(),
        "pythagoras": error.max(),
        "last_loss": loss[-1],
        "steps": kept + 1,
        "shares": share[kept].max(axis=1),
        "squared": norms.squared_after[kept] / norms.squared[0],
        "predicted": predicted[kept] / norms.squared[0],
    }


def _measure_effective(config: Config, examples: Batch, momentum: float, seed: int) -> Record:
    """Losses of (η, λ, w₀) and of (c²η, λ/c², c·w₀), largest difference over all steps."""

    def losses(name: str, c: float, factor: float) -> np.ndarray:
        rate, decay = c**2 * config.learning_rate, config.weight_decay / c**2
        options = dict(momentum=momentum, factor=factor)
        return _trajectory(config, examples, name, seed, rate, decay=decay, **options)[0]

    base, plain = losses("BN", 1.0, 1.0), losses("no BN", 1.0, 1.0)
    difference = {c: np.abs(losses("BN", c, c) - base) for c in config.factors}
    # Of the controls the factor nearest to 1: the larger ones may diverge.
    c, kept = min(config.factors, key=lambda c: abs(math.log(c))), _kept(config.num_steps)
    return {
        "momentum": momentum,
        "seed": seed,
        "difference": {f"{c:g}": values.max() for c, values in difference.items()},
        "control": {
            "no BN": np.abs(losses("no BN", c, c) - plain).max(),
            "w₀ for c·w₀": np.abs(losses("BN", c, 1.0) - base).max(),
        },
        "steps": kept + 1,
        "loss": base[kept],
        "differences": {f"{c:g}": values[kept] for c, values in difference.items()},
    }


def _measure_exponential(config: Config, examples: Batch, seed: int) -> Record:
    """Losses with decay, and without it at the rate that grows instead."""
    rate, decay, momentum = config.learning_rate, config.weight_decay, config.momentum
    growing = exponential_rates(np.full(config.num_steps, rate), decay, momentum)

    def losses(name: str, rates: float | np.ndarray, decay: float = 0.0) -> np.ndarray:
        return _trajectory(config, examples, name, seed, rates, decay=decay, momentum=momentum)[0]

    decayed = losses("BN", rate, decay)
    exponential, constant = losses("BN", growing), losses("BN", rate)
    # Without BN the loss may blow up at a growing rate: its first steps will do.
    few = min(config.num_steps, 50)
    plain = losses("no BN", rate, decay) - losses("no BN", np.minimum(growing, growing[few - 1]))
    difference, kept = np.abs(exponential - decayed), _kept(config.num_steps)
    return {
        "seed": seed,
        "difference": difference.max(),
        "growth": growing[-1] / growing[0],
        "control": {
            "no BN": np.abs(plain[:few]).max(),
            "constant rate": np.abs(constant - decayed).max(),
        },
        "steps": kept + 1,
        "decay": decayed[kept],
        "exponential": exponential[kept],
        "constant": constant[kept],
        "differences": difference[kept],
        "rates": growing[kept],
    }


def _to_equilibrium(config: Config, momenta: Sequence[float]) -> list[Training]:
    """Every run to equilibrium; those of the wide network, a control, come last."""
    run = Run(config.network, "hidden", epsilon=config.epsilon, other_rate=config.other_rate)
    runs = [
        run.replace(rates=np.array([rate]), decay=product / rate, momentum=momentum)
        for momentum in momenta
        for rate in config.equilibrium_rates
        for product in config.equilibrium_products
    ]
    runs.append(runs[-1].replace(spec=config.wide_network, momentum=0.0))
    seeds, steps = range(config.seeds), config.equilibrium_steps
    return [Training(run, seed, steps) for run in runs for seed in seeds]


def _name(training: Training) -> str:
    run = training.setting
    return (
        f"equilibrium {run.spec} eta={run.rates[0]:g} lambda={run.decay:g} "
        f"momentum={run.momentum:g} seed={training.seed}"
    )


def _equilibrium_record(training: Training, state: TrainState, history: History) -> dict[str, Any]:
    """Angles per step over the second half, by hidden kernel."""
    run, steps = training.setting, training.num_steps
    rate, layers = float(run.rates[0]), dynamics.kernel_paths(run.spec)
    half, kept = steps // 2, _kept(steps)
    norm, _, angle = (np.asarray(v, np.float64).reshape(-1, len(layers)) for v in history.observed)
    return {
        "network": run.spec,
        "rate": rate,
        "decay": run.decay,
        "momentum": run.momentum,
        "seed": training.seed,
        "predicted": equilibrium_angle(rate, run.decay, run.momentum),
        "layers": layers,
        "rms": np.sqrt(np.mean(np.square(angle[half:]), axis=0)),
        "mean": np.mean(angle[half:], axis=0),
        "norm_drift": norm[-1] / norm[half],
        "loss": np.mean(history.loss[half:]),
        "diverged": history.diverged,
        "steps": kept + 1,
        "angles": angle[kept],
        "norms": norm[kept],
    }
