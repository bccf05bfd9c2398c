"""Trainings of `experiments.loss_surface`, and what is measured of their loss on the way.

One program for each network takes both kinds of steps: stochastic gradient descent, and gradient
descent by the whole of a fixed batch. Both are plain, so that a step is −η times the gradient. What
a dispatch observes is of the state that it begins with.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bn_research.lab.compiler import compiler_options
from bn_research.lab.images import Images, check_network, load_images
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN
from bn_research.models.initializers import kernel_initializer
from bn_research.probes.curvature import HessianEigenvalues, LossFn, hessian_top_eigenvalues
from bn_research.probes.step_direction import StepSurface, loss_along_step
from bn_research.training.cores import use_cpu_cores
from bn_research.training.loop import History, batch_at, run_steps
from bn_research.training.metrics import cross_entropy_metrics
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, StepMetrics, make_train_step
from bn_research.training.sweep import Member, Sweep
from experiments.loss_surface import Config, verdicts

_LEAST = {
    "seeds": 1,
    "image_size": 0,
    "num_steps": 1,
    "steps_per_dispatch": 1,
    "curvature_steps": 0,
    "num_iterations": 1,
    "descent_steps": 1,
    "edge_steps": 1,
}


def prepare(config: Config) -> Images:
    """The images; each core becomes a device, for the sweeps."""
    for name, least in _LEAST.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int) or number < least:
                raise ValueError(
                    f"{name}={value} is not allowed: whole numbers from {least} up are needed"
                )
    for name in ("num_steps", "descent_steps", "edge_steps"):
        if getattr(config, name) % config.steps_per_dispatch:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: it must be a multiple of "
                f"steps_per_dispatch={config.steps_per_dispatch}"
            )
    for name in ("rates", "descent_factors", "curvature_steps"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}={values} is not allowed: give one or more, all different")
    for name in ("rates", "descent_factors"):
        values = getattr(config, name)
        if not all(isinstance(v, int | float) and 0 < v < math.inf for v in values):
            raise ValueError(f"{name}={values} is not allowed: give positive numbers")
    if not 0 < config.edge_factor < math.inf:
        raise ValueError(f"edge_factor={config.edge_factor} is not allowed: it must be positive")
    begun = range(0, config.num_steps, config.steps_per_dispatch)
    if 0 not in config.curvature_steps or not set(config.curvature_steps) <= set(begun):
        raise ValueError(
            f"curvature_steps={config.curvature_steps} is not allowed: 0 and multiples of "
            f"steps_per_dispatch={config.steps_per_dispatch} below num_steps={config.num_steps}"
        )
    use_cpu_cores()
    images = load_images(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        scale="standardized",
        size=config.image_size,
    )
    check_network(config.network, images, config.dataset)
    count = len(images.train.label)
    for name in ("batch_size", "fixed_examples"):
        if not 2 <= getattr(config, name) <= count:
            raise ValueError(
                f"{name}={getattr(config, name)} is not allowed: it must lie between 2 and {count}"
            )
    return images


def measure(config: Config, images: Images, path: Path) -> verdicts.Records:
    """Records of the rates' choice, of SGD in every role, and of gradient descent by one batch."""
    seeds = range(config.seeds)
    descents_of_an_arm = len(config.descent_factors) * config.descent_steps + config.edge_steps
    total = (
        2 * len(config.rates) * config.num_steps
        + 5 * config.seeds * config.num_steps
        + 2 * config.seeds * descents_of_an_arm
    )
    ledger = Ledger(path / "metrics.jsonl")
    with Runner(path, ledger, total_steps=total, strategy="devices") as runner:
        trained = {arm: _Trainer(runner, config, images, arm) for arm in verdicts.ARMS}

        def sgd(arm: str, rate: float) -> list[dict[str, Any]]:
            return trained[arm]("SGD", [Run(rate, seed, config.num_steps) for seed in seeds])

        best = {}
        for arm in verdicts.ARMS:
            # Rates are chosen on a seed that no verdict sees.
            trials = [
                Run(rate, config.seeds, config.num_steps, is_watched=False) for rate in config.rates
            ]
            best[arm] = min(trained[arm]("tune", trials), key=verdicts.final_loss)["rate"]
        # At its best rate a plain network is near the end of its stability, and some seeds die.
        lower = max((r for r in config.rates if r < best["plain"]), default=best["plain"])
        surfaces = {
            verdicts.PLAIN: sgd("plain", best["plain"]),
            verdicts.SAME: sgd("BN", best["plain"]),
            verdicts.OWN: sgd("BN", best["BN"]),
            verdicts.LOW: sgd("plain", lower),
            verdicts.LOW_BN: sgd("BN", lower),
        }
        descents, edges = {}, {}
        for arm, role in verdicts.ARMS.items():
            limits = [2 / found.low for found in verdicts.sharpness_at_start(surfaces[role])]

            def runs(factor: float, steps: int, watched: bool, limits=limits) -> list[Run]:
                rates = [factor * limit for limit in limits]
                return [Run(rates[s], s, steps, is_descent=True, is_watched=watched) for s in seeds]

            grid = config.descent_factors
            unwatched = [run for f in grid for run in runs(f, config.descent_steps, False)]
            records = trained[arm]("descent", unwatched)
            for index, factor in enumerate(grid):
                descents[arm, factor] = records[index * config.seeds :][: config.seeds]
            followed = runs(config.edge_factor, config.edge_steps, True)
            edges[arm] = trained[arm]("descent", followed)
    return verdicts.Records(surfaces, descents, edges)


class Hyper(NamedTuple):
    """What differs between the members of a sweep."""

    rate: Array  # shape=(), float32
    is_descent: Array  # shape=(), bool: by the whole fixed batch, in place of SGD
    is_watched: Array  # shape=(), bool: measure, which costs more than the steps


class Data(NamedTuple):
    """What a program is given."""

    train: Batch
    fixed: Batch  # of the Hessian, and of gradient descent


class Observed(NamedTuple):
    """Of a dispatch; NaN where it was not measured."""

    surface: StepSurface  # of SGD: of the batch of its first step, along that step
    through: HessianEigenvalues  # of the fixed batch, statistics differentiated through
    frozen: HessianEigenvalues  # of SGD with BN: likewise, BN a fixed affine map


class Run(NamedTuple):
    """A training."""

    rate: float
    seed: int
    num_steps: int
    is_descent: bool = False
    is_watched: bool = True


def create_model(network: str, arm: str) -> CNN:
    """The network of an arm, with BN on all layers but the head or without, and He's kernels."""
    # Without momentum the running statistics are those of the last batch, which can be frozen.
    norm = functools.partial(BatchNorm, momentum=0.0)
    placement: Any = "none" if arm == "plain" else "hidden"
    return CNN(network, norm, placement, kernel_init=kernel_initializer("he"))


def batch_loss(model: CNN, batch: Batch) -> LossFn:
    """Params → mean cross-entropy of a batch, normalized by the batch's own statistics."""
    return _loss(model, {}, batch, train=True)


def frozen_loss(model: CNN, params: Any, batch: Batch) -> LossFn:
    """The same with the statistics that the batch has at `params`, whatever it is given.

    At `params` its value is that of `batch_loss`; its derivatives are not.
    """
    _, stats = _apply_fn(model)({"params": params, "batch_stats": {}}, batch.image, train=True)
    return _loss(model, stats, batch, train=False)


def step_surface(
    model: CNN, params: Any, batch: Batch, rate: float | Float[Array, ""]
) -> StepSurface:
    """The loss of a batch along the step that plain SGD takes on it."""
    loss_fn = batch_loss(model, batch)
    direction = jax.tree.map(lambda gradient: -rate * gradient, jax.grad(loss_fn)(params))
    return loss_along_step(loss_fn, params, direction)


def top_eigenvalues(loss_fn: LossFn, params: Any, *, num_iterations: int) -> HessianEigenvalues:
    """One eigenvalue at each end of the spectrum."""
    key = jax.random.key(0)
    return hessian_top_eigenvalues(loss_fn, params, num_iterations=num_iterations, key=key)


def observe(model: CNN, config: Config, state: TrainState, hyper: Hyper, data: Data) -> Observed:
    """What is due at the state that a dispatch begins with."""
    params = state.params
    top = functools.partial(top_eigenvalues, num_iterations=config.num_iterations)

    def surface() -> StepSurface:
        batch = batch_at(state, data.train, config.batch_size)
        return step_surface(model, params, batch, hyper.rate)

    def through() -> HessianEigenvalues:
        return top(batch_loss(model, data.fixed), params)

    def frozen() -> HessianEigenvalues:
        return top(frozen_loss(model, params, data.fixed), params)

    is_sgd = ~hyper.is_descent & hyper.is_watched
    is_due = is_sgd & jnp.any(jnp.array(config.curvature_steps) == state.step)
    return Observed(
        _if(is_sgd, surface),
        _if(is_due | (hyper.is_descent & hyper.is_watched), through),
        _missing(through) if model.placement == "none" else _if(is_due, frozen),
    )


def sweep_program(model: CNN, config: Config) -> Sweep:
    """Members are SGD or gradient descent, watched or not; observes `Observed`."""
    num_steps = config.steps_per_dispatch

    def advance(state: TrainState, hyper: Hyper, data: Data) -> tuple[TrainState, StepMetrics]:
        observed = observe(model, config, state, hyper, data)
        step = make_train_step(_apply_fn(model), create_optimizer("sgd", hyper.rate))

        def descend() -> tuple[TrainState, StepMetrics]:
            return jax.lax.scan(lambda s, _: step(s, data.fixed), state, length=num_steps)

        def stochastic() -> tuple[TrainState, StepMetrics]:
            batch_size = config.batch_size
            return run_steps(step, state, data.train, batch_size=batch_size, num_steps=num_steps)

        state, metrics = jax.lax.cond(hyper.is_descent, descend, stochastic)
        return state, metrics._replace(observed=observed)

    # Fixed, so that it need not be measured: its numbers are those of single runs everywhere.
    return Sweep(
        advance,
        steps_per_dispatch=num_steps,
        strategy="devices",
        compiler_options=compiler_options(1),
    )


def create_program(model: CNN, shape: tuple[int, ...]) -> Any:
    """(key, hyper) → state before the first step, for images of a shape; biases are 0."""

    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key: Array, hyper: Hyper) -> TrainState:
        return create_train_state(
            lambda key: model.init(key, jnp.zeros((1, *shape)), train=False),
            create_optimizer("sgd", hyper.rate),
            key,
        )

    return create


class _Trainer:
    """Trains the network of an arm, each run once in the life of a workdir."""

    def __init__(self, runner: Runner, config: Config, images: Images, arm: str):
        model = create_model(config.network, arm)
        self._runner, self._config, self._arm = runner, config, arm
        self._create = create_program(model, images.train.image.shape[1:])
        self._sweep = sweep_program(model, config)
        fixed = jax.tree.map(lambda leaf: leaf[: config.fixed_examples], images.train)
        self._data = Data(images.train, fixed)

    def __call__(self, purpose: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Records of runs; the purpose tells them from others with the same settings."""
        named = {self._name(purpose, run): run for run in runs}
        members = [
            Member(name, run.seed, _hyper(run), run.num_steps) for name, run in named.items()
        ]

        def record(member: Member, state: TrainState, history: History) -> dict[str, Any]:
            run = named[member.name]
            kept = {"loss": history.loss, "diverged": history.diverged}
            if run.is_watched:
                kept |= self._observed(run, history.observed)
            return {"network": self._config.network, **run._asdict(), "arm": self._arm, **kept}

        self._runner.describe(f"{purpose}, {self._arm}")
        return self._runner.train(self._create, self._sweep, members, self._data, record=record)

    def _name(self, purpose: str, run: Run) -> str:
        watched = "" if run.is_watched else " unwatched"
        return (
            f"{purpose} {self._arm} rate={run.rate:.9g} steps={run.num_steps} seed={run.seed}"
            + watched
        )

    def _observed(self, run: Run, observed: Observed) -> dict[str, Any]:
        """What the ledger keeps: the surface of each dispatch, λmax where it was measured."""
        steps = np.arange(len(observed.surface.smoothness)) * self._config.steps_per_dispatch
        if run.is_descent:
            return {"curvature_steps": steps, "through": _ends(observed.through)}
        due = np.isin(steps, self._config.curvature_steps)
        at = functools.partial(jax.tree.map, lambda leaf: leaf[due])
        kept = {
            "surface_steps": steps,
            "surface": observed.surface._asdict(),
            "curvature_steps": steps[due],
            "through": _ends(at(observed.through)),
        }
        return kept if self._arm == "plain" else kept | {"frozen": _ends(at(observed.frozen))}


def _ends(found: HessianEigenvalues) -> dict[str, np.ndarray]:
    """Largest and smallest eigenvalue with their residuals, one of each for each time."""
    return {name: np.asarray(leaf)[..., 0] for name, leaf in found._asdict().items()}


def _hyper(run: Run) -> Hyper:
    return Hyper(jnp.float32(run.rate), jnp.bool_(run.is_descent), jnp.bool_(run.is_watched))


def _if(condition: Array, measure: Any) -> Any:
    """What is measured, or NaN in its place at no cost."""
    return jax.lax.cond(condition, measure, lambda: _missing(measure))


def _missing(measure: Any) -> Any:
    shapes = jax.eval_shape(measure)
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), shapes)


def _loss(model: CNN, stats: Any, batch: Batch, *, train: bool) -> LossFn:
    def loss_fn(params: Any) -> Float[Array, ""]:
        variables = {"params": params, "batch_stats": stats}
        logits, _ = _apply_fn(model)(variables, batch.image, train=train)
        return cross_entropy_metrics(logits, batch.label).loss / len(batch.label)

    return loss_fn


def _apply_fn(model: CNN) -> Any:
    def apply_fn(variables: Any, image: Array, *, train: bool) -> tuple[Array, Any]:
        logits, new = model.apply(variables, image, train=train, mutable=["batch_stats"])
        return logits, new.get("batch_stats", {})

    return apply_fn
