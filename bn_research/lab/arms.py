"""Arms of a comparison: one network, one optimizer, one setting, trained for each seed.

Rate, ε and the initialization's width are traced, so that a sweep over them compiles once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
from bn_research.lab.settings import (
    Programs,
    Setting,
    Training,
    creator,
    per_structure,
    sweep,
    train,
)
from bn_research.layers.linen import MOMENTS, BatchNorm, population_batch_stats
from bn_research.models.cnn import CNN, NormPlacement
from bn_research.models.initializers import kernel_initializer
from bn_research.training.compiler import compiler_options
from bn_research.training.evaluation import make_evaluation, place_batches
from bn_research.training.loop import History, run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, apply_fn_of, make_eval_step, make_train_step

FIXUP = "fixup"  # He's, with a head of zeros: Zhang et al. (2019) without residual branches
_EVAL_BATCH = 32
_POPULATION_BATCHES = 32


class Arm(Setting, traced="learning_rate epsilon a", unseen="num_steps stop_below"):
    """A network and how it is trained."""

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

    def _records(
        self,
        purpose: str,
        runs: Sequence[tuple[Arm, int]],
        score: Callable[[Arm, TrainState], dict[str, float]],
    ) -> list[dict[str, Any]]:
        def record(training: Training, state: TrainState, history: History) -> dict[str, Any]:
            return {
                **training.setting.as_record(),
                "seed": training.seed,
                "loss": history.loss,
                "diverged": history.diverged,
                **score(training.setting, state),
            }

        shape = (1, *self._images.train.image.shape[1:])
        return train(
            self._runner,
            [Training(arm, seed, arm.num_steps) for arm, seed in runs],
            lambda arm: _programs(arm, shape, self._steps_per_dispatch),
            self._images.train,
            record=record,
            name=lambda t: f"{self._prefix}{purpose}/{t.setting.name} seed={t.seed}",
            describe=lambda t: (
                f"BN {t.setting.placement}, {t.setting.optimizer}, {t.setting.initializer}"
            ),
            stop_when=lambda t, loss: bool(np.min(loss) < t.setting.stop_below),
        )

    def _evaluate(self, arm: Arm, state: TrainState) -> dict[str, float]:
        epsilon = arm.traced.epsilon
        state = state._replace(opt_state=())  # one program for every optimizer
        if arm.placement != "none":
            moments = _moments_program(arm)
            population = population_batch_stats(
                lambda variables, image: moments(variables, image, epsilon),
                {"params": state.params, "batch_stats": state.batch_stats},
                self._population_batches(arm.batch_size),
            )
            state = state._replace(batch_stats=population)
        scores = _evaluation_program(arm, self._test.mesh)(self._test.batches, state, epsilon)
        return {"accuracy": scores["accuracy"], "test_loss": scores["loss"]}

    def _population_batches(self, batch_size: int) -> list[Array]:
        images = self._images.train.image
        count = min(len(images) // batch_size, _POPULATION_BATCHES)
        return list(jnp.split(images[: count * batch_size], count))


def _model(arm: Arm, epsilon: Any, **options: Any) -> CNN:
    return CNN(
        arm.network,
        functools.partial(BatchNorm, epsilon=epsilon),
        arm.placement,
        use_bias=arm.use_bias,
        activation=getattr(jax.nn, arm.activation),
        **options,
    )


def _optimizer(arm: Arm) -> optax.GradientTransformation:
    return create_optimizer(arm.optimizer, arm.learning_rate)


@per_structure
def _programs(arm: Arm, shape: tuple[int, ...], num_steps: int) -> Programs:
    batch_size = arm.batch_size

    def init(key: Array, arm: Arm) -> Any:
        fixup = arm.initializer == FIXUP
        model = _model(
            arm,
            arm.epsilon,
            kernel_init=kernel_initializer("he" if fixup else arm.initializer, a=arm.a),
            head_init=jax.nn.initializers.zeros if fixup else None,
        )
        return model.init(key, jnp.zeros(shape), train=False)

    def advance(state: TrainState, arm: Arm, examples: Batch):
        step = make_train_step(apply_fn_of(_model(arm, arm.epsilon)), _optimizer(arm))
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=num_steps)

    return Programs(
        creator(init, _optimizer), sweep(advance, steps_per_dispatch=num_steps, strategy="auto")
    )


@per_structure
def _moments_program(arm: Arm):
    @functools.partial(jax.jit, compiler_options=compiler_options(1))
    def moments(variables, image, epsilon):
        mutable = [MOMENTS, "batch_stats"]
        return _model(arm, epsilon).apply(variables, image, train=True, mutable=mutable)[1][MOMENTS]

    return moments


@per_structure
def _evaluation_program(arm: Arm, mesh: jax.sharding.Mesh):
    def eval_step(batch, state, epsilon):
        return make_eval_step(apply_fn_of(_model(arm, epsilon)))(state, batch)

    return make_evaluation(eval_step, mesh, compiler_options=compiler_options(1))
