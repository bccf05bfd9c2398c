"""Settings of trainings, and the trainer of all experiments that sweep over them.

    class Network(Setting, traced="learning_rate epsilon"):
        batch_norm: bool
        learning_rate: float
        epsilon: float

A setting is a pytree. Its leaves are the traced fields; the static ones are part of its structure,
so that settings of equal structure are one compiled program, and one sweep.

    @per_structure
    def programs(setting, num_steps):
        def advance(state, setting, examples): ...
        return Programs(creator(init, optimizer), sweep(advance, steps_per_dispatch=num_steps))

    records = train(runner, trainings, programs, examples, record=record)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar, dataclass_transform

import jax
import numpy as np
import optax

from bn_research.lab.compiler import compiler_options
from bn_research.lab.runner import Runner
from bn_research.training.lanes import AdvanceFn, CreateFn
from bn_research.training.loop import History
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.sweep import Member, Sweep

Built = TypeVar("Built")


@dataclass_transform(frozen_default=True)
class Setting:
    """What a training is run with: a frozen dataclass and a pytree.

    Class arguments:
      traced: fields that are leaves, by name; the others are static.
      unseen: fields that no program sees, such as a number of steps; they have defaults.
    """

    def __init_subclass__(cls, *, traced: str, unseen: str = "") -> None:
        """Makes it a dataclass, and tells JAX of its fields."""
        made: Any = dataclasses.dataclass(frozen=True)(cls)
        leaves, hidden = traced.split(), unseen.split()
        names = [field.name for field in dataclasses.fields(made)]
        static = [name for name in names if name not in leaves + hidden]
        jax.tree_util.register_dataclass(made, leaves, static, hidden)

    def replace(self, **changes: Any) -> Self:
        """The setting with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def as_record(self) -> dict[str, Any]:
        """All fields with their values, as the ledger holds them."""
        return dict(vars(self))

    @property
    def name(self) -> str:
        """All fields with their values, as one line: ``batch_norm=True epsilon=1e-05``."""
        return " ".join(f"{name}={value}" for name, value in vars(self).items())

    @property
    def traced(self) -> Self:
        """The setting as programs take it: traced fields as float32, or bool."""
        return jax.tree.map(
            lambda leaf: np.bool_(leaf) if isinstance(leaf, bool) else np.float32(leaf), self
        )


def per_structure(build: Callable[..., Built]) -> Callable[..., Built]:
    """Builds once for settings of one structure; what is built sees None in the traced fields.

    Args:
      build: (setting, further arguments) -> programs. The arguments must be hashable.
    """

    @functools.cache
    def cached(structure: Any, *rest: Any) -> Built:
        return build(jax.tree.unflatten(structure, [None] * structure.num_leaves), *rest)

    return lambda setting, *rest: cached(jax.tree.structure(setting), *rest)


class Programs(NamedTuple):
    """What trains settings of one structure."""

    create: CreateFn  # (key, setting) -> state before the first step
    sweep: Sweep  # of (state, setting, data)


def creator(
    init: Callable[[jax.Array, Any], Any],
    optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    compiler_level: int = 0,
) -> CreateFn:
    """(key, setting) -> state before the first step; compiled in a hurry, for it runs once each.

    Args:
      init: (key, setting) -> variables.
      optimizer: setting -> optimizer.
      compiler_level: see `compiler_options`; weights differ in their last bits between levels.
    """

    @functools.partial(jax.jit, compiler_options=compiler_options(compiler_level))
    def create(key: jax.Array, setting: Any) -> TrainState:
        return create_train_state(lambda key: init(key, setting), optimizer(setting), key)

    return create


def sweep(
    advance: AdvanceFn,
    *,
    steps_per_dispatch: int,
    strategy: str = "devices",
    devices: Sequence[jax.Device] | None = None,
    compiler_level: int = 1,
) -> Sweep:
    """The sweep of (state, setting, data) -> state after a dispatch, and its metrics.

    Over devices by default, so that nothing need be measured first: a member's numbers are then
    those of a single run everywhere.
    """
    return Sweep(
        advance,
        steps_per_dispatch=steps_per_dispatch,
        strategy=strategy,
        devices=devices,
        compiler_options=compiler_options(compiler_level),
    )


class Training(NamedTuple):
    """One training."""

    setting: Any  # a Setting
    seed: int
    num_steps: int
    arm: str = ""  # of the comparison it is for, which its name in the ledger does not tell


def train(
    runner: Runner,
    trainings: Sequence[Training],
    programs: Callable[[Any], Programs],
    data: Any,
    *,
    record: Callable[[Training, TrainState, History], Mapping[str, Any]],
    name: Callable[[Training], str] = lambda t: f"{t.setting.name} seed={t.seed}",
    describe: Callable[[Training], str] = lambda t: t.arm or t.setting.name,
    stop_when: Callable[[Training, np.ndarray], bool] = lambda training, loss: False,
) -> list[dict[str, Any]]:
    """Records of trainings, in their order; each is trained once in the life of a workdir.

    Those of one structure are one sweep; those of one name are one training.

    Args:
      runner: of the experiment.
      trainings: whose settings may differ in structure.
      programs: setting -> its programs; see `per_structure`.
      data: that the sweeps are given.
      record: (training, last state, history) -> what the ledger keeps.
      name: of a training in the ledger: what it is, not what it is for.
      describe: a sweep beside the progress bar, by its first training.
      stop_when: asked after each dispatch, with the losses so far, whether a training shall end.
    """
    by_name = {name(training): training for training in reversed(trainings)}
    sweeps: dict[Any, dict[str, Training]] = {}
    for training in trainings:
        group = sweeps.setdefault(jax.tree.structure(training.setting), {})
        group.setdefault(name(training), training)
    records: dict[str, dict[str, Any]] = {}
    for group in sweeps.values():
        first = next(iter(group.values()))
        runner.describe(describe(first))
        create, program = programs(first.setting)
        found = runner.train(
            create,
            program,
            [Member(n, t.seed, t.setting.traced, t.num_steps) for n, t in group.items()],
            data,
            record=lambda member, *end: record(by_name[member.name], *end),
            stop_when=lambda member, loss: stop_when(by_name[member.name], loss),
        )
        records.update(zip(group, found, strict=True))
    return [{**records[name(t)], **({"arm": t.arm} if t.arm else {})} for t in trainings]
