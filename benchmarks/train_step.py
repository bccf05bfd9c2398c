"""A whole training step on this machine, beside plain Flax and PyTorch.

    python -m benchmarks.train_step [--network=cnn|mlp] [--seconds=60] [--json] [--write]

Momentum SGD on random images, BN on every layer but the head, float32: `cnn` is c32 c32 P c64 c64
P c128 c128 P f10 with ReLU, batches of 128 images of 32×32×3; `mlp` is 784 - 3×100 - 10 with
sigmoids, batches of 60, the network of section 4.1 of the paper.

Programs take turns, each in a process of its own, in a new order every round. × is the time of a
step of ours over that of the other in the same round: below 1 ours is faster. Median, with
quartiles in brackets; wide ones mean that the machine was busy. "As the experiments run it" has the
process settings of `bn_research.training.cpu_process` and many steps in one dispatch; "JAX as it
comes" is one step a dispatch and no settings. Memory is that of the whole process, and what it grew
by from when its library was imported: compilation is in it.
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.turns import Measured, milliseconds, ratio, serve, take_turns
from bn_research.claims import atomic
from bn_research.models.spec import Conv, Pool, parse_spec

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "train_step.md"
BATCHES = 4  # in the set
PEAK = 2048  # side of the matrices whose product is called the peak


class Network(NamedTuple):
    """What is trained."""

    spec: str
    image: tuple[int, int, int]
    batch: int
    activation: str
    steps: int  # a turn

    @property
    def gflop(self) -> float:
        """Of a step's products, 2 for each multiplication and addition."""
        (height, width, channels), forward, first = self.image, 0, 0
        for layer in parse_spec(self.spec):
            if isinstance(layer, Pool):
                height, width = height // 2, width // 2
                continue
            if isinstance(layer, Conv):
                product = height * width * layer.kernel**2 * channels * layer.features
            else:
                product = height * width * channels * layer.features
                height = width = 1
            channels = layer.features
            forward, first = forward + product, first or product
        # The gradients in weights and inputs cost as much each; the images take none.
        return 2 * self.batch * (3 * forward - first) / 1e9


NETWORKS = {
    "cnn": Network("c32 c32 P c64 c64 P c128 c128 P f10", (32, 32, 3), 128, "relu", steps=4),
    "mlp": Network("f100 f100 f100 f10", (28, 28, 1), 60, "sigmoid", steps=400),
}
OURS = "bn_research, as the experiments run it"
PROGRAMS = (
    OURS,
    "bn_research, JAX as it comes",
    "Flax",
    "Flax, scanned",
    "PyTorch",
    "PyTorch, channels last",
    "matrix product",
)


def chosen(network: str) -> dict[str, str]:
    """Programs that make sense for it -> "" or why one is left out."""
    left_out = dict.fromkeys(PROGRAMS, "")
    if network == "cnn":
        left_out["Flax, scanned"] = "minutes a step: XLA's derived gradients in a loop"
    else:
        del left_out["PyTorch, channels last"]
    if not importlib.util.find_spec("torch"):
        for name in left_out:
            if name.startswith("PyTorch"):
                left_out[name] = "PyTorch is not installed"
    return left_out


def data(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels."""
    rng = np.random.default_rng(0)
    count = BATCHES * network.batch
    images = rng.standard_normal((count, *network.image)).astype(np.float32)
    return images, rng.integers(10, size=count).astype(np.int32)


def flax_network(network: Network) -> Any:
    """With the names of ours."""
    import flax.linen as nn
    import jax

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            layers, number = parse_spec(network.spec), 0
            for layer in layers:
                if isinstance(layer, Pool):
                    x = nn.max_pool(x, (2, 2), (2, 2))
                    continue
                number += 1
                if isinstance(layer, Conv):
                    x = nn.Conv(layer.features, (3, 3), name=f"conv{number}")(x)
                else:
                    x = x.reshape(len(x), -1)
                    x = nn.Dense(layer.features, name=f"dense{number}")(x)
                if layer is not layers[-1]:
                    norm = nn.BatchNorm(use_running_average=not train, name=f"batch_norm{number}")
                    x = getattr(jax.nn, network.activation)(norm(x))
            return x

    return Plain()


def our_network(network: Network) -> Any:
    """BN on the hidden layers."""
    import jax

    from bn_research.layers.linen import BatchNorm
    from bn_research.models.cnn import CNN

    activation = getattr(jax.nn, network.activation)
    return CNN(network.spec, BatchNorm, "hidden", activation=activation)


def jax_program(network: Network, model: Any, scanned: bool) -> Callable[[], int]:
    """Steps on a set that lives on the device, in one dispatch or each in its own."""
    import jax
    import optax

    from bn_research.training.loop import run_steps
    from bn_research.training.state import create_train_state
    from bn_research.training.step import Batch, make_train_step

    def apply_fn(variables, image, *, train):
        logits, new = model.apply(variables, image, train=train, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    examples = Batch(*map(jax.numpy.asarray, data(network)))
    optimizer = optax.sgd(0.01, momentum=0.9)
    state = create_train_state(
        lambda key: model.init(key, examples.image[:1], train=False), optimizer, jax.random.key(0)
    )
    step = make_train_step(apply_fn, optimizer)
    size = network.batch
    if scanned:

        def some(state, examples):
            return run_steps(step, state, examples, batch_size=size, num_steps=network.steps)
    else:

        def some(state, batch):
            return step(state, batch)

    program = jax.jit(some, donate_argnums=0)
    parts = [
        jax.tree.map(lambda v, i=i: v[i : i + size], examples)
        for i in range(0, size * BATCHES, size)
    ]

    def run() -> int:
        nonlocal state
        if scanned:
            state, metrics = program(state, examples)
        else:
            for number in range(network.steps):
                state, metrics = program(state, parts[number % BATCHES])
        jax.block_until_ready((state, metrics))
        return network.steps

    return run


def matrix_product() -> Callable[[], int]:
    """Of two square matrices."""
    import jax

    a = jax.random.normal(jax.random.key(0), (PEAK, PEAK))
    product = jax.jit(lambda a: a @ a)

    def run() -> int:
        product(a).block_until_ready()
        return 1

    return run


def torch_program(network: Network, channels_last: bool) -> Callable[[], int]:
    """Eager, as PyTorch comes."""
    import torch

    from benchmarks.torch_networks import network as torch_network
    from benchmarks.torch_networks import train_step

    images, labels = data(network)
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    activation = torch.nn.ReLU if network.activation == "relu" else torch.nn.Sigmoid
    model = torch_network(network.spec, network.image, activation)
    if channels_last:
        x, model = (v.to(memory_format=torch.channels_last) for v in (x, model))
    label = torch.tensor(labels).long()
    return train_step(model, x, label, network.batch, network.steps)


def serve_program(name: str, network: Network) -> None:
    """One of PROGRAMS."""
    if name == OURS:
        from bn_research.training.cpu_process import keep_memory, use_eigen_convolutions

        keep_memory()
        use_eigen_convolutions()
    if name == "matrix product":
        import jax  # noqa: F401

        serve(matrix_product)
    elif name.startswith("PyTorch"):
        import torch  # noqa: F401

        serve(functools.partial(torch_program, network, name.endswith("channels last")))
    else:
        import optax  # noqa: F401

        make = our_network if name.startswith("bn_research") else flax_network
        scanned = name in (OURS, "Flax, scanned")
        serve(lambda: jax_program(network, make(network), scanned))


def markdown(network: str, measured: dict[str, Measured], left_out: dict[str, str]) -> str:
    """Programs as rows; ratios first."""
    gflop = NETWORKS[network].gflop
    peak = 2 * PEAK**3 / 1e9 / np.median(measured["matrix product"].seconds)
    ours = measured[OURS]
    lines = [
        f"| {network} | ours over it, × | a step | of the matrix product's speed | memory, MiB |"
        " grown by |",
        "|---|---|---|---|---|---|",
    ]
    for name in left_out:
        if name == "matrix product":
            lines.append(f"| {name} | | | {peak:.0f} Gflop/s | | |")
        elif name in measured:
            seconds, memory = measured[name]
            own = "1" if name == OURS else ratio(ours.seconds, seconds)
            share = gflop / np.median(seconds) / peak
            lines.append(
                f"| {name} | {own} | {milliseconds(seconds)} | {share:.0%} | {memory.peak:.0f} | "
                f"{memory.peak - memory.before:.0f} |"
            )
        else:
            lines.append(f"| {name} | left out: {left_out[name]} | | | | |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables; --write keeps them for the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=tuple(NETWORKS), help="default: both")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each network")
    parser.add_argument("--json", action="store_true", help="print every time and memory")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    parser.add_argument("--serve", choices=PROGRAMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_program(arguments.serve, NETWORKS[arguments.network])
        return
    load, tables, found = os.getloadavg()[0], [], {}
    for network in [arguments.network] if arguments.network else NETWORKS:
        left_out = chosen(network)
        commands = {
            name: ["benchmarks.train_step", f"--serve={name}", f"--network={network}"]
            for name, why in left_out.items()
            if not why
        }
        found[network] = take_turns(commands, arguments.seconds)
        tables.append(markdown(network, found[network], left_out))
    if arguments.json:
        print(json.dumps({n: {k: v._asdict() for k, v in m.items()} for n, m in found.items()}))
        return
    from benchmarks.accuracy import versions

    rounds = ", ".join(str(len(m[OURS].seconds)) for m in found.values())
    text = "\n\n".join(
        [
            *tables,
            f"Measured with `python -m benchmarks.train_step`: medians of {rounds} rounds, with "
            f"quartiles of the ratio; {versions()}, {os.cpu_count()} cores of "
            f"{_processor()} (load average before: {load:.1f}).",
        ]
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


def _processor() -> str:
    with open("/proc/cpuinfo") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
