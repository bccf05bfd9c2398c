"""Many seeds and settings as one program: a sweep.

    sweep = Sweep(advance, steps_per_dispatch=100)
    for member, state, history in sweep.run(create, members, examples):
        ...

What differs between members (seed, learning rate, width of the initialization, epsilon of BN) is
traced, so that all of them are one compiled program. It has lanes, with a member in each:

    in_turn   one lane on one device
    devices   one lane on each device; the devices exchange nothing
    vmap      a lane for every member, batched into one program and shared out over the devices

A lane whose member has ended (finished, diverged or stopped) takes the next one; under "vmap" all
members stay in step. In turn and over devices a member's numbers are those of
`bn_research.training.loop.train` to the last bit. Batched products round in another order, so
under "vmap" they agree to rounding, which training then amplifies as any other perturbation.

A small network cannot use all cores of a CPU: `bn_research.training.cores` makes each a device.
"""

import collections
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bn_research.training.checkpoint import Checkpointer
from bn_research.training.lanes import (
    STRATEGIES,
    AdvanceFn,
    CreateFn,
    Lanes,
    Strategy,
    with_key,
)
from bn_research.training.loop import History
from bn_research.training.members import Member, Run, check_members, created, restored, result, save
from bn_research.training.preemption import Stopped
from bn_research.training.state import TrainState

_CLEARLY = 0.8  # of the time of the best strategy that changes no bit, for one that does
_SECONDS_OF_TIMING = 0.5  # at least, of each strategy


class Choice(NamedTuple):
    """How a sweep runs, and what was measured to choose it."""

    strategy: Strategy
    seconds: dict[Strategy, float]  # per member and step; empty where nothing was measured

    def __str__(self) -> str:
        """One line for people."""
        times = ", ".join(f"{name} {value * 1e3:.3g}" for name, value in self.seconds.items())
        reason = f"ms per member and step: {times}" if times else "as asked"
        return f"sweep: {self.strategy} ({reason})"


class Sweep:
    """The programs of a sweep, compiled once for all its members.

    Args:
      advance: (state, hyper, data) -> state after steps_per_dispatch steps, and their metrics as
        of `run_steps`; pure.
      steps_per_dispatch: steps that advance takes.
      strategy: one of `STRATEGIES`, or "auto": the fastest as measured when the first sweep begins,
        where "vmap" has to be a fifth faster, since its numbers are those of single runs to
        rounding only.
      devices: None is all of this process.
      compiler_options: XLA's, of advance.

    Attributes:
      choice: how its sweeps run; None while nothing has been measured. It may be set.

    Raises:
      ValueError: an unknown strategy, or steps_per_dispatch below 1.
    """

    def __init__(
        self,
        advance: AdvanceFn,
        *,
        steps_per_dispatch: int,
        strategy: str = "auto",
        devices: Sequence[jax.Device] | None = None,
        compiler_options: dict[str, Any] | None = None,
    ):
        """Compiles nothing yet."""
        if strategy not in ("auto", *STRATEGIES):
            raise ValueError(
                f"strategy={strategy!r} is unknown: allowed are auto, {', '.join(STRATEGIES)}"
            )
        if steps_per_dispatch < 1:
            raise ValueError(
                f"steps_per_dispatch={steps_per_dispatch} is not allowed: at least 1 is needed"
            )
        self.choice = None if strategy == "auto" else Choice(strategy, {})  # type: ignore[arg-type]
        self._advance, self._compiler_options = advance, compiler_options
        self._steps_per_dispatch = steps_per_dispatch
        self._devices = list(devices or jax.local_devices())
        self._lanes: dict[tuple[Strategy, int], Lanes] = {}

    def run(
        self,
        create: CreateFn,
        members: Sequence[Member],
        data: Any = None,
        *,
        done: Collection[str] = (),
        saver: Checkpointer | None = None,
        save_when: Callable[[], bool] = lambda: True,
        stop_when: Callable[[Member, np.ndarray], bool] = lambda member, loss: False,
        on_choice: Callable[[Choice], None] = lambda choice: print(choice, flush=True),
        on_steps: Callable[[int], None] = lambda steps: None,
        preempted: Callable[[int], bool] = lambda step: False,
    ) -> Iterator[tuple[Member, TrainState, History]]:
        """Trains the members and gives each with its last state, in order, as soon as it can.

        The rules are those of `train`: a step that is not finite is not taken, and a member ends
        with the dispatch in which that happens again; the others never notice. A sweep goes on from
        a checkpoint of its members, each at its own step, on any number of devices.

        Args:
          create: (key, hyper) -> state before the first step; jit it.
          members: at least one, no two alike.
          data: pytree of arrays that advance is given; each device holds a copy.
          done: names of members whose result is known: they are not trained.
          saver: keeps checkpoints; None keeps none.
          save_when: asked after each dispatch whether to save.
          stop_when: asked after each dispatch, with a member and its losses, whether it shall end.
          on_choice: told how the sweep will run, before its first dispatch.
          on_steps: told the number of steps that a member has taken; first of those restored.
          preempted: asked after each dispatch, with the steps so far, whether to save and leave.

        Raises:
          ValueError: no members, two alike, or a number of steps that is not a positive multiple of
            steps_per_dispatch; before anything is computed.
          Stopped: preempted; the members are saved.
        """
        check_members(members, self._steps_per_dispatch)
        hooks = _Hooks(saver, save_when, stop_when, on_choice, on_steps, preempted)
        return self._run(create, members, data, done, hooks)

    def measure(self, create: CreateFn, members: Sequence[Member], data: Any = None) -> Choice:
        """Times dispatches under every strategy that fits, from the first members' first states.

        The strategies take turns, so that what the machine does meanwhile hits all of them, and the
        shortest time of each counts. Each is compiled for that; those not chosen are dropped.
        """
        fitting = [
            strategy
            for strategy in STRATEGIES
            if strategy == "in_turn" or len(members) > 1
            if strategy != "devices" or len(self._devices) > 1
        ]
        ways = []
        for strategy in fitting:
            lanes = self._lanes_for(strategy, len(members))
            used = members[: lanes.count]
            placed = lanes.place(data)
            lanes.load([created(create, member) for member in used], _hypers(used))
            lanes.advance(placed)  # compiles
            ways.append((strategy, lanes, placed, len(used) * self._steps_per_dispatch))
        times: dict[Strategy, list[float]] = {strategy: [] for strategy in fitting}
        while min(map(sum, times.values())) < _SECONDS_OF_TIMING:
            for strategy, lanes, placed, _ in ways:
                start = time.perf_counter()
                lanes.advance(placed)
                times[strategy].append(time.perf_counter() - start)
        seconds = {strategy: min(times[strategy]) / steps for strategy, _, _, steps in ways}
        exact = min((s for s in seconds if s != "vmap"), key=lambda strategy: seconds[strategy])
        best: Strategy = exact
        if seconds.get("vmap", np.inf) < _CLEARLY * seconds[exact]:
            best = "vmap"
        self._lanes = {key: lanes for key, lanes in self._lanes.items() if key[0] == best}
        return Choice(best, seconds)

    def _run(
        self,
        create: CreateFn,
        members: Sequence[Member],
        data: Any,
        done: Collection[str],
        hooks: "_Hooks",
    ) -> Iterator[tuple[Member, TrainState, History]]:
        steps_per_dispatch = self._steps_per_dispatch
        runs = restored(
            create,
            members,
            hooks.saver,
            steps_per_dispatch=steps_per_dispatch,
            observes=lambda state, hyper: self._observes(state, hyper, data),
        )
        runs = [run for run in runs if run.member.name not in done]
        for run in runs:
            hooks.on_steps(run.steps)
            run.ended = _has_ended(run, hooks)
        queue = collections.deque(run for run in runs if not run.ended)
        waiting = collections.deque(runs)  # until those before them are given
        if queue:
            if self.choice is None:
                self.choice = self.measure(create, members, data)
            hooks.on_choice(self.choice)
            lanes = self._lanes_for(self.choice.strategy, len(members))
            data = lanes.place(data)
            held: list[Run | None] = [None] * lanes.count
        while waiting:
            if waiting[0].ended:
                yield result(waiting.popleft(), steps_per_dispatch=steps_per_dispatch)
                continue
            if _refill(held, queue, in_step=lanes.in_step):
                _load(lanes, held, create)
            metrics = lanes.advance(data)
            running = [(lane, run) for lane, run in enumerate(held) if run is not None]
            for lane, run in running:
                dispatch = run.steps // steps_per_dispatch
                run.steps += steps_per_dispatch
                run.loss[run.steps - steps_per_dispatch : run.steps] = metrics.loss[lane]
                run.diverged += int(np.sum(metrics.diverged[lane]))
                observed = jax.tree.map(lambda leaf, i=lane: leaf[i], metrics.observed)
                run.keep(dispatch, observed, run.member.num_steps // steps_per_dispatch)
                run.ended = _has_ended(run, hooks)
                hooks.on_steps(steps_per_dispatch)
            leave = hooks.preempted(sum(run.steps for run in runs))
            saver = hooks.saver if leave or hooks.save_when() else None
            if saver is not None or any(run.ended for _, run in running):
                states = lanes.states()
                for lane, run in running:
                    run.state = states[lane]
                    if run.ended:
                        held[lane] = None
            if saver is not None:
                save(waiting, saver, wait=leave)
            if leave:
                raise Stopped(sum(run.steps for run in runs))
        if hooks.saver is not None:
            hooks.saver.wait()

    def _observes(self, state: Any, hyper: Any, data: Any) -> Any:
        """Shapes of what a dispatch observes."""
        return jax.eval_shape(self._advance, with_key(state), hyper, data)[1].observed

    def _lanes_for(self, strategy: Strategy, members: int) -> Lanes:
        key = strategy, members if strategy == "vmap" else min(members, len(self._devices))
        if key not in self._lanes:
            self._lanes[key] = Lanes(
                self._advance,
                strategy,
                members,
                self._devices,
                compiler_options=self._compiler_options,
            )
        return self._lanes[key]


class _Hooks(NamedTuple):
    """What the caller of a sweep has asked for."""

    saver: Checkpointer | None
    save_when: Callable[[], bool]
    stop_when: Callable[[Member, np.ndarray], bool]
    on_choice: Callable[[Choice], None]
    on_steps: Callable[[int], None]
    preempted: Callable[[int], bool]


def _hypers(members: Sequence[Member]) -> list[Any]:
    return [jax.tree.map(np.asarray, member.hyper) for member in members]


def _has_ended(run: Run, hooks: _Hooks) -> bool:
    if run.steps == 0:
        return False
    if run.steps == run.member.num_steps or run.diverged >= 2:
        return True
    return hooks.stop_when(run.member, run.loss[: run.steps])


def _refill(held: list[Run | None], queue: collections.deque[Run], *, in_step: bool) -> bool:
    """Puts runs from the queue into lanes that are free; whether there were any."""
    if not queue or (in_step and any(held)):
        return False
    step, changed = queue[0].steps, False
    for lane, run in enumerate(held):
        if run is None and queue and (not in_step or queue[0].steps == step):
            held[lane], changed = queue.popleft(), True
    return changed


def _load(lanes: Lanes, held: list[Run | None], create: CreateFn) -> None:
    used = [run for run in held if run is not None]
    for run in used:
        if run.state is None:
            run.state = created(create, run.member)
    # A lane left over repeats one in use.
    runs = [used[-1] if run is None else run for run in held]
    lanes.load([run.state for run in runs], _hypers([run.member for run in runs]))
