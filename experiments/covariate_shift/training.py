"""Training for `experiments.covariate_shift`: settings, and sweeps over them that measure."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from bn_research.lab.compiler import compiler_options
from bn_research.lab.images import Images
from bn_research.lab.runner import Runner
from bn_research.models.spec import num_weight_layers
from bn_research.training.evaluation import make_evaluation, place_batches
from bn_research.training.loop import run_steps
from bn_research.training.state import create_train_state
from bn_research.training.step import Batch, make_eval_step, make_train_step
from bn_research.training.sweep import Member, Sweep
from experiments.covariate_shift.measurements import Data, Networks, measure, summary

_EVAL_BATCH = 250


class Setting(NamedTuple):
    """A network and how it is trained; the first two fields are static, the others traced."""

    activation: str  # of jax.nn
    batch_norm: bool  # on every hidden layer, or on none
    learning_rate: float
    momentum: float  # of SGD; 0 is none
    init_std: float  # of every kernel's Gaussian weights; biases begin at 0
    epsilon: float  # of BN

    @property
    def name(self) -> str:
        """Identifies the setting in the ledger."""
        return " ".join(f"{field}={getattr(self, field)}" for field in self._fields)


class Hyper(NamedTuple):
    """The traced part of a setting."""

    learning_rate: Array
    momentum: Array
    init_std: Array
    epsilon: Array


class Trainer:
    """Trains settings, each once in the life of a workdir.

    Args:
      config: of the experiment.
      images: the data set.
      runner: of the experiment.
    """

    def __init__(self, config: Any, images: Images, runner: Runner):
        """Places the test set on the devices."""
        self._config, self._runner = config, runner
        self._shape = (1, *images.train.image.shape[1:])
        test = images.test
        evaluation = Batch(*(leaf[: config.evaluation_images or None] for leaf in test[:2]))
        self._data = Data(images.train, test.image[: config.measuring_images], evaluation)
        self._test = place_batches(test, batch_size=_EVAL_BATCH)

    def tune(self, settings: Sequence[Setting], *, seed: int) -> list[dict[str, Any]]:
        """Records of short runs that choose between settings: the training loss at their end."""

        def record(setting, state, history):
            last = history.loss[-max(1, self._config.tuning_steps // 10) :]
            return {"loss": float(np.mean(last)), "diverged": history.diverged}

        runs = [(setting, seed) for setting in settings]
        return self._records("tune", runs, self._config.tuning_steps, record)

    def train(
        self, settings: Sequence[Setting], *, seeds: int, num_steps: int
    ) -> list[list[dict[str, Any]]]:
        """Records of each setting, one for each seed; see `summary`.

        Their accuracy is that of the whole test set at the end, by the running statistics.
        """

        def record(setting, state, history):
            evaluation = _evaluation_program(self._config.network, setting[:2], self._test.mesh)
            state = state._replace(opt_state=())
            scores = evaluation(self._test.batches, state, _hyper(setting).epsilon)
            found = summary(history, self._config.steps_per_dispatch)
            return {**found, "accuracy": scores["accuracy"]}

        runs = [(setting, seed) for setting in settings for seed in range(seeds)]
        records = iter(self._records("train", runs, num_steps, record))
        return [[next(records) for _ in range(seeds)] for _ in settings]

    def _records(self, purpose, runs, num_steps, record):
        names = [f"{purpose}/{setting.name} seed={seed}" for setting, seed in runs]
        by_name = dict(zip(names, runs, strict=True))  # two arms may have come to one setting
        sweeps: dict[tuple, list[Member]] = {}
        for name, (setting, seed) in by_name.items():
            member = Member(name, seed, _hyper(setting), num_steps)
            sweeps.setdefault(setting[:2], []).append(member)

        def kept(member, state, history):
            setting, seed = by_name[member.name]
            return {**setting._asdict(), "seed": seed, **record(setting, state, history)}

        config, records = self._config, {}
        for (activation, batch_norm), members in sweeps.items():
            self._runner.describe(f"{purpose} {activation}, {'BN' if batch_norm else 'plain'}")
            static = config.network, (activation, batch_norm)
            found = self._runner.train(
                _create_program(*static, self._shape),
                _sweep_program(*static, config.batch_size, config.steps_per_dispatch),
                members,
                self._data,
                record=kept,
            )
            records.update({m.name: r for m, r in zip(members, found, strict=True)})
        return [records[name] for name in names]


def _hyper(setting: Setting) -> Hyper:
    return Hyper(*(jnp.float32(getattr(setting, field)) for field in Hyper._fields))


def _optimizer(hyper: Hyper) -> optax.GradientTransformation:
    # A momentum of 0 is SGD, bit for bit: one program serves both.
    return optax.sgd(hyper.learning_rate, momentum=hyper.momentum)


@functools.cache
def _create_program(network, static, shape):
    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key, hyper):
        init = jax.nn.initializers.normal(hyper.init_std)
        model = Networks(network, static, hyper.epsilon, kernel_init=init).model
        return create_train_state(
            lambda key: model.init(key, jnp.zeros(shape), train=False), _optimizer(hyper), key
        )

    return create


@functools.cache
def _sweep_program(network, static, batch_size, num_steps):
    layers = num_weight_layers(network)

    def advance(state, hyper, data):
        apply_fn = Networks(network, static, hyper.epsilon)
        step = make_train_step(apply_fn, _optimizer(hyper))
        observed = measure(step, apply_fn, state, data, batch_size=batch_size, layers=layers)
        state, metrics = run_steps(
            step, state, data.train, batch_size=batch_size, num_steps=num_steps
        )
        return state, metrics._replace(observed=observed)

    return Sweep(advance, steps_per_dispatch=num_steps, compiler_options=compiler_options(1))


@functools.cache
def _evaluation_program(network, static, mesh):
    def eval_step(batch, state, epsilon):
        return make_eval_step(Networks(network, static, epsilon))(state, batch)

    return make_evaluation(eval_step, mesh, compiler_options=compiler_options(0))


def choose(records: Sequence[dict[str, Any]]) -> Setting:
    """The setting of the lowest training loss; one that diverged comes last."""

    def loss(record):
        return math.inf if record["diverged"] or record["loss"] is None else record["loss"]

    best = min(records, key=loss)
    return Setting(*(best[field] for field in Setting._fields))
