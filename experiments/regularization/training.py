"""Trainings of `experiments.regularization`: one network, its norm, its dropout, for each seed."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_research.lab.runner import Runner
from bn_research.layers.linen import MOMENTS, population_batch_stats
from bn_research.normalization import Moments
from bn_research.training.compiler import compiler_options
from bn_research.training.evaluation import make_evaluation, place_batches
from bn_research.training.loop import epoch_order_of_groups, run_steps
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, make_eval_step, make_train_step
from bn_research.training.sweep import Member, Sweep
from experiments.regularization.arms import (
    Hyper,
    Setting,
    apply_training,
    hyper,
    make_model,
    optimizer,
)
from experiments.regularization.data import Data

_EVAL_BATCH = 32
_POPULATION_BATCHES = 32  # at most
_MOMENTS_KEY = 20_000  # of the dropout and noise under which population statistics are taken


class Run(NamedTuple):
    """One training."""

    arm: str
    setting: Setting
    seed: int


@functools.cache
def _create_program(network: str, norm: bool, num_steps: int, shape: tuple[int, ...]):
    model = make_model(Setting(network, "batch" if norm else "none"))

    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key, hyper):
        return create_train_state(
            lambda key: model.init(key, jnp.zeros((1, *shape)), train=False),
            optimizer(hyper, num_steps),
            key,
        )

    return create


@functools.cache
def _sweep_program(
    static: tuple[Any, ...], num_steps: int, steps_per_dispatch: int, compiler_level: int
) -> Sweep:
    setting = Setting(*static)

    def advance(state: TrainState, hyper: Hyper, examples: Batch):
        model = make_model(setting, dropout=hyper.dropout)

        def apply_fn(variables, image, *, train, keys=None):
            logits, new = apply_training(model, setting, variables, image, keys)
            return logits, new.get("batch_stats", {})

        step = make_train_step(apply_fn, optimizer(hyper, num_steps), stochastic=setting.stochastic)
        return run_steps(
            step,
            state,
            examples,
            batch_size=setting.batch_size,
            num_steps=steps_per_dispatch,
            order_of_epoch=functools.partial(
                epoch_order_of_groups,
                group_size=setting.group_size or setting.batch_size,
                regrouped=hyper.regrouped,
            ),
        )

    return Sweep(
        advance,
        steps_per_dispatch=steps_per_dispatch,
        strategy="devices",
        compiler_options=compiler_options(compiler_level),
    )


@functools.cache
def _moments_program(static: tuple[Any, ...], compiler_level: int):
    setting = Setting(*static)

    @functools.partial(jax.jit, compiler_options=compiler_options(compiler_level))
    def moments(variables, image, keys, dropout):
        model = make_model(setting, dropout=dropout)
        found = apply_training(model, setting, variables, image, keys)[1][MOMENTS]
        groups = 1
        if setting.norm == "batch" and setting.group_size:
            groups = setting.batch_size // setting.group_size
        return jax.tree.map(
            lambda leaf: _of_groups(groups, leaf) if isinstance(leaf, Moments) else leaf,
            found,
            is_leaf=lambda leaf: isinstance(leaf, Moments),
        )

    return moments


def _of_groups(groups: int, moments: Moments) -> Moments:
    """Moments whose m2/(count − 1) is unbiased where m2 is about the means of so many groups.

    Algorithm 2 then gives the mean over groups of m/(m − 1)·σ_g², m being the size of a group.
    """
    count = moments.count
    return moments._replace(m2=moments.m2 * (count - 1) / (count - groups))


@functools.cache
def _evaluation_program(network: str, norm: bool, mesh, compiler_level: int):
    model = make_model(
        Setting(network, "batch" if norm else "none")
    )  # in inference all kinds agree

    def apply_fn(variables, image, *, train):
        return model.apply(variables, image, train=False), variables["batch_stats"]

    def eval_step(batch, state):
        return make_eval_step(apply_fn)(state, batch)

    return make_evaluation(eval_step, mesh, compiler_options=compiler_options(compiler_level))


class Trainer:
    """Trains settings on the training set, each once in the life of a workdir, and evaluates them.

    Args:
      runner: of the experiment.
      data: the three sets.
      num_steps: of each training.
      steps_per_dispatch: steps of one call into the compiled program.
      compiler_level: see `bn_research.training.compiler.compiler_options`; an attribute too.
    """

    def __init__(
        self,
        runner: Runner,
        data: Data,
        *,
        num_steps: int,
        steps_per_dispatch: int,
        compiler_level: int = 1,
    ):
        """Places the sets on the devices."""
        self.data = data
        self.compiler_level = compiler_level
        self._runner = runner
        self._num_steps, self._steps_per_dispatch = num_steps, steps_per_dispatch
        self._sets = {
            name: place_batches(examples, batch_size=_EVAL_BATCH)
            for name, examples in data._asdict().items()
        }

    def train(
        self,
        runs: Sequence[Run],
        *,
        measure: Callable[[Setting, TrainState], Mapping[str, Any]] = lambda setting, state: {},
    ) -> list[dict[str, Any]]:
        """Records of the runs, in their order; those of equal settings and seed are one training.

        Each holds its setting and seed, the training loss (mean over each dispatch, training mode),
        the number of steps that were not finite and so not taken, and mean loss and accuracy on the
        three sets in inference mode, by population statistics.

        Args:
          runs: with their arms, which the records name.
          measure: (setting, state at the end with population statistics) -> more to record.
        """
        sweeps: dict[tuple, dict[str, Run]] = {}
        for run in runs:
            sweeps.setdefault(run.setting.static, {}).setdefault(self._name(run), run)
        records: dict[str, dict[str, Any]] = {}
        for group in sweeps.values():
            first = next(iter(group.values()))
            self._runner.describe(first.arm)
            setting = first.setting
            found = self._runner.train(
                _create_program(
                    setting.network,
                    setting.norm != "none",
                    self._num_steps,
                    self.data.train.image.shape[1:],
                ),
                _sweep_program(
                    setting.static,
                    self._num_steps,
                    self._steps_per_dispatch,
                    self.compiler_level,
                ),
                [
                    Member(name, run.seed, hyper(run.setting), self._num_steps)
                    for name, run in group.items()
                ],
                self.data.train,
                record=functools.partial(self._record, group, measure),
            )
            records.update(zip(group, found, strict=True))
        return [{**records[self._name(run)], "arm": run.arm} for run in runs]

    def _name(self, run: Run) -> str:
        """Identifies a training in the ledger: what it is, not what it is for."""
        fields = " ".join(f"{field}={value}" for field, value in run.setting._asdict().items())
        return f"{fields} num_steps={self._num_steps} seed={run.seed}"

    def _record(self, group, measure, member, state, history) -> dict[str, Any]:
        run = group[member.name]
        state = self.with_population_stats(run.setting, state)
        losses = history.loss.reshape(-1, self._steps_per_dispatch).mean(axis=1)
        return {
            **run.setting._asdict(),
            "seed": run.seed,
            "loss": losses,
            "diverged": history.diverged,
            **self.evaluate(run.setting, state),
            **measure(run.setting, state),
        }

    def evaluate(self, setting: Setting, state: TrainState) -> dict[str, float]:
        """Loss and accuracy on the three sets, in inference mode by the state's batch_stats."""
        found: dict[str, float] = {}
        state = state._replace(opt_state=(), key=jax.random.key(0))
        for name, examples in self._sets.items():
            program = _evaluation_program(
                setting.network, setting.norm != "none", examples.mesh, self.compiler_level
            )
            scores = program(examples.batches, state)
            found |= {f"{name}_loss": scores["loss"], f"{name}_accuracy": scores["accuracy"]}
        return found

    def with_population_stats(
        self, setting: Setting, state: TrainState, *, dropout: float | None = None
    ) -> TrainState:
        """The state with batch_stats by algorithm 2, over training batches in training mode.

        Args:
          setting: of the state.
          state: its params count.
          dropout: rate under which the statistics are taken; None is that of training.
        """
        if setting.norm == "none":
            return state
        size = setting.batch_size
        images = self.data.train.image
        count = min(len(images) // size, _POPULATION_BATCHES)
        rate = np.float32(setting.dropout if dropout is None else dropout)
        moments = _moments_program(setting.static, self.compiler_level)
        keys = jax.random.split(jax.random.key(_MOMENTS_KEY), (count, size))
        population = population_batch_stats(
            lambda variables, batch: moments(variables, *batch, rate),
            {"params": state.params, "batch_stats": state.batch_stats},
            list(zip(jnp.split(images[: count * size], count), keys, strict=True)),
        )
        return state._replace(batch_stats=population)


def trainer_of(part: str, config: Any, data: Data, runner: Runner) -> Trainer:
    """The trainer of a part of the experiment, by the config's fields that begin with its name.

    Args:
      part: "groups" or "dropout".
      config: of the run.
      data: of its training set, the first PART_examples are used.
      runner: of the run.
    """
    examples = getattr(config, f"{part}_examples")
    return Trainer(
        runner,
        data._replace(train=jax.tree.map(lambda leaf: leaf[:examples], data.train)),
        num_steps=getattr(config, f"{part}_steps"),
        steps_per_dispatch=getattr(config, f"{part}_steps_per_dispatch"),
        compiler_level=config.compiler_level,
    )


def choose(records: Sequence[Mapping[str, Any]], key: str = "validation_loss") -> dict[str, Any]:
    """The record of the setting with the lowest mean of key over its seeds; lost runs lose.

    Args:
      records: of one arm in several settings, each with the same seeds.
      key: what is compared.
    """
    settings: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in records:
        settings.setdefault(tuple(record[f] for f in Setting._fields), []).append(record)

    def score(found: Sequence[Mapping[str, Any]]) -> float:
        values = [record[key] for record in found]
        lost = any(record["diverged"] for record in found) or None in values
        return float("inf") if lost else float(np.mean(values))

    return dict(min(settings.values(), key=score)[0])
