"""What a sweep saves: sixteen networks as one program beside sixteen launches.

    python -m benchmarks.sweep [--write] [--steps 1000] [--rounds 3] [--seconds 60]

Start to finish: sixteen processes one after the other, each with its own start, data, compilation
and training of one member, beside one process that trains all sixteen as a sweep. Both ways take
turns, in a new order every round. Members are 4 seeds at 4 rates; every process checks that its
losses are finite and prints a digest of them, so that both ways can be seen to train the same.

Steady state: time per member and step of each strategy, compiled and warm, beside one member alone
in a scanned program, taking turns dispatch by dispatch.

Both are the MLP of Ioffe & Szegedy's section 4.1 (3 hidden layers of 100 sigmoid units with BN,
batch 60) on Fashion-MNIST; the steady state also for a CNN.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bn_research.claims import atomic

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "sweep.md"
MEMBERS = 16
START_TO_FINISH, STEADY = 4.0, 1.0  # what we promise, as ratios
STEPS_PER_DISPATCH = 100


class Setting(NamedTuple):
    """A network, what it is trained on, and how."""

    name: str
    spec: str
    side: int
    batch_size: int
    steps: int  # of a dispatch
    members: int


MLP = Setting("MLP f100 f100 f100 f10", "f100 f100 f100 f10", 28, 60, STEPS_PER_DISPATCH, MEMBERS)
CNN = Setting("CNN c32 c32 P c64 c64 P f512 f512 f10", "c32 c32 P c64 c64 P f512 f512 f10",
              14, 32, 20, 4)  # fmt: skip


def build(setting: Setting):
    """(create, advance, members, examples) of a setting."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bn_research import data
    from bn_research.layers.linen import BatchNorm
    from bn_research.models import cnn
    from bn_research.training.loop import run_steps
    from bn_research.training.optimizers import create_optimizer
    from bn_research.training.state import create_train_state
    from bn_research.training.step import Batch, make_train_step
    from bn_research.training.sweep import Member

    split = data.load_examples(data.prepare("fashion_mnist"), "train")
    images = data.scale_images(
        split.image,
        "standardized",
        reference=split.image,
        full_scale=data.FULL_SCALE["fashion_mnist"],
    )
    if setting.side == 14:
        images = images.reshape(len(images), 14, 2, 14, 2, 1).mean((2, 4))
    examples = Batch(jnp.asarray(images, jnp.float32), jnp.asarray(split.label))
    is_mlp = " P " not in setting.spec
    activation = jax.nn.sigmoid if is_mlp else jax.nn.relu
    model = cnn.CNN(setting.spec, BatchNorm, "all", activation=activation)

    def apply_fn(variables, image, *, train):
        logits, new = model.apply(variables, image, train=train, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    @jax.jit
    def create(key, rate):
        return create_train_state(
            lambda key: model.init(key, examples.image[:1], train=False),
            create_optimizer("sgd", rate),
            key,
        )

    def advance(state, rate, examples):
        step = make_train_step(apply_fn, create_optimizer("sgd", rate))
        return run_steps(
            step, state, examples, batch_size=setting.batch_size, num_steps=setting.steps
        )

    def members(steps: int) -> list:
        rates = np.array([0.03, 0.1, 0.3, 1.0], np.float32)
        return [
            Member(f"seed {i % 4} rate {rates[i // 4]:g}", i % 4, rates[i // 4], steps)
            for i in range(setting.members)
        ]

    return create, advance, members, examples


def train(numbers: Sequence[int], steps: int) -> None:
    """Trains members in this process and prints a digest of the losses of each."""
    import numpy as np

    from bn_research.training.cores import use_cpu_cores
    from bn_research.training.sweep import Sweep

    if len(numbers) > 1:
        use_cpu_cores()
    create, advance, members, examples = build(MLP)
    sweep = Sweep(advance, steps_per_dispatch=MLP.steps)
    chosen = [members(steps)[number] for number in numbers]
    for member, _, history in sweep.run(create, chosen, examples, on_choice=_to_stderr):
        assert np.isfinite(history.loss).all() and len(history.loss) == steps
        digest = hashlib.sha256(history.loss.tobytes()).hexdigest()[:16]
        print(f"member {member.name}: {digest} {history.loss[-1]:.4f}")


def _to_stderr(choice: object) -> None:
    print(choice, file=sys.stderr)


class Launches(NamedTuple):
    """Seconds of both ways, one a round, and what was said of the sweep's choice."""

    apart: list[float]
    together: list[float]
    equal: int  # members whose losses had the same bits both ways, in every round
    choice: str


def start_to_finish(steps: int, rounds: int) -> Launches:
    """Launches sixteen processes in turn, and one for all, so many times."""
    command = [sys.executable, "-m", "benchmarks.sweep", "--steps", str(steps), "--train"]
    apart, together, choice = [], [], ""
    digests: dict[str, set[str]] = {}

    def launch(numbers: Sequence[int]) -> str:
        found = subprocess.run(
            [*command, ",".join(map(str, numbers))], capture_output=True, text=True, check=False
        )
        if found.returncode:
            raise RuntimeError(found.stderr)
        for line in found.stdout.splitlines():
            name, _, digest = line.partition(": ")
            digests.setdefault(name, set()).add(digest)
        return found.stderr

    def alone() -> None:
        start = time.perf_counter()
        for number in range(MEMBERS):
            launch([number])
        apart.append(time.perf_counter() - start)

    def as_sweep() -> None:
        nonlocal choice
        start = time.perf_counter()
        said = launch(range(MEMBERS))
        together.append(time.perf_counter() - start)
        choice = next(line for line in said.splitlines() if line.startswith("sweep: "))

    for _ in range(rounds):
        for way in random.sample([alone, as_sweep], 2):
            way()
    equal = sum(len(found) == 1 for found in digests.values())
    return Launches(apart, together, equal, choice)


def steady_state(setting: Setting, seconds: float) -> dict[str, list[float]]:
    """Seconds per member and step of one member alone and of each strategy, one a round."""
    import jax
    import numpy as np

    from bn_research.training.lanes import STRATEGIES, Lanes, with_key_data

    create, advance, members, examples = build(setting)
    chosen = members(setting.steps)
    states = [
        jax.tree.map(np.asarray, with_key_data(create(jax.random.key(m.seed), m.hyper)))
        for m in chosen
    ]
    program = jax.jit(advance, donate_argnums=0)
    alone = create(jax.random.key(0), chosen[0].hyper)
    placed = jax.device_put(examples)

    def step_alone() -> int:
        nonlocal alone
        alone, metrics = program(alone, chosen[0].hyper, placed)
        np.asarray(metrics.loss)
        return setting.steps

    ways: dict[str, Callable[[], int]] = {"alone": step_alone}
    for strategy in STRATEGIES:
        lanes = Lanes(advance, strategy, len(chosen), jax.devices())
        data = lanes.place(examples)
        used = min(lanes.count, len(chosen))
        lanes.load(states[:used], [m.hyper for m in chosen[:used]])

        def step(lanes=lanes, data=data, used=used) -> int:
            lanes.advance(data)
            return used * setting.steps

        ways[strategy] = step
    times: dict[str, list[float]] = {name: [] for name in ways}

    def timed(name: str) -> None:
        start = time.perf_counter()
        count = ways[name]()
        times[name].append((time.perf_counter() - start) / count)

    for name in ways:  # compiles, then warms up
        timed(name)
        timed(name)
    for values in times.values():
        values.clear()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name in random.sample(list(ways), len(ways)):
            timed(name)
    return times


def markdown(launches: Launches, steady: list[tuple[Setting, dict[str, list[float]]]]) -> str:
    """Both tables."""
    import numpy as np

    ratios = np.array(launches.apart) / launches.together
    lines = [
        "| 16 members, start to finish | 16 launches | one sweep | ratio | at least |",
        "|---|---|---|---|---|",
        f"| {MLP.name}, batch {MLP.batch_size} | {np.median(launches.apart):.0f} s "
        f"| {np.median(launches.together):.1f} s | ×{np.median(ratios):.2f} "
        f"[{ratios.min():.2f}, {ratios.max():.2f}] | ×{START_TO_FINISH:g} |",
        "",
        "| per member and step | members | one alone | in turn | devices | vmap | at least |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting, times in steady:
        alone = np.array(times["alone"])
        cells = []
        for strategy in ("in_turn", "devices", "vmap"):
            found = np.array(times[strategy])
            low, middle, high = np.quantile(alone / found, (0.25, 0.5, 0.75))
            cells.append(f"{np.median(found) * 1e3:.3g} ms, ×{middle:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(
            f"| {setting.name}, batch {setting.batch_size} × {setting.side}×{setting.side} "
            f"| {setting.members} | {np.median(alone) * 1e3:.3g} ms | {' | '.join(cells)} "
            f"| ×{STEADY:g} of the best |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the tables; --write keeps them in the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of each member")
    parser.add_argument("--rounds", type=int, default=3, help="start to finish")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each steady state")
    parser.add_argument("--json", action="store_true", help="print every time")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    parser.add_argument("--train", help=argparse.SUPPRESS)  # numbers of members: of a launch
    arguments = parser.parse_args()
    if arguments.train:
        train([int(number) for number in arguments.train.split(",")], arguments.steps)
        return
    from bn_research.training.cores import use_cpu_cores

    load = os.getloadavg()[0]
    launches = start_to_finish(arguments.steps, arguments.rounds)
    use_cpu_cores()
    steady = [(setting, steady_state(setting, arguments.seconds)) for setting in (MLP, CNN)]
    if arguments.json:
        per_step = {setting.name: times for setting, times in steady}
        print(json.dumps({"start to finish": launches._asdict(), "per step": per_step}))
        return
    from benchmarks.accuracy import versions

    rounds = ", ".join(str(len(times["alone"])) for _, times in steady)
    text = (
        f"{markdown(launches, steady)}\n\n"
        f"Measured with `python -m benchmarks.sweep`. Start to finish: {arguments.steps} steps a "
        f"member on Fashion-MNIST, medians of {arguments.rounds} rounds, lowest and highest ratio; "
        f"the processes' own start, data and compilation included, and the measurements by "
        f"which the sweep chose {launches.choice.removeprefix('sweep: ')}; {launches.equal} of "
        f"{MEMBERS} members had the same losses both ways, to the last bit. Per step: medians of "
        f"{rounds} rounds; × is the time of one member alone in a scanned program over it, in the "
        f"same round, with quartiles. {versions()}, {os.cpu_count()} cores (load average before: "
        f"{load:.1f})."
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
