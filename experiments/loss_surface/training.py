"""Trainings of `experiments.loss_surface`, and what is measured of their loss on the way.

One program for each network takes both kinds of steps: stochastic gradient descent, and gradient
descent by the whole of a fixed batch. Both are plain, so that a step is −η times the gradient. What
a dispatch observes is of the state that it begins with.
"""

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bn_research.lab import settings
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, check_network, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN
from bn_research.models.initializers import kernel_initializer
from bn_research.probes.curvature import HessianEigenvalues, hessian_top_eigenvalues
from bn_research.probes.step_direction import StepSurface, loss_along_descent
from bn_research.training.batch_loss import batch_loss, frozen_loss
from bn_research.training.cores import use_cpu_cores
from bn_research.training.loop import History, batch_at, run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, apply_fn_of, make_train_step
from experiments.loss_surface import Config, verdicts
from experiments.loss_surface.verdicts import ARMS, LOW, LOW_BN, OWN, PLAIN, SAME, Records


class Run(settings.Setting, traced="rate is_descent is_watched"):
    """What a network is trained with."""

    arm: str  # "plain" or "BN"
    rate: float
    is_descent: bool = False  # by the whole fixed batch, in place of SGD
    is_watched: bool = True  # measured, which costs more than the steps


class Observed(NamedTuple):
    """Of a dispatch; NaN where it was not measured."""

    surface: StepSurface  # of SGD: of the batch of its first step, along that step
    through: HessianEigenvalues  # of the fixed batch, statistics differentiated through
    frozen: HessianEigenvalues  # of SGD with BN: likewise, BN a fixed affine map


def prepare(config: Config) -> Images:
    """The images; each core becomes a device, for the sweeps."""
    use_cpu_cores()
    images = images_of(config, scale="standardized")
    check_network(config.network, images, config.dataset)
    at_most(config, len(images.train.label), "the training set", "batch_size", "fixed_examples")
    return images


def measure(config: Config, images: Images, path: Path) -> Records:
    """Chooses the rates, then follows SGD in every role, and gradient descent by one batch."""
    seeds, grid = range(config.seeds), config.descent_factors
    total = (2 * len(config.rates) + 5 * config.seeds) * config.num_steps + 2 * config.seeds * (
        len(grid) * config.descent_steps + config.edge_steps
    )
    # Of the Hessian, and of gradient descent.
    fixed = jax.tree.map(lambda leaf: leaf[: config.fixed_examples], images.train)
    ledger = Ledger(path / "metrics.jsonl")
    with Runner(path, ledger, total_steps=total, strategy="devices") as runner:

        def train(num_steps: int, runs: Iterable[tuple[Run, int]]) -> list[dict[str, Any]]:
            return settings.train(
                runner,
                [settings.Training(run, seed, num_steps) for run, seed in runs],
                lambda run: programs(run, config, images.train.image.shape[1:]),
                (images.train, fixed),
                record=functools.partial(_record, config),
                name=_name,
                describe=lambda training: _name(training).partition(" rate")[0],
            )

        def sgd(arm: str, rate: float) -> list[dict[str, Any]]:
            return train(config.num_steps, [(Run(arm, rate), seed) for seed in seeds])

        best = {}
        for arm in ARMS:  # rates are chosen on a seed that no verdict sees
            trials = [(Run(arm, rate, is_watched=False), config.seeds) for rate in config.rates]
            best[arm] = min(train(config.num_steps, trials), key=verdicts.final_loss)["rate"]
        # At its best rate a plain network is near the end of its stability, and some seeds die.
        lower = max((r for r in config.rates if r < best["plain"]), default=best["plain"])
        surfaces = {
            PLAIN: sgd("plain", best["plain"]),
            SAME: sgd("BN", best["plain"]),
            OWN: sgd("BN", best["BN"]),
            LOW: sgd("plain", lower),
            LOW_BN: sgd("BN", lower),
        }
        descents: dict[tuple[str, float], list[dict[str, Any]]] = {}
        edges = {}
        for arm, role in ARMS.items():
            limits = verdicts.limits(surfaces[role])
            runs = [
                (Run(arm, factor * limits[seed], is_descent=True, is_watched=False), seed)
                for factor, seed in itertools.product(grid, seeds)
            ]
            descended = iter(train(config.descent_steps, runs))
            descents |= {(arm, factor): [next(descended) for _ in seeds] for factor in grid}
            followed = [Run(arm, config.edge_factor * limit, is_descent=True) for limit in limits]
            edges[arm] = train(config.edge_steps, zip(followed, seeds, strict=True))
    return Records(surfaces, descents, edges)


def _name(training: settings.Training) -> str:
    run = training.setting
    purpose = "descent" if run.is_descent else "SGD" if run.is_watched else "tune"
    name = f"{purpose} {run.arm} rate={run.rate:.9g} steps={training.num_steps}"
    return f"{name} seed={training.seed}{'' if run.is_watched else ' unwatched'}"


def _record(
    config: Config, training: settings.Training, state: TrainState, history: History
) -> dict[str, Any]:
    """The surface of each dispatch is kept, and λmax where it was measured."""
    run, observed = training.setting, history.observed
    record = {
        "network": config.network,
        "rate": run.rate,
        "seed": training.seed,
        "num_steps": training.num_steps,
        "is_descent": run.is_descent,
        "is_watched": run.is_watched,
        "arm": run.arm,
        "loss": history.loss,
        "diverged": history.diverged,
    }
    if not run.is_watched:
        return record
    steps = np.arange(len(observed.surface.smoothness)) * config.steps_per_dispatch
    due = run.is_descent | np.isin(steps, config.curvature_steps)
    if not run.is_descent:
        record |= {"surface_steps": steps, "surface": observed.surface._asdict()}
    record["curvature_steps"] = steps[due]
    for kind in ("through",) if run.is_descent or run.arm == "plain" else ("through", "frozen"):
        found = getattr(observed, kind)._asdict()
        record[kind] = {name: leaf[due, 0] for name, leaf in found.items()}
    return record


@settings.per_structure
def programs(run: Run, config: Config, shape: tuple[int, ...]) -> settings.Programs:
    """Members are SGD or gradient descent, watched or not; observes `Observed`."""
    model = create_model(config.network, run.arm)
    size, num_steps = config.batch_size, config.steps_per_dispatch

    def init(key: Array, run: Run) -> Any:
        return model.init(key, jnp.zeros((1, *shape)), train=False)

    def optimizer(run: Run) -> Any:
        return create_optimizer("sgd", run.rate)

    def advance(state: TrainState, run: Run, data: tuple[Batch, Batch]):
        train, fixed = data
        observed = _observe(model, config, state, run, train, fixed)
        step = make_train_step(apply_fn_of(model), optimizer(run))
        state, metrics = jax.lax.cond(
            run.is_descent,
            lambda: jax.lax.scan(lambda s, _: step(s, fixed), state, length=num_steps),
            lambda: run_steps(step, state, train, batch_size=size, num_steps=num_steps),
        )
        return state, metrics._replace(observed=observed)

    sweep = settings.sweep(advance, steps_per_dispatch=num_steps)
    return settings.Programs(settings.creator(init, optimizer), sweep)


def create_model(network: str, arm: str) -> CNN:
    """The network of an arm: plain, or BN on all layers but the head."""
    # Without momentum the running statistics are those of the last batch, which can be frozen.
    norm = functools.partial(BatchNorm, momentum=0.0)
    placement: Any = "none" if arm == "plain" else "hidden"
    return CNN(network, norm, placement, kernel_init=kernel_initializer("he"))


def _observe(
    model: CNN, config: Config, state: TrainState, run: Run, train: Batch, fixed: Batch
) -> Observed:
    apply_fn, params = apply_fn_of(model), state.params
    top = functools.partial(  # one eigenvalue at each end of the spectrum
        hessian_top_eigenvalues, num_iterations=config.num_iterations, key=jax.random.key(0)
    )

    def surface() -> StepSurface:
        loss_fn = batch_loss(apply_fn, batch_at(state, train, config.batch_size))
        return loss_along_descent(loss_fn, params, run.rate)

    def through() -> HessianEigenvalues:
        return top(batch_loss(apply_fn, fixed), params)

    def frozen() -> HessianEigenvalues:
        return top(frozen_loss(apply_fn, params, fixed), params)

    is_sgd = ~run.is_descent & run.is_watched
    is_due = is_sgd & jnp.any(jnp.array(config.curvature_steps) == state.step)
    return Observed(
        _if(is_sgd, surface),
        _if(is_due | (run.is_descent & run.is_watched), through),
        _if(model.placement != "none" and is_due, frozen),
    )


def _if(condition: Any, measure: Any) -> Any:
    """What is measured, or NaN in its place at no cost."""

    def missing() -> Any:
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(measure))

    return missing() if condition is False else jax.lax.cond(condition, measure, missing)
