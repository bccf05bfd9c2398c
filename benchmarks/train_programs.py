"""Programs that train the networks of `benchmarks.networks`, each for a process of its own.

Momentum SGD. "As the experiments run it" is many steps in one dispatch, with the convolutions of
`bn_research.training.cpu_process` and compiled programs kept on disk; "JAX as it comes" is one step
a dispatch and none of that. Flax's networks have our step around them, in either way. "PyTorch,
compiled" is `torch.compile` with its defaults, which compiles in processes of its own, whose memory
is not counted, and finds again what it has compiled before; the others run eagerly.
"""

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.networks import NETWORKS, Network, data, flax_network, our_network
from benchmarks.turns import serve

OURS = "bn_research, as the experiments run it"
PROGRAMS = (
    OURS,
    "bn_research, JAX as it comes",
    "Flax",
    "Flax, scanned",
    "PyTorch",
    "PyTorch, channels last",
    "PyTorch, compiled",
)


def left_out(network: str) -> dict[str, str]:
    """Programs that make sense for it -> "" or why one is left out here."""
    reasons = dict.fromkeys(PROGRAMS, "")
    if network == "cnn":
        reasons["Flax, scanned"] = "minutes a step: XLA's derived gradients in a loop"
    elif network == "mlp":
        del reasons["PyTorch, channels last"]
    if not (shutil.which("g++") or shutil.which("clang++")):
        reasons["PyTorch, compiled"] = "torch.compile needs a C++ compiler"
    if not importlib.util.find_spec("torch"):
        for name in reasons:
            if name.startswith("PyTorch"):
                reasons[name] = "PyTorch is not installed"
    return reasons


def import_library(name: str, cache: str | None) -> None:
    """What a program imports before it builds anything.

    Args:
      name: one of PROGRAMS.
      cache: folder of compiled programs, for a program that keeps them.
    """
    if name.startswith("PyTorch"):
        import torch  # noqa: F401

        return
    if name == OURS:
        from bn_research.training.cpu_process import use_eigen_convolutions

        use_eigen_convolutions()
    import jax
    import optax  # noqa: F401

    import bn_research.training.step  # noqa: F401

    if name == OURS and cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def build(name: str, network: Network) -> Callable[[], int]:
    """A function that takes the steps of a turn and returns how many."""
    if name.startswith("PyTorch"):
        return torch_program(network, name.rpartition(", ")[2])
    make = our_network if name.startswith("bn_research") else flax_network
    return jax_program(network, make(network), scanned=name in (OURS, "Flax, scanned"))


def jax_program(network: Network, model: Any, *, scanned: bool) -> Callable[[], int]:
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

    @jax.jit
    def create(key):
        return create_train_state(
            lambda key: model.init(key, examples.image[:1], train=False), optimizer, key
        )

    state = create(jax.random.key(0))
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
        for i in range(0, size * network.batches, size)
    ]

    def run() -> int:
        nonlocal state
        if scanned:
            state, metrics = program(state, examples)
        else:
            for number in range(network.steps):
                state, metrics = program(state, parts[number % len(parts)])
        jax.block_until_ready((state, metrics))
        return network.steps

    return run


def torch_program(network: Network, variant: str) -> Callable[[], int]:
    """PyTorch: "PyTorch" for as it comes, "channels last" or "compiled"."""
    import torch

    from benchmarks.torch_networks import torch_network, train_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = data(network)
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(device)
    model: Any = torch_network(network).to(device)
    if variant == "channels last":
        x, model = (v.to(memory_format=torch.channels_last) for v in (x, model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if variant == "compiled":
        model = torch.compile(model)
    return train_step(model, optimizer, x, torch.tensor(labels).long().to(device), network)


def with_options(name: str, dtype: str, batch: int | None) -> Network:
    """A network of NETWORKS in another dtype or on other batches."""
    network = NETWORKS[name]
    return network._replace(dtype=dtype, batch=batch or network.batch)


def commands(network: str, reasons: Mapping[str, str], *options: str) -> dict[str, list[str]]:
    """Of processes for `benchmarks.turns`, for the programs that are not left out."""
    return {
        name: ["benchmarks.train_programs", f"--program={name}", f"--network={network}", *options]
        for name, why in reasons.items()
        if not why
    }


def main() -> None:
    """Serves one program."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", choices=PROGRAMS, required=True)
    parser.add_argument("--network", choices=tuple(NETWORKS), required=True)
    parser.add_argument("--cache", help="folder of compiled programs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int)
    arguments = parser.parse_args()
    import_library(arguments.program, arguments.cache)
    network = with_options(arguments.network, arguments.dtype, arguments.batch)
    serve(lambda: {"step": build(arguments.program, network)})


if __name__ == "__main__":
    main()
