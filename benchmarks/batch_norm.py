"""How long batch-norm layers take in training, beside a copy of their input.

    python -m benchmarks.batch_norm [--dtype=bfloat16] [--relu] [--seconds=8] [--json] [--write]

Forward: output and new running statistics. Forward and backward: also the gradients of input, scale
and bias. One jitted program a call; PyTorch runs eagerly, channels last. γ, β and statistics are
float32.

Layers take turns, each in a process of its own, in a new order every round. × is the time of ours
over that of the other in the same round: below 1 ours is faster. Median, with quartiles in
brackets; wide ones mean that the machine was busy. "In copies" is the time over that of reading
and writing one array of the input's size. Where the input does not fit the cache the least is 1.5
forward (read it for the statistics, read, write) and 4 forward and backward (then read input and
cotangent for two sums, read both, write). The input of the table of units fits; and while pages are
fresh a copy pays for them as well, so that a layer can take less.

A library asks the system for the buffers of every call, and first touching fresh pages takes longer
than the arithmetic. So everything is measured twice: as it comes, and with glibc told to keep what
it has been given. A program of many steps, as the experiments run, touches no fresh pages either.

Where JAX has a GPU all of this runs on it, with larger inputs and as it comes alone; there
--dtype=bfloat16 --relu is the case that training meets.
"""

import argparse
import ctypes
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.turns import Measured, machine, milliseconds, ratio, serve, take_turns
from bn_research.claims import atomic

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "batch_norm.md"
SHAPES = {"images": (128, 32, 32, 64), "units": (1024, 512)}
GPU_SHAPES = {"images": (256, 56, 56, 64), "units": (16384, 4096)}  # beyond its cache, too
PASSES = ("forward", "forward and backward")
OURS, COPY, TORCH = "bn_research", "a copy", "PyTorch"
MODES = ("as it comes", "memory kept")


def keep_memory() -> None:
    """Tells glibc neither to map large blocks apart nor to give memory back; Linux only."""
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1)):
        if not mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) was refused: this needs glibc")


class Case(NamedTuple):
    """What a layer is given, and what follows it."""

    shape: tuple[int, ...]
    dtype: str
    relu: bool


def shapes() -> dict[str, tuple[int, ...]]:
    """For the device that JAX has here."""
    import jax

    return GPU_SHAPES if jax.default_backend() == "gpu" else SHAPES


def jax_parts(step: Callable[..., Any] | None, case: Case) -> dict[str, Any]:
    """Both passes of a peer's step, or a copy of the input where there is none."""
    import jax
    import jax.numpy as jnp

    draw = np.random.default_rng(0).standard_normal
    x, g = (jnp.asarray(draw(case.shape), case.dtype) for _ in range(2))
    scale, bias = jnp.ones(case.shape[-1]), jnp.zeros(case.shape[-1])

    def forward(x, scale, bias, g):
        y, mean, var = step(x, scale, bias)
        y = y.astype(case.dtype)
        return jax.nn.relu(y) if case.relu else y, (mean, var)

    def both(x, scale, bias, g):
        y, vjp, statistics = jax.vjp(
            lambda x, scale, bias: forward(x, scale, bias, g), x, scale, bias, has_aux=True
        )
        return y, statistics, vjp(g)

    def copy(x, scale, bias, g):
        return x + 1  # a copy alone XLA would not make

    def timed(function):
        program = jax.jit(function)

        def run() -> int:
            jax.block_until_ready(program(x, scale, bias, g))
            return 1

        return run

    functions = (copy, copy) if step is None else (forward, both)
    return {name: timed(function) for name, function in zip(PASSES, functions, strict=True)}


def torch_parts(case: Case) -> dict[str, Any]:
    """PyTorch's layer, channels last in memory."""
    import torch

    images, features = len(case.shape) == 4, case.shape[-1]
    on: Any = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    layer = (torch.nn.BatchNorm2d if images else torch.nn.BatchNorm1d)(features, **on)
    layout = (0, 3, 1, 2) if images else (0, 1)
    x, g = (
        torch.randn(case.shape, dtype=getattr(torch, case.dtype), **on).permute(layout)
        for _ in range(2)
    )
    x.requires_grad_()

    def wait() -> int:
        if on["device"] == "cuda":
            torch.cuda.synchronize()
        return 1

    def apply() -> Any:
        y = layer(x)
        return torch.relu_(y) if case.relu else y

    def forward() -> int:
        apply()  # keeps what its gradient needs, as in training
        return wait()

    def both() -> int:
        x.grad = layer.weight.grad = layer.bias.grad = None
        apply().backward(g)
        return wait()

    return dict(zip(PASSES, (forward, both), strict=True))


def serve_layer(name: str, dtype: str, relu: bool, of: dict[str, tuple[int, ...]]) -> None:
    """Every part of one layer."""

    def make(case: Case) -> dict[str, Any]:
        if name == TORCH:
            return torch_parts(case)
        if name == COPY:
            return jax_parts(None, case)
        from benchmarks import peers

        peer = next(p for p in (peers.OURS, *peers.OTHERS) if p.name == name)
        return jax_parts(peer.make(case.shape[-1]), case)

    serve(
        lambda: {
            f"{kind}, {part}": run
            for kind, shape in of.items()
            for part, run in make(Case(tuple(shape), dtype, relu)).items()
        }
    )


def left_out() -> dict[str, str]:
    """Layers -> "" or why one cannot be measured here."""
    from benchmarks.peers import OTHERS

    packages = {OURS: "flax", **{peer.name: peer.package for peer in OTHERS}, TORCH: "torch"}
    return {COPY: ""} | {
        name: "" if importlib.util.find_spec(package) else f"{package} is not installed"
        for name, package in packages.items()
    }


def markdown(
    measured: dict[str, dict[str, Measured]],
    missing: dict[str, str],
    of: dict[str, tuple[int, ...]],
    size: int = 4,
) -> str:
    """A table for each shape and way of allocating; ratios first.

    Args:
      measured: way of allocating -> layer -> times.
      missing: layer -> why it is left out, or "".
      of: kind -> shape of the input.
      size: bytes of one of its elements.
    """
    tables = []
    for kind, shape in of.items():
        for mode, found in measured.items():
            head = [
                cell
                for part in PASSES
                for cell in (f"{part}: ours over it, ×", "time", "in copies")
            ]
            lines = [f"| {shape}, {mode} | {' | '.join(head)} |", "|---" * 7 + "|"]
            for name, why in missing.items():
                if why:
                    lines.append(f"| {name} | left out: {why} | | | | | |")
                    continue
                cells = []
                for part in PASSES:
                    key = f"{kind}, {part}"
                    times = {layer: one.seconds[key] for layer, one in found.items()}
                    own = "1" if name == OURS else ratio(times[OURS], times[name])
                    if name == COPY:
                        rate = 2 * size * np.prod(shape) / np.median(times[name]) / 1e9
                        cells += [own, milliseconds(times[name]), f"{rate:.0f} GB/s"]
                    else:
                        in_copies = ratio(times[name], times[COPY])
                        cells += [own, milliseconds(times[name]), in_copies]
                lines.append(f"| {name} | {' | '.join(cells)} |")
            tables.append("\n".join(lines))
    return "\n\n".join(tables)


def main() -> None:
    """Prints the tables; --write keeps them for the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--relu", action="store_true", help="after the layer")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each column of a table")
    parser.add_argument("--json", action="store_true", help="print every time")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    parser.add_argument("--keep-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--shapes", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        if arguments.keep_memory:
            keep_memory()
        serve_layer(arguments.serve, arguments.dtype, arguments.relu, arguments.shapes)
        return
    missing, where, of = left_out(), machine(), shapes()
    parts = [f"{kind}, {part}" for kind in of for part in PASSES]
    options = [f"--dtype={arguments.dtype}", f"--shapes={json.dumps(of)}"]
    options += ["--relu"] * arguments.relu
    measured = {}
    for mode in MODES if of is SHAPES else MODES[:1]:
        extra = options + ["--keep-memory"] * (mode == "memory kept")
        commands = {
            name: ["benchmarks.batch_norm", f"--serve={name}", *extra]
            for name, why in missing.items()
            if not why
        }
        measured[mode] = take_turns(commands, arguments.seconds, parts)
    if arguments.json:
        times = {m: {n: one._asdict() for n, one in f.items()} for m, f in measured.items()}
        print(json.dumps({"left out": {k: v for k, v in missing.items() if v}, **times}))
        return
    from benchmarks.accuracy import versions

    rounds = [len(one) for f in measured.values() for one in f[OURS].seconds.values()]
    text = (
        f"{markdown(measured, missing, of, 2 if arguments.dtype == 'bfloat16' else 4)}\n\n"
        f"Measured with `python -m benchmarks.batch_norm{' --relu' * arguments.relu}`, "
        f"{arguments.dtype}: medians of {min(rounds)} to {max(rounds)} rounds, with quartiles of "
        f"the ratios; {versions()}, {where}."
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
