"""How long a training step of a batch-norm layer takes, beside others (python -m benchmarks.speed).

Forward and backward: output, new running statistics, and the gradients of input, scale and bias,
float32, in one jitted program. Layers take turns, in a new order every round, so that what the
machine does meanwhile hits all of them; a layer's ratio is the median over rounds of its time over
that of bn_research in the same round, with the quartiles.

XLA on a CPU asks the system for the buffers of every call, and first touching fresh pages takes
longer than the arithmetic. So everything is measured twice, in two processes: as it comes, and
with glibc told to keep what it has been given (--keep-memory does that in one process).
"""

import argparse
import ctypes
import functools
import importlib.util
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accuracy import versions
from benchmarks.peers import OTHERS, OURS, Peer, available
from bn_research.claims import atomic

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "speed.md"
SHAPES = ((128, 32, 32, 64), (1024, 512))
SECONDS = 40.0  # for each shape
Times = dict[str, list[float]]  # layer -> seconds, one a round


def keep_memory() -> None:
    """Tells glibc neither to map large blocks apart nor to give memory back; Linux only."""
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in (
        (mmap_max, 0),
        (trim_threshold, 2**31 - 1),
        (top_pad, 2**28),
        (arena_max, 1),
    ):
        if not mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) was refused: this needs glibc")


def train_step(peer: Peer, features: int) -> Callable[..., object]:
    """Jitted forward and backward pass."""
    step = peer.make(features)

    @jax.jit
    def run(x, scale, bias, g):
        def forward(x, scale, bias):
            y, mean, var = step(x, scale, bias)
            return y, (mean, var)

        y, vjp, statistics = jax.vjp(forward, x, scale, bias, has_aux=True)
        return y, statistics, vjp(g)

    return run


def torch_step(shape: tuple[int, ...]) -> Callable[[], object]:
    """PyTorch's layer, channels last in memory."""
    import torch

    features, values = shape[-1], torch.randn(shape)
    layer = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(features)
    layout = (0, 3, 1, 2) if len(shape) == 4 else (0, 1)
    x = values.permute(layout).requires_grad_()
    g = torch.randn(shape).permute(layout)

    def run():
        x.grad = layer.weight.grad = layer.bias.grad = None
        layer(x).backward(g)

    return run


def serve_torch(shape: tuple[int, ...]) -> None:
    """Times one step of PyTorch for every line of input, until there is none."""
    run = torch_step(shape)
    for _ in sys.stdin:
        print(_seconds(run), flush=True)


class TorchProcess:
    """PyTorch in a process of its own: beside XLA's its threads wait for each other."""

    def __init__(self, shape: tuple[int, ...], keep: bool):
        command = [sys.executable, "-m", "benchmarks.speed", f"--serve-torch={json.dumps(shape)}"]
        self._process = subprocess.Popen(
            command + ["--keep-memory"] * keep,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def seconds(self) -> float:
        """Of one step."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(shape: tuple[int, ...], seconds: float, keep: bool) -> Times:
    """Times of every layer that is installed."""
    draw = np.random.default_rng(0).standard_normal
    x, g = (jnp.asarray(draw(shape), jnp.float32) for _ in range(2))
    scale, bias = jnp.ones(shape[-1]), jnp.zeros(shape[-1])
    timers: dict[str, Callable[[], float]] = {}
    for peer in available((OURS, *OTHERS)):
        run = functools.partial(_wait, train_step(peer, shape[-1]), x, scale, bias, g)
        timers[peer.name] = functools.partial(_seconds, run)
    torch = TorchProcess(shape, keep) if importlib.util.find_spec("torch") else None
    if torch is not None:
        timers["PyTorch"] = torch.seconds
    for timer in timers.values():
        timer()
        timer()
    times: Times = {name: [] for name in timers}
    order, end = list(timers), time.monotonic() + seconds
    while time.monotonic() < end:
        random.shuffle(order)
        for name in order:
            times[name].append(timers[name]())
    if torch is not None:
        torch.close()
    return times


def _wait(program: Callable[..., object], *arguments) -> object:
    return jax.block_until_ready(program(*arguments))


def markdown(measured: dict[str, dict[str, Times]]) -> str:
    """Layers as rows; a column for each shape and way of allocating."""
    columns = [(shape, mode) for mode in measured for shape in measured[mode]]
    lines = [
        "| forward and backward | " + " | ".join(f"{s}, {m}" for s, m in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in next(iter(measured[columns[0][1]].values())):
        cells = [_cell(name, measured[mode][shape]) for shape, mode in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, times: Times) -> str:
    own, ours = np.asarray(times[name]), np.asarray(times[OURS.name])
    median = f"{np.median(own) * 1e3:.3g} ms"
    if name == OURS.name:
        return median
    low, middle, high = np.quantile(own / ours, (0.25, 0.5, 0.75))
    return f"{median}, ×{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Prints the table; --write keeps it for the README."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each shape")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    parser.add_argument("--keep-memory", action="store_true", help="see above")
    parser.add_argument("--json", action="store_true", help="print the times of this process")
    parser.add_argument("--serve-torch", type=json.loads, metavar="SHAPE", help="used internally")
    arguments = parser.parse_args()
    keep = arguments.keep_memory
    if keep:
        keep_memory()
    if arguments.serve_torch:
        serve_torch(tuple(arguments.serve_torch))
        return
    if arguments.json:
        print(json.dumps({str(shape): measure(shape, arguments.seconds, keep) for shape in SHAPES}))
        return
    measured = {}
    for mode, extra in (("as it comes", []), ("memory kept", ["--keep-memory"])):
        command = [sys.executable, "-m", "benchmarks.speed", "--json", *extra]
        command.append(f"--seconds={arguments.seconds}")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured[mode] = json.loads(done.stdout.splitlines()[-1])
    text = (
        f"{markdown(measured)}\n\nMeasured with `python -m benchmarks.speed`: medians; × is the "
        f"time over that of {OURS.name} in the same round, with quartiles; {versions()}."
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
