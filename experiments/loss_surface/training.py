"""Trainings of `experiments.loss_surface`, and what is measured of their loss on the way.

One program for each network takes both kinds of steps: stochastic gradient descent, and gradient
descent by the whole of a fixed batch. Both are plain, so that a step is −η times the gradient. What
a dispatch observes is of the state that it begins with.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bn_research.lab.compiler import compiler_options
from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN, NormPlacement
from bn_research.models.initializers import kernel_initializer
from bn_research.probes.curvature import HessianEigenvalues, LossFn, hessian_top_eigenvalues
from bn_research.probes.step_direction import StepSurface, loss_along_step
from bn_research.training.loop import History, batch_at, run_steps
from bn_research.training.metrics import cross_entropy_metrics
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, StepMetrics, make_train_step
from bn_research.training.sweep import Member, Sweep


class Network(NamedTuple):
    """What a program is compiled for."""

    spec: str
    placement: NormPlacement  # of BN; "none" is the plain arm


class Program(NamedTuple):
    """The static settings."""

    network: Network
    batch_size: int  # of SGD
    steps_per_dispatch: int
    num_iterations: int  # of Lanczos
    curvature_steps: tuple[int, ...]  # of SGD, at which the Hessian is measured


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

    network: Network
    rate: float
    seed: int
    num_steps: int
    is_descent: bool = False
    is_watched: bool = True

    @property
    def arm(self) -> str:
        """Of the comparison."""
        return "plain" if self.network.placement == "none" else "BN"


def batch_loss(network: Network, batch: Batch) -> LossFn:
    """Params → mean cross-entropy of a batch, normalized by the batch's own statistics."""
    apply_fn = _apply_fn(network)

    def loss_fn(params: Any) -> Float[Array, ""]:
        logits, _ = apply_fn({"params": params, "batch_stats": {}}, batch.image, train=True)
        return cross_entropy_metrics(logits, batch.label).loss / len(batch.label)

    return loss_fn


def frozen_loss(network: Network, params: Any, batch: Batch) -> LossFn:
    """The same with the statistics that the batch has at `params`, whatever it is given.

    At `params` its value is that of `batch_loss`; its derivatives are not.
    """
    _, stats = _apply_fn(network)({"params": params, "batch_stats": {}}, batch.image, train=True)

    def loss_fn(params: Any) -> Float[Array, ""]:
        variables = {"params": params, "batch_stats": stats}
        logits, _ = _apply_fn(network)(variables, batch.image, train=False)
        return cross_entropy_metrics(logits, batch.label).loss / len(batch.label)

    return loss_fn


def step_surface(
    network: Network, params: Any, batch: Batch, rate: float | Float[Array, ""]
) -> StepSurface:
    """The loss of a batch along the step that plain SGD takes on it."""
    loss_fn = batch_loss(network, batch)
    direction = jax.tree.map(lambda gradient: -rate * gradient, jax.grad(loss_fn)(params))
    return loss_along_step(loss_fn, params, direction)


def _observe(program: Program, state: TrainState, hyper: Hyper, data: Data) -> Observed:
    network, params = program.network, state.params

    def surface() -> StepSurface:
        batch = batch_at(state, data.train, program.batch_size)
        return step_surface(network, params, batch, hyper.rate)

    def through() -> HessianEigenvalues:
        return top_eigenvalues(program, batch_loss(network, data.fixed), params)

    def frozen() -> HessianEigenvalues:
        return top_eigenvalues(program, frozen_loss(network, params, data.fixed), params)

    is_sgd = ~hyper.is_descent & hyper.is_watched
    is_due = is_sgd & jnp.any(jnp.array(program.curvature_steps) == state.step)
    return Observed(
        _if(is_sgd, surface),
        _if(is_due | (hyper.is_descent & hyper.is_watched), through),
        _missing(through) if network.placement == "none" else _if(is_due, frozen),
    )


def top_eigenvalues(program: Program, loss_fn: LossFn, params: Any) -> HessianEigenvalues:
    """One eigenvalue at each end of the spectrum."""
    return hessian_top_eigenvalues(
        loss_fn, params, num_iterations=program.num_iterations, key=jax.random.key(0)
    )


def _if(condition: Array, measure: Any) -> Any:
    """What is measured, or NaN in its place at no cost."""
    return jax.lax.cond(condition, measure, lambda: _missing(measure))


def _missing(measure: Any) -> Any:
    shapes = jax.eval_shape(measure)
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), shapes)


@functools.cache
def sweep_program(program: Program) -> Sweep:
    """Members are SGD or gradient descent, watched or not; observes `Observed`."""
    num_steps = program.steps_per_dispatch

    def advance(state: TrainState, hyper: Hyper, data: Data) -> tuple[TrainState, StepMetrics]:
        observed = _observe(program, state, hyper, data)
        optimizer = create_optimizer("sgd", hyper.rate)
        step = make_train_step(_apply_fn(program.network), optimizer)

        def descend() -> tuple[TrainState, StepMetrics]:
            return jax.lax.scan(lambda s, _: step(s, data.fixed), state, length=num_steps)

        def stochastic() -> tuple[TrainState, StepMetrics]:
            batch_size = program.batch_size
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


@functools.cache
def create_program(network: Network, shape: tuple[int, ...]) -> Any:
    """(key, hyper) → state before the first step, He's initialization and biases of 0."""

    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key: Array, hyper: Hyper) -> TrainState:
        return create_train_state(
            lambda key: _model(network).init(key, jnp.zeros(shape), train=False),
            create_optimizer("sgd", hyper.rate),
            key,
        )

    return create


def train(
    runner: Runner, purpose: str, program: Program, runs: Sequence[Run], images: Images, fixed: int
) -> list[dict[str, Any]]:
    """Records of runs of the program's network, each once in the life of a workdir.

    Args:
      runner: of the experiment.
      purpose: tells these runs from others with the same settings.
      program: its network is that of the runs.
      runs: to train.
      images: the data set.
      fixed: examples of the fixed batch, the first of the training set.
    """
    named = {_name(purpose, run): run for run in runs}
    data = Data(images.train, jax.tree.map(lambda leaf: leaf[:fixed], images.train))

    def record(member: Member, state: TrainState, history: History) -> Mapping[str, Any]:
        run = named[member.name]
        kept = {"loss": history.loss, "diverged": history.diverged}
        if run.is_watched:
            kept |= _kept(run, history.observed, program)
        return {**run._asdict(), "network": run.network.spec, "arm": run.arm, **kept}

    runner.describe(f"{purpose}, {runs[0].arm}")
    return runner.train(
        create_program(program.network, (1, *images.train.image.shape[1:])),
        sweep_program(program),
        [
            Member(
                name,
                run.seed,
                _hyper(run),
                run.num_steps,
            )
            for name, run in named.items()
        ],
        data,
        record=record,
    )


def _kept(run: Run, observed: Observed, program: Program) -> dict[str, Any]:
    """What the ledger keeps: the surface of each dispatch, the Hessian where it was measured."""
    steps = np.arange(len(observed.surface.smoothness)) * program.steps_per_dispatch
    if run.is_descent:
        return {"curvature_steps": steps, "through": _ends(observed.through)}
    due = np.isin(steps, program.curvature_steps)
    at = functools.partial(jax.tree.map, lambda leaf: leaf[due])
    kept = {
        "surface_steps": steps,
        "surface": observed.surface._asdict(),
        "curvature_steps": steps[due],
        "through": _ends(at(observed.through)),
    }
    if run.arm == "BN":
        kept["frozen"] = _ends(at(observed.frozen))
    return kept


def _ends(found: HessianEigenvalues) -> dict[str, np.ndarray]:
    """Largest and smallest eigenvalue with their residuals, one of each for each time."""
    return {name: np.asarray(leaf)[..., 0] for name, leaf in found._asdict().items()}


def _hyper(run: Run) -> Hyper:
    return Hyper(jnp.float32(run.rate), jnp.bool_(run.is_descent), jnp.bool_(run.is_watched))


def _name(purpose: str, run: Run) -> str:
    watched = "" if run.is_watched else " unwatched"
    return f"{purpose} {run.arm} rate={run.rate:.9g} steps={run.num_steps} seed={run.seed}{watched}"


def _model(network: Network) -> CNN:
    # Without momentum the running statistics are those of the last batch, which can be frozen.
    norm = functools.partial(BatchNorm, momentum=0.0)
    return CNN(network.spec, norm, network.placement, kernel_init=kernel_initializer("he"))


def _apply_fn(network: Network) -> Any:
    def apply_fn(variables: Any, image: Array, *, train: bool) -> tuple[Array, Any]:
        model = _model(network)
        logits, new = model.apply(variables, image, train=train, mutable=["batch_stats"])
        return logits, new.get("batch_stats", {})

    return apply_fn
