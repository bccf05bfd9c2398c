"""What a train step of BN-Inception needs on each device: memory and collectives, as a table.

    python -m benchmarks.step_memory [--write]

Compiles the paper's job (224 × 224, 1000 classes, momentum SGD) without running it and asks the
compiler what it will allocate. Batches are per device. On a CPU the figures are those of the
CPU's compiler; on an accelerator, of its own.
"""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bn_research.claims import atomic
from bn_research.training.parallel import create_parallel
from bn_research.training.state import create_train_state
from bn_research.training.step import Batch, make_train_step
from experiments.imagenet import Config
from experiments.imagenet_programs import create_model, make_apply_fn

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "step_memory.md"
_DEVICES = 8
_COLLECTIVE = re.compile(r" (?:all-reduce|all-gather|collective-permute)(?:-start)?\(")


def compiled_step(config: Config, devices: int, batch: int) -> Any:
    """The job's step on so many devices with so many images on each."""
    parallel = create_parallel("auto" if devices == 1 else "shard_map", jax.devices()[:devices])
    model = create_model(config, 1000, axis_name=parallel.axis_name)
    optimizer = optax.sgd(0.1, momentum=0.9)
    shape = (224, 224, 3)
    state = jax.eval_shape(
        lambda: create_train_state(
            lambda key: model.init(key, jnp.zeros((1, *shape)), train=False),
            optimizer,
            jax.random.key(0),
        )
    )
    examples: Any = Batch(
        jax.ShapeDtypeStruct((devices * batch, *shape), jnp.uint8),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct((devices * batch,), jnp.int32),  # type: ignore[arg-type]
    )
    step = make_train_step(
        make_apply_fn(model, 255),
        optimizer,
        axis_name=parallel.axis_name,
        accumulated_statistics=config.microbatch_statistics or None,  # type: ignore[arg-type]
    )
    if config.microbatches > 1:
        examples = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (config.microbatches, leaf.shape[0] // config.microbatches, *leaf.shape[1:]),
                leaf.dtype,
            ),
            examples,
        )
    mapped = parallel.map(step, batch_axis=0 if config.microbatches == 1 else 1)
    return mapped.lower(state, examples).compile()


def row(name: str, config: Config, devices: int, batch: int) -> str:
    """A line of the table."""
    compiled = compiled_step(config, devices, batch)
    memory = compiled.memory_analysis()
    # The new state takes the memory of the old, which is donated.
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    collectives = len(_COLLECTIVE.findall(compiled.as_text())) if devices > 1 else 0
    return (
        f"| {name} | {devices} | {batch} | {held / 2**30:.2f} | "
        f"{memory.temp_size_in_bytes / 2**30:.1f} | {collectives} |"
    )


def main() -> None:
    """Prints the table; --write keeps it for docs/scaling.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", _DEVICES)  # counts where there is nothing but a CPU
    paper = Config()
    pieces = dataclasses.replace(paper, microbatches=8, microbatch_statistics="microbatch")
    lines = [
        "| step | devices | images each | state and batch, GiB | temporaries, GiB | collectives |",
        "|---|---|---|---|---|---|",
    ]
    for name, config, devices, batch in (
        ("float32", paper, 1, 32),
        ("float32", paper, 1, 256),
        ("float32, 8 microbatches", pieces, 1, 256),
        ("float32, statistics of all devices", paper, _DEVICES, 32),
        ("float32, groups of 32", dataclasses.replace(paper, group_size=32), _DEVICES, 32),
    ):
        lines.append(row(name, config, devices, batch))
        print(lines[-1], flush=True)
    backend = jax.devices()[0].device_kind
    lines += [
        "",
        f"Compiled with `python -m benchmarks.step_memory`: jax {jax.__version__}, {backend}.",
    ]
    text = "\n".join(lines)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())
    print(text)


if __name__ == "__main__":
    main()
