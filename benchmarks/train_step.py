"""A whole training step on this machine, beside plain Flax and PyTorch.

    python -m benchmarks.train_step [--network=cnn|mlp|inception] [--seconds=60] [--json] [--write]
    python -m benchmarks.train_step --network=inception --dtype=bfloat16 --batch=1024  # a GPU's

`cnn` is c32 c32 P c64 c64 P c128 c128 P f10 with ReLU, batches of 128 images of 32×32×3; `mlp` is
784 - 3×100 - 10 with sigmoids, batches of 60, the network of section 4.1 of the paper; `inception`
is the small one of `experiments.training_steps`, batches of 32 images of 14×14. What the rows are
says `benchmarks.train_programs`.

Programs take turns, each in a process of its own, in a new order every round. × is the time of a
step of ours over that of the other in the same round: below 1 ours is faster. Median, with
quartiles in brackets; wide ones mean that the machine was busy. The last column is the speed of the
step's products, in units of that of a product of two large float32 matrices. Where JAX and PyTorch
have a GPU all of this runs on it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.networks import NETWORKS, gflop
from benchmarks.train_programs import OURS, commands, left_out, with_options
from benchmarks.turns import Measured, machine, milliseconds, ratio, serve, take_turns
from bn_research.claims import atomic

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "train_step.md"
PEAK = 2048  # side of the matrices whose product is called the peak
PRODUCT = "matrix product"


def matrix_product() -> dict[str, Callable[[], int]]:
    """Of two square matrices."""
    import jax

    a = jax.random.normal(jax.random.key(0), (PEAK, PEAK))
    product = jax.jit(lambda a: a @ a)

    def run() -> int:
        product(a).block_until_ready()
        return 1

    return {"step": run}


def markdown(
    network: str, work: float, measured: dict[str, Measured], reasons: dict[str, str]
) -> str:
    """Programs as rows; ratios first. Work is in Gflop."""
    seconds = {name: one.seconds["step"] for name, one in measured.items()}
    peak = 2 * PEAK**3 / 1e9 / np.median(seconds[PRODUCT])
    lines = [
        f"| {network} | ours over it, × | a step | of the matrix product's speed |",
        "|---|---|---|---|",
    ]
    for name, why in reasons.items():
        if why:
            lines.append(f"| {name} | left out: {why} | | |")
            continue
        own = "1" if name == OURS else ratio(seconds[OURS], seconds[name])
        share = work / np.median(seconds[name]) / peak
        lines.append(f"| {name} | {own} | {milliseconds(seconds[name])} | {share:.0%} |")
    lines.append(f"| {PRODUCT} | | | {peak:.0f} Gflop/s |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables; --write keeps them for the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=tuple(NETWORKS), help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each network")
    parser.add_argument("--json", action="store_true", help="print every time")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, help="other than the network's own")
    parser.add_argument("--serve-product", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_product:
        serve(matrix_product)
        return
    if arguments.dtype != "float32" and arguments.network != "inception":
        parser.error(f"--dtype={arguments.dtype} needs --network=inception: the others are float32")
    of, tables, found, reasons = machine(), [], {}, {}
    options = [f"--dtype={arguments.dtype}"]
    options += [f"--batch={arguments.batch}"] * bool(arguments.batch)
    for network in [arguments.network] if arguments.network else NETWORKS:
        reasons[network] = left_out(network)
        programs = commands(network, reasons[network], *options)
        programs[PRODUCT] = ["benchmarks.train_step", "--serve-product"]
        found[network] = take_turns(programs, arguments.seconds)
        work = gflop(with_options(network, arguments.dtype, arguments.batch))
        tables.append(markdown(network, work, found[network], reasons[network]))
    if arguments.json:
        times = {n: {k: v._asdict() for k, v in m.items()} for n, m in found.items()}
        print(json.dumps({"left out": reasons, **times}))
        return
    from benchmarks.accuracy import versions

    rounds = ", ".join(str(len(m[OURS].seconds["step"])) for m in found.values())
    text = "\n\n".join(
        [
            *tables,
            f"Measured with `python -m benchmarks.train_step`: medians of {rounds} rounds, with "
            f"quartiles of the ratio; {versions()}, {of}.",
        ]
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
