"""What following norms and angles of the weights costs a training step (`ScaleLog`).

    python -m benchmarks.scale_log [--write] [--seconds 60]

The same network is trained twice: plainly, and with a `ScaleLog` of every kernel that observes
each step in the compiled program and writes its line of JSON between dispatches. Dispatches of
the two take turns, in a new order every round, so that what the machine does meanwhile hits both;
the ratio is the median over rounds of the time with the log over that without, with quartiles.
Both read the losses of each dispatch, as `train` does.

Every weight is read before and after its step, and before it has to be copied, for XLA otherwise
updates it in place. That is little beside a convolution, which uses a weight at every place of an
image, and not beside a step of 0.5 ms that uses each weight once for each of 60 examples.
"""

import argparse
import functools
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from benchmarks.accuracy import versions
from bn_research.claims import atomic
from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN, DEFAULT_SPEC
from bn_research.models.mlp import MLP
from bn_research.probes.angular_updates import ScaleLog
from bn_research.training.loop import run_steps
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import Batch, make_train_step

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "scale_log.md"
LIMIT = 1.05  # of the ratio, what we promise
DECAY, MOMENTUM = 5e-4, 0.9
EXAMPLES = 600
SCHEDULE = optax.cosine_decay_schedule(0.1, 100_000)


class Setting(NamedTuple):
    """A network, what it is trained on, and how many steps a dispatch takes."""

    name: str
    model: CNN
    side: int
    batch_size: int
    steps: int


SETTINGS = (
    Setting("MLP f100 f100 f100 f10", MLP(norm=BatchNorm, placement="all"), 28, 60, 100),
    Setting(f"CNN {DEFAULT_SPEC}", CNN(norm=BatchNorm, placement="all"), 14, 64, 10),
    Setting(f"CNN {DEFAULT_SPEC}", CNN(norm=BatchNorm, placement="all"), 28, 64, 5),
)


class Times(NamedTuple):
    """Seconds per step, one a round."""

    plain: np.ndarray
    logged: np.ndarray
    writing: np.ndarray  # of `logged`, what the callback takes between dispatches


def measure(setting: Setting, seconds: float, path: Path) -> Times:
    """Times of the steps of both runs, for so many seconds."""
    rng = np.random.default_rng(0)
    shape = (setting.side, setting.side, 1)
    images = rng.standard_normal((EXAMPLES, *shape)).astype(np.float32)
    examples = Batch(*jax.device_put((images, rng.integers(0, 10, EXAMPLES, np.int32))))
    optimizer = optax.chain(
        optax.add_decayed_weights(DECAY), optax.sgd(SCHEDULE, momentum=MOMENTUM)
    )
    init = functools.partial(setting.model.init, x=images[:1], train=False)
    create = functools.partial(create_train_state, init, optimizer, jax.random.key(0))
    kernels = [
        jax.tree_util.keystr(leaf)
        for leaf, _ in jax.tree_util.tree_leaves_with_path(create().params)
        if leaf[-1].key == "kernel"
    ]
    log = ScaleLog(
        kernels, learning_rate=SCHEDULE, weight_decay=DECAY, momentum=MOMENTUM, path=path
    )

    def apply_fn(variables, image, *, train):
        logits, new = setting.model.apply(variables, image, train=train, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    def program(**options) -> Callable[[TrainState, Batch], tuple]:
        steps = functools.partial(
            run_steps,
            make_train_step(apply_fn, optimizer, **options),
            batch_size=setting.batch_size,
            num_steps=setting.steps,
        )
        return jax.jit(steps, donate_argnums=0)

    programs = {"plain": program(), "logged": program(observe=log.observe)}
    states = {name: create() for name in programs}
    taken = 0
    times: dict[str, list[float]] = {"plain": [], "logged": [], "writing": []}

    def dispatch(name: str) -> None:
        nonlocal taken
        start = time.perf_counter()
        states[name], metrics = programs[name](states[name], examples)
        np.asarray(metrics.loss)
        if name == "logged":
            computed = time.perf_counter()
            log(taken, metrics)
            times["writing"].append((time.perf_counter() - computed) / setting.steps)
            taken += setting.steps
        times[name].append((time.perf_counter() - start) / setting.steps)

    for name in programs:  # compiles, then warms up
        dispatch(name)
        dispatch(name)
    for values in times.values():
        values.clear()
    order, end = list(programs), time.monotonic() + seconds
    while time.monotonic() < end:
        random.shuffle(order)
        for name in order:
            dispatch(name)
    return Times(**{name: np.array(values) for name, values in times.items()})


def markdown(measured: list[tuple[Setting, Times]]) -> str:
    """A row for each setting."""
    lines = ["| network | batch | a step | with the log | of that, callback | ratio | at most |"]
    lines += ["|---" * 7 + "|"]
    for setting, times in measured:
        low, middle, high = np.quantile(times.logged / times.plain, (0.25, 0.5, 0.75))
        plain, logged, writing = (np.median(values) * 1e3 for values in times)
        lines.append(
            f"| {setting.name} | {setting.batch_size} × {setting.side}×{setting.side}×1 "
            f"| {plain:.3g} ms | {logged:.3g} ms | {writing:.2g} ms "
            f"| {middle:.3f} [{low:.3f}, {high:.3f}] | {LIMIT} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table; --write keeps it in the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each network")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    measured = []
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "scale_log.jsonl"
            measured.append((setting, measure(setting, arguments.seconds, path)))
    rounds = ", ".join(str(len(times.plain)) for _, times in measured)
    dispatches = ", ".join(str(setting.steps) for setting, _ in measured)
    above = [s.name for s, times in measured if np.median(times.logged / times.plain) > LIMIT]
    kept = f" The limit is not kept by {', '.join(above)}." if above else ""
    text = (
        f"{markdown(measured)}\n\n"
        "Time per step with BN on every layer and a log of every kernel, with "
        f"`python -m benchmarks.scale_log`: medians of {rounds} rounds; the ratio is that of the "
        f"same round, with quartiles. {dispatches} steps a dispatch, rates by a schedule; "
        f"{versions()}, {os.cpu_count()} cores (load average before: {load:.1f}).{kept}"
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
