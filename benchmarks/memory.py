"""What training holds in memory, beside other libraries.

    python -m benchmarks.memory [--network=cnn|mlp|inception] [--rounds=3] [--json] [--write]

Residuals: what a batch-norm layer keeps between its forward and its backward pass, in units of its
input, found by asking for the gradient's closure (JAX, one jitted program) or for the tensors saved
(PyTorch). A layer that keeps its input and a few numbers for each feature has 1.

A process: resident memory of one that trains, after the import of its library, at its highest and
at its end. × is the highest of ours, compiled before, over that of the other in the same round.
Medians, with lowest and highest in brackets. Compilation is in it, unless the program was found in
the compilation cache, as it is in every run of an experiment but the first.
"""

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.networks import NETWORKS
from benchmarks.train_programs import OURS, commands, left_out
from benchmarks.turns import Memory, machine, take_turns
from bn_research.claims import atomic

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "memory.md"
SHAPE = (128, 32, 32, 64)
DTYPES = ("float32", "bfloat16")
CACHED = f"{OURS}, compiled before"


def jax_residuals(step: Any, dtype: str) -> float:
    """Bytes that a peer's gradient closes over, over those of its input."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def closure(x, scale, bias):
        return jax.vjp(lambda *arguments: step(*arguments)[0], x, scale, bias)[1]

    x = jax.ShapeDtypeStruct(SHAPE, jnp.dtype(dtype))
    feature = jax.ShapeDtypeStruct(SHAPE[-1:], jnp.float32)
    kept = jax.tree.leaves(jax.eval_shape(closure, x, feature, feature))
    return sum(v.size * v.dtype.itemsize for v in kept) / (x.size * x.dtype.itemsize)


def torch_residuals(dtype: str) -> float:
    """Of PyTorch's layer."""
    import torch

    x = torch.zeros(SHAPE, dtype=getattr(torch, dtype)).permute(0, 3, 1, 2).requires_grad_()
    layer = torch.nn.BatchNorm2d(SHAPE[-1])
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values()) / (x.numel() * x.element_size())


def residuals() -> dict[str, dict[str, float] | str]:
    """Layer -> dtype -> residuals, or why there are none."""
    from benchmarks.peers import OTHERS, OURS, available

    found: dict[str, dict[str, float] | str] = {}
    installed = available((OURS, *OTHERS))
    for peer in (OURS, *OTHERS):
        if peer in installed:
            found[peer.name] = {d: jax_residuals(peer.make(SHAPE[-1]), d) for d in DTYPES}
        else:
            found[peer.name] = f"{peer.package} is not installed"
    if importlib.util.find_spec("torch"):
        found["PyTorch"] = {dtype: torch_residuals(dtype) for dtype in DTYPES}
    else:
        found["PyTorch"] = "torch is not installed"
    return found


def processes(network: str, rounds: int) -> dict[str, list[Memory]]:
    """Program -> its memory in each round."""
    found: dict[str, list[Memory]] = {CACHED: []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            keep = f"--cache={cache}"
            first = take_turns(commands(network, left_out(network), keep), seconds=0)
            again = take_turns(commands(network, {OURS: ""}, keep), seconds=0)
        found[CACHED].append(again[OURS].memory)
        for name, one in first.items():
            found.setdefault(name, []).append(one.memory)
    return found


def _spread(values: Sequence[float], form: str) -> str:
    low, middle, high = np.quantile(values, (0, 0.5, 1))
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def markdown(
    layers: dict[str, dict[str, float] | str], trained: dict[str, dict[str, list[Memory]]]
) -> str:
    """Both tables; ratios first."""
    lines = [f"| kept for the gradient, {SHAPE} | {' | '.join(DTYPES)} |", "|---" * 3 + "|"]
    for name, kept in layers.items():
        cells = [f"left out: {kept}", ""]
        if not isinstance(kept, str):
            cells = [f"{kept[dtype]:.2f}" for dtype in DTYPES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for network, found in trained.items():
        lines += [
            "",
            f"| {network}: resident memory, MiB | ours over it, × | highest | imported | at end |",
            "|---|---|---|---|---|",
        ]
        ours = np.array([memory.peak for memory in found[CACHED]])
        reasons = left_out(network)
        for name in (CACHED, *reasons):
            if why := reasons.get(name):
                lines.append(f"| {name} | left out: {why} | | | |")
                continue
            before, peak, at_end = np.array(found[name]).T
            own = "1" if name == CACHED else _spread(ours / peak, ".2f")
            lines.append(
                f"| {name} | {own} | {_spread(peak, '.0f')} | {np.median(before):.0f} | "
                f"{np.median(at_end):.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Prints the tables; --write keeps them for the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=tuple(NETWORKS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print every figure")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    arguments = parser.parse_args()
    of = machine()
    networks = [arguments.network] if arguments.network else list(NETWORKS)
    trained = {network: processes(network, arguments.rounds) for network in networks}
    layers = residuals()
    if arguments.json:
        times = {n: {k: [m._asdict() for m in v] for k, v in t.items()} for n, t in trained.items()}
        print(json.dumps({"residuals": layers, "processes": times}))
        return
    from benchmarks.accuracy import versions

    text = (
        f"{markdown(layers, trained)}\n\nMeasured with `python -m benchmarks.memory`: medians of "
        f"{arguments.rounds} rounds, with lowest and highest; {versions()}, {of}."
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
