"""Arms of a comparison: one network, one optimizer, one setting, trained for each seed.

Everything that changes the program (network, BN placement, optimizer, initializer, biases) is
static; rate, ε and the initialization's width are traced, so that a sweep over them compiles once.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bn_research.lab.compiler import compiler_options
from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
from bn_research.layers.linen import MOMENTS, BatchNorm, population_batch_stats
from bn_research.models.cnn import CNN, NormPlacement
from bn_research.models.initializers import kernel_initializer
from bn_research.training.evaluation import make_evaluation, place_batches
from bn_research.training.loop import run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import make_eval_step, make_train_step
from bn_research.training.sweep import Member, Sweep

FIXUP = "fixup"  # He's, with a head of zeros: Zhang et al. (2019) without residual branches
_EVAL_BATCH = 32
_POPULATION_BATCHES = 32


class Arm(NamedTuple):
    """A setting; the fields before `learning_rate` are static, it and the next two traced."""

    network: str
    placement: NormPlacement  # of BN
    optimizer: str = "sgd"
    initializer: str = "uniform"  # of kernels; or FIXUP
    use_bias: bool = False
    activation: str = "relu"  # or "sigmoid", "tanh", …: of jax.nn
    batch_size: int = 32
    learning_rate: float = 0.1
    epsilon: float = 1e-5
    a: float = 1e-3  # half-width of the uniform initializer
    num_steps: int = 100
    stop_below: float = -math.inf  # end once a batch's loss is below this

    @property
    def name(self) -> str:
        """Identifies the arm in the ledger."""
        return " ".join(f"{field}={getattr(self, field)}" for field in self._fields)


_STATIC = Arm._fields.index("learning_rate")


class Hyper(NamedTuple):
    """The traced part of an arm."""

    learning_rate: Array
    epsilon: Array
    a: Array


class Trainer:
    """Trains arms on a data set, each once in the life of a workdir.

    Args:
      images: the data set.
      runner: of the experiment.
      steps_per_dispatch: steps of one call into the compiled program.
      tag: tells the arms from those that another Trainer of the run trains on other images.
    """

    def __init__(self, images: Images, runner: Runner, *, steps_per_dispatch: int, tag: str = ""):
        """Places the test set on the devices."""
        self._images = images
        self._runner = runner
        self._steps_per_dispatch = steps_per_dispatch
        self._prefix = f"{tag}/" if tag else ""
        self._test = place_batches(images.test, batch_size=_EVAL_BATCH)

    def train(self, runs: Sequence[tuple[Arm, int]]) -> list[dict[str, Any]]:
        """Records of arms with their seeds: loss of each step, and accuracy on the whole test set.

        The accuracy is that of inference by population statistics (algorithm 2 of Ioffe &
        Szegedy, 2015) over batches of the training set. Arms that differ in traced fields alone
        are one sweep.
        """
        return self._records("train", runs, self._evaluate)

    def tune(self, runs: Sequence[tuple[Arm, int]]) -> list[dict[str, Any]]:
        """Records of arms trained to choose between settings: losses only, no test set."""
        return self._records("tune", runs, lambda arm, state: {})

    def _records(self, purpose, runs, score):
        arms = {
            f"{self._prefix}{purpose}/{arm.name} seed={seed}": (arm, seed) for arm, seed in runs
        }
        sweeps: dict[tuple, list[str]] = {}
        for name, (arm, _) in arms.items():
            sweeps.setdefault(arm[:_STATIC], []).append(name)
        records = {}
        for names in sweeps.values():
            group = {name: arms[name] for name in names}
            records.update(zip(names, self._sweep(group, score), strict=True))
        return [records[name] for name in arms]

    def _sweep(self, arms, score):
        """Records of the arms of one sweep."""
        first: Arm = next(iter(arms.values()))[0]
        shape = (1, *self._images.train.image.shape[1:])
        self._runner.describe(f"BN {first.placement}, {first.optimizer}, {first.initializer}")

        def record(member, state, history):
            arm, seed = arms[member.name]
            return {
                **arm._asdict(),
                "seed": seed,
                "loss": history.loss,
                "diverged": history.diverged,
                **score(arm, state),
            }

        return self._runner.train(
            _create_program(first[:_STATIC], shape),
            _sweep_program(first[:_STATIC], self._steps_per_dispatch),
            [Member(name, seed, _hyper(arm), arm.num_steps) for name, (arm, seed) in arms.items()],
            self._images.train,
            record=record,
            stop_when=lambda member, loss: bool(np.min(loss) < arms[member.name][0].stop_below),
        )

    def _evaluate(self, arm: Arm, state: TrainState) -> dict[str, float]:
        static = arm[:_STATIC]
        epsilon = _hyper(arm).epsilon
        state = state._replace(opt_state=())  # one program for every optimizer
        if arm.placement != "none":
            moments = _moments_program(static)
            population = population_batch_stats(
                lambda variables, image: moments(variables, image, epsilon),
                {"params": state.params, "batch_stats": state.batch_stats},
                self._population_batches(arm.batch_size),
            )
            state = state._replace(batch_stats=population)
        evaluation = _evaluation_program(static, self._test.mesh)
        scores = evaluation(self._test.batches, state, epsilon)
        return {"accuracy": scores["accuracy"], "test_loss": scores["loss"]}

    def _population_batches(self, batch_size: int) -> list[Array]:
        images = self._images.train.image
        count = min(len(images) // batch_size, _POPULATION_BATCHES)
        return list(jnp.split(images[: count * batch_size], count))


def _hyper(arm: Arm) -> Hyper:
    return Hyper(*(jnp.float32(getattr(arm, field)) for field in Hyper._fields))


def _model(static: tuple, epsilon: Any, **options: Any) -> CNN:
    arm = Arm(*static)
    return CNN(
        arm.network,
        functools.partial(BatchNorm, epsilon=epsilon),
        arm.placement,
        use_bias=arm.use_bias,
        activation=getattr(jax.nn, arm.activation),
        **options,
    )


def _apply_fn(model: CNN):
    def apply_fn(variables, image, *, train):
        if not train:
            return model.apply(variables, image, train=False), variables["batch_stats"]
        logits, new = model.apply(variables, image, train=True, mutable=["batch_stats"])
        return logits, new.get("batch_stats", {})

    return apply_fn


@functools.cache
def _create_program(static, shape):
    arm = Arm(*static)

    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key, hyper):
        fixup = arm.initializer == FIXUP
        model = _model(
            static,
            hyper.epsilon,
            kernel_init=kernel_initializer("he" if fixup else arm.initializer, a=hyper.a),
            head_init=jax.nn.initializers.zeros if fixup else None,
        )
        return create_train_state(
            lambda key: model.init(key, jnp.zeros(shape), train=False),
            create_optimizer(arm.optimizer, hyper.learning_rate),
            key,
        )

    return create


@functools.cache
def _sweep_program(static, num_steps):
    arm = Arm(*static)

    def advance(state, hyper, examples):
        apply_fn = _apply_fn(_model(static, hyper.epsilon))
        step = make_train_step(apply_fn, create_optimizer(arm.optimizer, hyper.learning_rate))
        return run_steps(step, state, examples, batch_size=arm.batch_size, num_steps=num_steps)

    return Sweep(advance, steps_per_dispatch=num_steps, compiler_options=compiler_options(1))


@functools.cache
def _moments_program(static):
    @functools.partial(jax.jit, compiler_options=compiler_options(1))
    def moments(variables, image, epsilon):
        mutable = [MOMENTS, "batch_stats"]
        model = _model(static, epsilon)
        return model.apply(variables, image, train=True, mutable=mutable)[1][MOMENTS]

    return moments


@functools.cache
def _evaluation_program(static, mesh):
    def eval_step(batch, state, epsilon):
        return make_eval_step(_apply_fn(_model(static, epsilon)))(state, batch)

    return make_evaluation(eval_step, mesh, compiler_options=compiler_options(1))
