"""What the trainings of an experiment share: ledger, checkpoints, progress, and a way to stop."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bn_research.lab.workdir import Ledger
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.lanes import CreateFn
from bn_research.training.loop import History, every
from bn_research.training.members import Member
from bn_research.training.preemption import Preemption, Stopped
from bn_research.training.state import TrainState
from bn_research.training.sweep import Choice, Sweep

_SECONDS_BETWEEN_CHECKPOINTS = 10.0
_STRATEGY = "strategy of the sweeps"  # in the ledger

Record = Mapping[str, Any]


class Runner:
    """Trains the members of sweeps, each once in the life of a workdir.

    A context: SIGTERM is noted, saved after the next dispatch and ends the run.

    Args:
      path: the workdir, for its checkpoints.
      ledger: where finished members stand.
      total_steps: of all trainings, for the progress bar.
      strategy: of the sweeps; "auto" measures once, prints the choice and keeps it in the ledger.
    """

    def __init__(self, path: Path, ledger: Ledger, *, total_steps: int, strategy: str = "auto"):
        """Opens the checkpoints; raises CheckpointError when all of them are damaged."""
        self.ledger = ledger
        self._strategy = strategy
        self._saver = Checkpointer(path / "checkpoints")
        self._saver.newest()
        self._preemption = Preemption()
        self._checkpoint_is_due = every(_SECONDS_BETWEEN_CHECKPOINTS)
        self._last: Callable[[], None] = lambda: None
        self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, smoothing=0.05)

    def __enter__(self) -> "Runner":
        """Itself, with SIGTERM noted."""
        self._preemption.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Keeps the last trained state when all went well, and closes the progress bar."""
        try:
            if exception[0] is None:
                self._last()
            self._saver.close()
        finally:
            self._bar.close()
            self._preemption.__exit__(*exception)

    def describe(self, text: str) -> None:
        """Writes beside the progress bar what is being done."""
        self._bar.set_description(text)

    def get(self, name: str, measure: Callable[..., Record], *given: Any) -> dict[str, Any]:
        """The record of what is no training; ``measure(*given)`` if there is none yet.

        Raises:
          Stopped: SIGTERM has come.
        """
        self.describe(name)
        record = self.ledger.get(name, measure, *given)
        if self._preemption.requested(self._bar.n):
            raise Stopped(self._bar.n)
        return record

    def train(
        self,
        create: CreateFn,
        sweep: Sweep,
        members: Sequence[Member],
        data: Any,
        *,
        record: Callable[[Member, TrainState, History], Record],
        stop_when: Callable[[Member, np.ndarray], bool] = lambda member, loss: False,
    ) -> list[dict[str, Any]]:
        """Records of the members, in their order; those in the ledger are not trained again.

        Args:
          create: (key, hyper) -> state before the first step; jit it.
          sweep: their program.
          members: with names that no other member of the run has.
          data: that the sweep's program is given.
          record: (member, last state, history) -> what the ledger shall keep.
          stop_when: as of `Sweep.run`.
        """
        done = [member.name for member in members if member.name in self.ledger]
        self._bar.update(sum(m.num_steps for m in members if m.name in done))
        if len(done) < len(members):
            self._choose(sweep, create, members, data)
            for member, state, history in sweep.run(
                create,
                members,
                data,
                done=done,
                saver=self._saver,
                save_when=self._checkpoint_is_due,
                stop_when=stop_when,
                on_choice=lambda choice: None,
                on_steps=self._bar.update,
                preempted=self._preemption.requested,
            ):
                self.ledger.get(member.name, functools.partial(record, member, state, history))
                self._bar.update(member.num_steps - len(history.loss))
                self._last = functools.partial(self._save_last, member.name, state, history)
        return [self.ledger.get(member.name, dict) for member in members]

    def _choose(self, sweep, create, members, data):
        """Gives a sweep the strategy that the first sweep of this workdir has chosen."""
        if self._strategy == "auto":
            if _STRATEGY not in self.ledger:
                choice = sweep.measure(create, members, data)
                self._bar.write(str(choice))
                self.ledger.get(_STRATEGY, choice._asdict)
            self._strategy = self.ledger.get(_STRATEGY, dict)["strategy"]
        sweep.choice = Choice(self._strategy, {})  # type: ignore[arg-type]

    def _save_last(self, name: str, state: TrainState, history: History) -> None:
        newest = self._saver.newest()
        note = {"name": name, "steps": len(history.loss), "diverged": history.diverged}
        saved = {"state": state, "loss": jnp.asarray(history.loss)}
        self._saver.save((newest[0] if newest else 0) + 1, saved, note)
