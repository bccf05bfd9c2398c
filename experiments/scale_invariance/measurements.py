"""What `experiments.scale_invariance` measures; each measurement is a record of the ledger."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bn_research.lab.images import check_network, load_images
from bn_research.lab.workdir import Ledger
from bn_research.models.cnn import hidden_layers
from bn_research.probes.angular_updates import ScaleLog, equilibrium_angle
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.loop import every, train
from bn_research.training.preemption import Preemption, Stopped
from bn_research.training.step import Batch
from experiments.scale_invariance import Config, dynamics, identities
from experiments.scale_invariance.dynamics import Network, Norms, Setting, exponential_rates

_POINTS = 200  # of a trajectory that are kept for the figures
_SECONDS_BETWEEN_CHECKPOINTS = 10.0


def prepare(config: Config) -> Batch:
    """The training images, from 0 to 1."""
    for name, least in (
        ("seeds", 1),
        ("num_steps", 2),
        ("equilibrium_steps", 2),
        ("steps_per_dispatch", 1),
    ):
        if getattr(config, name) < least:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: at least {least} is needed"
            )
    for name in ("scales", "factors", "equilibrium_rates", "equilibrium_products"):
        values = getattr(config, name)
        if not values or not all(0 < value < math.inf for value in values):
            raise ValueError(f"{name}={values} is not allowed: give positive numbers")
    for name in ("learning_rate", "other_rate", "weight_decay", "epsilon"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} is not allowed: it must be positive")
    if not 0 <= config.momentum < 1:
        raise ValueError(f"momentum={config.momentum} is not allowed: it must lie in [0, 1)")
    exponential_rates([config.learning_rate], config.weight_decay, config.momentum)
    if config.equilibrium_steps % config.steps_per_dispatch:
        raise ValueError(
            f"equilibrium_steps={config.equilibrium_steps} is not allowed: it must be a multiple "
            f"of steps_per_dispatch={config.steps_per_dispatch}"
        )
    if config.wide_network == config.network:
        raise ValueError(
            f"wide_network={config.wide_network!r} is not allowed: network is the same"
        )
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="unit",
        size=config.image_size,
    )
    count = len(images.train.label)
    if not 1 < config.batch_size <= count:
        raise ValueError(
            f"batch_size={config.batch_size} is not allowed: it must lie between 2 and {count}, "
            "the number of training examples"
        )
    for network in (config.network, config.wide_network):
        if not hidden_layers(network):
            raise ValueError(f"network {network!r} has no hidden layer: give one before the head")
        check_network(network, images, config.dataset)
    return Batch(np.asarray(images.train.image), np.asarray(images.train.label))  # type: ignore[arg-type]


def measure(config: Config, examples: Batch, path: Path) -> dict[str, list[dict[str, Any]]]:
    """Records by kind: backprop, losses, tangent, effective, exponential, equilibrium."""
    ledger = Ledger(path / "metrics.jsonl")
    with (
        Preemption() as preemption,
        contextlib.closing(Checkpointer(path / "checkpoints")) as saver,
    ):
        plans = _plans(
            config,
            examples,
            path / "scale_log.jsonl",
            saver=saver,
            save_when=every(_SECONDS_BETWEEN_CHECKPOINTS),
            preempted=preemption.requested,
        )
        records: dict[str, list[dict[str, Any]]] = {kind: [] for kind in plans}
        total = sum(map(len, plans.values()))
        with tqdm(total=total, unit="measurement", dynamic_ncols=True) as bar:
            for kind, plan in plans.items():
                for name, measurement in plan.items():
                    bar.set_description(name)
                    records[kind].append(ledger.get(name, measurement))
                    bar.update()
                    if preemption.requested(bar.n):
                        raise Stopped(bar.n)
    return records


def _plans(
    config: Config, examples: Batch, log_path: Path, **training: Any
) -> dict[str, dict[str, Callable[[], Mapping[str, Any]]]]:
    """Kind -> name in the ledger -> measurement; `training` is for `train`."""
    bind, seeds = functools.partial, range(config.seeds)
    images = np.asarray(examples.image)
    first = jax.tree.map(lambda leaf: leaf[:256], examples)
    on_device = Batch(jnp.asarray(examples.image), jnp.asarray(examples.label))
    momenta = tuple(dict.fromkeys((0.0, config.momentum)))
    settings = [
        (config.network, rate, product / rate, momentum)
        for momentum in momenta
        for rate in config.equilibrium_rates
        for product in config.equilibrium_products
    ]
    settings.append((config.wide_network, *settings[-1][1:3], 0.0))  # a control
    return {
        "backprop": {
            f"identities {layer} seed={seed}": bind(
                identities.measure, images, layer, config.scales, config.epsilon, seed
            )
            for layer, seed in itertools.product(identities.LAYERS, seeds)
        },
        "losses": {
            f"loss seed={seed}": bind(measure_losses, config, first, seed) for seed in seeds
        },
        "tangent": {
            f"tangent {name} seed={seed}": bind(measure_tangent, config, examples, name, seed)
            for name, seed in itertools.product(networks(config), seeds)
        },
        "effective": {
            f"effective rate momentum={momentum:g} seed={seed}": bind(
                _measure_effective_rate, config, examples, momentum, seed
            )
            for momentum, seed in itertools.product(momenta, seeds)
        },
        "exponential": {
            f"exponential rate seed={seed}": bind(_measure_exponential, config, examples, seed)
            for seed in seeds
        },
        "equilibrium": {
            f"equilibrium {(name := _named(*setting, seed))}": bind(
                _measure_equilibrium, config, on_device, *setting, seed, log_path, name, **training
            )
            for setting, seed in itertools.product(settings, seeds)
        },
    }


def _named(spec: str, rate: float, decay: float, momentum: float, seed: int) -> str:
    return f"{spec} eta={rate:g} lambda={decay:g} momentum={momentum:g} seed={seed}"


def networks(config: Config) -> dict[str, Network]:
    """The network with BN, and the controls."""
    return {
        "BN": Network(config.network, "hidden"),
        "no BN": Network(config.network, "none"),
        "BN, bias inside": Network(config.network, "last", use_bias=True),
    }


def _kept(steps: int) -> np.ndarray:
    """Steps of a trajectory that a figure shows."""
    return np.unique(np.linspace(0, steps - 1, _POINTS).astype(int))


def _trajectory(
    config: Config,
    examples: Batch,
    name: str,
    seed: int,
    rates: float | np.ndarray,
    decay: float = 0.0,
    **options: float,
) -> tuple[np.ndarray, Norms]:
    """Losses and norms of one of the networks; a rate alone is that of every step."""
    rates = np.broadcast_to(np.asarray(rates, np.float64), (config.num_steps,))
    run = Setting(np.array(rates), config.other_rate, decay, **options)
    return dynamics.trajectory(
        networks(config)[name], examples, seed, run, batch_size=config.batch_size
    )


def measure_losses(config: Config, examples: Batch, seed: int) -> dict[str, Any]:
    """Network -> loss at initialization at each scale of its hidden kernels."""
    nets = networks(config)
    with_epsilon = {"BN, ε > 0": nets["BN"]._replace(epsilon=config.epsilon)}
    return {
        name: dynamics.losses(network, examples, config.scales, seed)
        for name, network in (nets | with_epsilon).items()
    }


def measure_tangent(config: Config, examples: Batch, name: str, seed: int) -> dict[str, Any]:
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


def _measure_effective_rate(config: Config, examples: Batch, momentum: float, seed: int):
    """Losses of (η, λ, w₀) and of (c²η, λ/c², c·w₀), largest difference over all steps."""

    def losses(name: str, c: float, factor: float) -> np.ndarray:
        rate, decay = c**2 * config.learning_rate, config.weight_decay / c**2
        options = dict(momentum=momentum, factor=factor)
        return _trajectory(config, examples, name, seed, rate, decay, **options)[0]

    base = losses("BN", 1.0, 1.0)
    plain = losses("no BN", 1.0, 1.0)
    difference = {c: np.abs(losses("BN", c, c) - base) for c in config.factors}
    # Of the controls the factor nearest to 1: the larger ones may diverge.
    c = min(config.factors, key=lambda c: abs(math.log(c)))
    kept = _kept(config.num_steps)
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


def _measure_exponential(config: Config, examples: Batch, seed: int) -> dict[str, Any]:
    """Losses with decay, and without it at the rate that grows instead."""
    rate, decay, momentum = config.learning_rate, config.weight_decay, config.momentum
    growing = exponential_rates(np.full(config.num_steps, rate), decay, momentum)

    def losses(name: str, rates: float | np.ndarray, decay: float = 0.0) -> np.ndarray:
        return _trajectory(config, examples, name, seed, rates, decay, momentum=momentum)[0]

    decayed = losses("BN", rate, decay)
    exponential = losses("BN", growing)
    constant = losses("BN", rate)
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


def _measure_equilibrium(
    config: Config,
    examples: Batch,
    spec: str,
    rate: float,
    decay: float,
    momentum: float,
    seed: int,
    log_path: Path,
    name: str,
    **training: Any,
) -> dict[str, Any]:
    """A run in float32: angles per step over its second half, by hidden kernel."""
    network, steps = Network(spec, "hidden", epsilon=config.epsilon), config.equilibrium_steps
    groups = tuple(dynamics.kernel_paths(network))
    create, advance = dynamics.equilibrium_programs(
        network, examples.image.shape[1:], config.batch_size, config.steps_per_dispatch, groups
    )
    run = Setting(np.array([rate]), config.other_rate, decay, momentum)
    log = ScaleLog(groups, learning_rate=rate, weight_decay=decay, momentum=momentum, path=log_path)
    _, history = train(
        lambda state: advance(state, examples, run),
        lambda: create(jax.random.key(seed), run),
        name=name,
        num_steps=steps,
        steps_per_dispatch=config.steps_per_dispatch,
        on_metrics=log,
        **training,
    )
    half, kept = steps // 2, _kept(steps)
    angle, norm = log["angle"], log["norm"]
    return {
        "network": spec,
        "rate": rate,
        "decay": decay,
        "momentum": momentum,
        "seed": seed,
        "predicted": equilibrium_angle(rate, decay, momentum),
        "layers": list(groups),
        "rms": np.sqrt(np.mean(np.square(angle[half:]), axis=0)),
        "mean": np.mean(angle[half:], axis=0),
        "norm_drift": norm[-1] / norm[half],
        "loss": np.mean(history.loss[half:]),
        "diverged": history.diverged,
        "steps": kept + 1,
        "angles": angle[kept],
        "norms": norm[kept],
    }
