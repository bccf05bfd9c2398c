"""What a checkpoint costs a training run: 10 M parameters and their momentum, saved while it steps.

    python -m benchmarks.checkpoint [--write] [--saves 12] [--directory DIR]

The state is that of a network like BN-Inception: 76 layers, each with a kernel, a scale and a bias,
and a momentum of the same shapes; 456 arrays, 80 MB. A step takes about 50 ms of all cores and
donates its state; steps run back to back, and as many after a save is on disk as during it, with 10
between. "Longest step" is the largest time from the end of one step to the end of the next.
"""

import argparse
import importlib.metadata
import os
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bn_research.claims import atomic
from bn_research.training.checkpoint import Checkpointer

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "checkpoint.md"
LAYERS, CHANNELS, PARAMETERS = 76, 228, 10_000_000
LIMITS = {"save() blocks the loop": 0.3, "until it is on disk": 3.0}  # seconds, what we promise


def create_state() -> dict:
    """Parameters and momentum, random: what compresses flatters."""
    fan_in = PARAMETERS // LAYERS // CHANNELS
    shapes = {"kernel": (1, 1, fan_in, CHANNELS), "scale": (CHANNELS,), "bias": (CHANNELS,)}
    keys = iter(jax.random.split(jax.random.key(0), 2 * 3 * LAYERS))

    def tree():
        return {
            f"layer{i}": {name: jax.random.normal(next(keys), s) for name, s in shapes.items()}
            for i in range(LAYERS)
        }

    return {"params": tree(), "momentum": tree()}


def make_step(seconds: float):
    """A jitted step that donates its state, of about so many seconds: products of matrices."""
    side = 768

    def step(state, count, work):
        work = jax.lax.fori_loop(0, count, lambda _, w: jnp.tanh(w @ w / side), work)
        momentum = jax.tree.map(lambda m, p: 0.9 * m + 1e-4 * p, state["momentum"], state["params"])
        params = jax.tree.map(lambda p, m: p - 1e-4 * m, state["params"], momentum)
        return {"params": params, "momentum": momentum}, work

    step = jax.jit(step, donate_argnums=0)
    work = jnp.ones((side, side)) / side

    def timed(count):
        state = create_state()
        for _ in range(3):  # the first compiles
            start = time.perf_counter()
            state = jax.block_until_ready(step(state, count, work))[0]
        return time.perf_counter() - start

    few, many = timed(1), timed(21)
    count = max(1, round(1 + (seconds - few) / (many - few) * 20))
    return lambda state: jax.block_until_ready(step(state, count, work))[0]


def figures(saves: int, directory: Path) -> dict[str, list[float]]:
    """Seconds, one for each save, by what they are of."""
    step, state = make_step(0.05), create_state()
    saver = Checkpointer(directory)
    state = step(state)
    saver.save(0, state, {}, wait=True)  # what orbax does once
    names = [*LIMITS, "longest step, no save", "longest step, while saving", "a step, no save"]
    names += ["a step, while saving", "newest(), which reads all", "restore()"]
    table: dict[str, list[float]] = {name: [] for name in names}

    def run(state, going_on):
        """Steps until told to stop; time of each."""
        spent, last = [], time.perf_counter()
        while going_on(len(spent)):
            state = step(state)
            now = time.perf_counter()
            spent.append(now - last)
            last = now
        return state, spent

    ended: list[float] = []
    for number in range(1, saves + 1):
        start = time.perf_counter()
        saver.save(number, state, {})
        table["save() blocks the loop"].append(time.perf_counter() - start)
        pending = saver._pending
        assert pending is not None
        pending.add_done_callback(lambda _: ended.append(time.perf_counter()))
        state, spent = run(state, lambda _, pending=pending: not pending.done())
        saver.wait()
        table["until it is on disk"].append(ended[-1] - start)
        table["longest step, while saving"].append(max(spent))
        table["a step, while saving"].append(float(np.mean(spent)))
        state, _ = run(state, lambda done: done < 10)
        count = len(spent)
        state, spent = run(state, lambda done, count=count: done < count)
        table["longest step, no save"].append(max(spent))
        table["a step, no save"].append(float(np.mean(spent)))
    for _ in range(saves):
        start = time.perf_counter()
        newest = saver.newest()
        table["newest(), which reads all"].append(time.perf_counter() - start)
        assert newest is not None
        start = time.perf_counter()
        jax.block_until_ready(saver.restore(newest[0], state))
        table["restore()"].append(time.perf_counter() - start)
    saver.close()
    return table


def markdown(table: dict[str, list[float]]) -> str:
    """Median and quartiles of each, in seconds."""
    lines = ["| seconds | lower quartile | median | upper quartile | largest | at most |"]
    lines += ["|---" * 6 + "|"]
    for name, values in table.items():
        cells = [f"{v:.3f}" for v in (*np.quantile(values, (0.25, 0.5, 0.75)), max(values))]
        limit = f"{LIMITS[name]:g}" if name in LIMITS else ""
        lines.append(f"| {name} | " + " | ".join([*cells, limit]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table; --write keeps it in the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    parser.add_argument("--saves", type=int, default=12, help="how many to time")
    parser.add_argument("--directory", help="where to save; the file system matters")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        table = figures(arguments.saves, Path(directory))
    orbax = importlib.metadata.version("orbax-checkpoint")
    text = (
        f"{markdown(table)}\n\n"
        f"Of {arguments.saves} saves of 10 M parameters with momentum (80 MB, 456 arrays), with "
        "`python -m benchmarks.checkpoint`:\n"
        f"jax {jax.__version__}, orbax-checkpoint {orbax}, {jax.default_backend()}, "
        f"{os.cpu_count()} cores and a local disk, shared by the steps, the saves and what else "
        f"ran there (load average before: {load:.0f})."
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
