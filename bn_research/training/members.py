"""The members of a sweep: what they are, how far they have come, and their checkpoints."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bn_research.training.checkpoint import Checkpointer
from bn_research.training.lanes import CreateFn, with_key, with_key_data
from bn_research.training.loop import History
from bn_research.training.state import TrainState


class Member(NamedTuple):
    """One run of a sweep."""

    name: str  # tells it from the others, in checkpoints and messages
    seed: int
    hyper: Any  # pytree of numbers, traced; of one structure in all members
    num_steps: int  # a multiple of steps_per_dispatch


@dataclasses.dataclass
class Run:
    """A member and how far it has come."""

    member: Member
    loss: np.ndarray
    state: Any = None  # on the host; None before its first step and once it is given
    steps: int = 0
    diverged: int = 0
    ended: bool = False
    observed: Any = None  # leaves [dispatches, ...]; None before its first dispatch

    def keep(self, dispatch: int, observed: Any, dispatches: int) -> None:
        """Writes down what a dispatch observed, of so many that there will be."""
        if self.observed is None:
            self.observed = _room(observed, dispatches)
        for room, leaf in zip(*map(jax.tree.leaves, (self.observed, observed)), strict=True):
            room[dispatch] = leaf


def check_members(members: Sequence[Member], steps_per_dispatch: int) -> None:
    """ValueError for no members, two alike, or a number of steps that dispatches do not make up."""
    if not members:
        raise ValueError("a sweep has no members: give at least one")
    first: dict[Any, str] = {}
    for member in members:
        if member.num_steps < 1 or member.num_steps % steps_per_dispatch:
            raise ValueError(
                f"member {member.name!r}: num_steps={member.num_steps} is not allowed: it must be "
                f"a positive multiple of steps_per_dispatch={steps_per_dispatch}"
            )
        values = tuple(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(member.hyper))
        for key in (member.name, (member.seed, values, member.num_steps)):
            if key in first:
                raise ValueError(
                    f"members {first[key]!r} and {member.name!r} are the same run: give each "
                    "name, and each seed with its hyperparameters, once"
                )
            first[key] = member.name


def created(create: CreateFn, member: Member) -> Any:
    """State on the host before the first step."""
    state = create(jax.random.key(member.seed), member.hyper)
    return jax.tree.map(np.asarray, with_key_data(state))


def restored(
    create: CreateFn,
    members: Sequence[Member],
    saver: Checkpointer | None,
    *,
    steps_per_dispatch: int,
    observes: Callable[[Any, Any], Any],
) -> list[Run]:
    """A run of each member, at its step where the newest checkpoint is of these members.

    Args:
      create: (key, hyper) -> state before the first step.
      members: of the sweep.
      saver: of the checkpoints; None for none.
      steps_per_dispatch: of the sweep.
      observes: (state, hyper) -> what a dispatch observes, as shapes.
    """
    runs = {m.name: Run(m, np.full(m.num_steps, np.nan, np.float32)) for m in members}
    newest = saver.newest() if saver is not None else None
    notes = newest[1].get("members", []) if newest is not None else []
    if saver is None or newest is None or not runs.keys() >= {note["name"] for note in notes}:
        return list(runs.values())
    saved = [runs[note["name"]] for note in notes]
    template, observed = [], None  # of one shape in all members, and a whole program to trace
    for run in saved:
        state = created(create, run.member)
        observed = observes(state, run.member.hyper) if observed is None else observed
        run.observed = _room(observed, run.member.num_steps // steps_per_dispatch)
        template.append({"state": state, "loss": run.loss, "observed": run.observed})
    trees = saver.restore(newest[0], template) if template else []
    for run, note, tree in zip(saved, notes, trees, strict=True):
        run.state, run.loss = tree["state"], np.array(tree["loss"])
        run.observed = jax.tree.map(np.array, tree["observed"])
        run.steps, run.diverged = note["steps"], note["diverged"]
    return list(runs.values())


def save(runs: Collection[Run], saver: Checkpointer, *, wait: bool) -> None:
    """A checkpoint of the runs that have begun, each at its step."""
    begun = [run for run in runs if run.steps]
    newest = saver.newest()
    notes = [
        {"name": run.member.name, "steps": run.steps, "diverged": run.diverged} for run in begun
    ]
    tree = [{"state": r.state, "loss": r.loss, "observed": r.observed} for r in begun]
    saver.save((newest[0] if newest else 0) + 1, tree, {"members": notes}, wait=wait)


def result(run: Run, *, steps_per_dispatch: int) -> tuple[Member, TrainState, History]:
    """What the caller of a sweep is given; the run drops its state."""
    state, run.state = run.state, None
    dispatches = run.steps // steps_per_dispatch
    observed = jax.tree.map(lambda leaf: leaf[:dispatches], run.observed)
    return run.member, with_key(state), History(run.loss[: run.steps], run.diverged, observed)


def _room(observed: Any, dispatches: int) -> Any:
    """Arrays for what so many dispatches observe, of one shape whatever has been observed."""
    return jax.tree.map(lambda leaf: np.zeros((dispatches, *leaf.shape), leaf.dtype), observed)
