"""The measurements of `experiments.scale_invariance`: each gives a record of the ledger."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_research.probes.angular_updates import ScaleLog, equilibrium_angle
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.loop import every, train
from bn_research.training.preemption import Preemption
from bn_research.training.step import Batch
from experiments.scale_invariance import dynamics
from experiments.scale_invariance.dynamics import Network, exponential_rates, setting, trajectory

_POINTS = 200  # of a trajectory that are kept for the figures
_SECONDS_BETWEEN_CHECKPOINTS = 10.0


def networks(config: Any) -> dict[str, Network]:
    """The network with BN, and the controls."""
    return {
        "BN": Network(config.network, "hidden"),
        "no BN": Network(config.network, "none"),
        "BN, bias inside": Network(config.network, "last", use_bias=True),
    }


def measure_losses(config: Any, examples: Batch, seed: int) -> dict[str, Any]:
    """Network -> loss at initialization at each scale of its hidden kernels."""
    nets = networks(config)
    with_epsilon = {"BN, ε > 0": nets["BN"]._replace(epsilon=config.epsilon)}
    return {
        name: dynamics.losses(network, examples, config.scales, seed)
        for name, network in (nets | with_epsilon).items()
    }


def measure_tangent(config: Any, examples: Batch, name: str, seed: int) -> dict[str, Any]:
    """Orthogonality and Pythagoras over a run of plain SGD, [steps, kernels] at their worst."""
    run = setting(config.learning_rate, steps=config.num_steps, other_rate=config.other_rate)
    loss, norms = trajectory(
        networks(config)[name], examples, seed, run, batch_size=config.batch_size
    )
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


def measure_effective_rate(config: Any, examples: Batch, momentum: float, seed: int):
    """Losses of (η, λ, w₀) and of (c²η, λ/c², c·w₀), largest difference over all steps."""
    nets, rate, decay = networks(config), config.learning_rate, config.weight_decay
    options: dict[str, Any] = dict(
        steps=config.num_steps, momentum=momentum, other_rate=config.other_rate
    )

    def losses(network, c, factor):
        run = setting(c**2 * rate, decay / c**2, factor=factor, **options)
        return trajectory(network, examples, seed, run, batch_size=config.batch_size)[0]

    base = losses(nets["BN"], 1.0, 1.0)
    plain = losses(nets["no BN"], 1.0, 1.0)
    difference = {c: np.abs(losses(nets["BN"], c, c) - base) for c in config.factors}
    # Of the controls the factor nearest to 1: the larger ones may diverge.
    c = min(config.factors, key=lambda c: abs(math.log(c)))
    kept = _kept(config.num_steps)
    return {
        "momentum": momentum,
        "seed": seed,
        "difference": {f"{c:g}": values.max() for c, values in difference.items()},
        "control": {
            "no BN": np.abs(losses(nets["no BN"], c, c) - plain).max(),
            "w₀ for c·w₀": np.abs(losses(nets["BN"], c, 1.0) - base).max(),
        },
        "steps": kept + 1,
        "loss": base[kept],
        "differences": {f"{c:g}": values[kept] for c, values in difference.items()},
    }


def measure_exponential(config: Any, examples: Batch, seed: int) -> dict[str, Any]:
    """Losses with decay, and without it at the rate that grows instead."""
    nets, rate = networks(config), config.learning_rate
    options: dict[str, Any] = dict(
        steps=config.num_steps, momentum=config.momentum, other_rate=config.other_rate
    )
    growing = exponential_rates(
        np.full(config.num_steps, rate), config.weight_decay, config.momentum
    )

    def losses(network, rates, decay=0.0):
        run = setting(rates, decay, **options)
        return trajectory(network, examples, seed, run, batch_size=config.batch_size)[0]

    decayed, exponential, constant = (
        losses(nets["BN"], rate, config.weight_decay),
        losses(nets["BN"], growing),
        losses(nets["BN"], rate),
    )
    # Without BN the loss may blow up at a growing rate: its first steps will do.
    few = min(config.num_steps, 50)
    plain = [
        losses(nets["no BN"], rates, decay)[:few]
        for rates, decay in (
            (rate, config.weight_decay),
            (np.minimum(growing, growing[few - 1]), 0.0),
        )
    ]
    difference, kept = np.abs(exponential - decayed), _kept(config.num_steps)
    return {
        "seed": seed,
        "difference": difference.max(),
        "growth": growing[-1] / growing[0],
        "control": {
            "no BN": np.abs(plain[1] - plain[0]).max(),
            "constant rate": np.abs(constant - decayed).max(),
        },
        "steps": kept + 1,
        "decay": decayed[kept],
        "exponential": exponential[kept],
        "constant": constant[kept],
        "differences": difference[kept],
        "rates": growing[kept],
    }


def _kept(steps: int) -> np.ndarray:
    """Steps of a trajectory that a figure shows."""
    return np.unique(np.linspace(0, steps - 1, _POINTS).astype(int))


class Equilibrium:
    """Trains to equilibrium, each setting once in the life of a workdir, with a `ScaleLog`."""

    def __init__(self, config: Any, examples: Batch, path: Path, preemption: Preemption):
        """Opens the checkpoints; raises CheckpointError when all of them are damaged."""
        self._config, self._path, self._preemption = config, path, preemption
        self._examples = Batch(jnp.asarray(examples.image), jnp.asarray(examples.label))
        self._saver = Checkpointer(path / "checkpoints")
        self._checkpoint_is_due = every(_SECONDS_BETWEEN_CHECKPOINTS)

    def close(self) -> None:
        """Waits for what is being saved."""
        self._saver.close()

    def measure(self, network: Network, rate: float, decay: float, momentum: float, seed: int):
        """Record of a run in float32: angles per step over its second half, by hidden kernel."""
        config, steps = self._config, self._config.equilibrium_steps
        shape = self._examples.image.shape[1:]
        groups = tuple(dynamics.kernel_paths(network))
        create, advance = dynamics.equilibrium_programs(
            network, shape, config.batch_size, config.steps_per_dispatch, groups
        )
        run = setting(rate, decay, steps=1, momentum=momentum, other_rate=config.other_rate)
        name = f"{network.spec} eta={rate:g} lambda={decay:g} momentum={momentum:g} seed={seed}"
        log = ScaleLog(
            groups,
            learning_rate=rate,
            weight_decay=decay,
            momentum=momentum,
            path=self._path / "scale_log.jsonl",
        )
        _, history = train(
            lambda state: advance(state, self._examples, run),
            lambda: create(jax.random.key(seed), run),
            name=name,
            num_steps=steps,
            steps_per_dispatch=config.steps_per_dispatch,
            saver=self._saver,
            save_when=self._checkpoint_is_due,
            on_metrics=log,
            preempted=self._preemption.requested,
        )
        half, kept = steps // 2, _kept(steps)
        angle, norm = log["angle"], log["norm"]
        predicted = equilibrium_angle(rate, decay, momentum)
        return {
            "network": network.spec,
            "rate": rate,
            "decay": decay,
            "momentum": momentum,
            "seed": seed,
            "predicted": predicted,
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


def equilibrium_settings(config: Any) -> list[tuple[str, float, float, float]]:
    """(network, η, λ, momentum) of every run to equilibrium; the last is the wide control."""
    network = config.network
    settings = [
        (network, rate, product / rate, momentum)
        for momentum in dict.fromkeys((0.0, config.momentum))
        for rate in config.equilibrium_rates
        for product in config.equilibrium_products
    ]
    rate, product = config.equilibrium_rates[-1], config.equilibrium_products[-1]
    return [*settings, (config.wide_network, rate, product / rate, 0.0)]
