"""What a train step of BN-Inception needs of a device's memory, as a table.

    python -m benchmarks.step_memory [--write]

Compiles the paper's job (224 × 224, 1000 classes, momentum SGD) without running it and asks the
compiler what it will allocate. On a CPU the figures are those of the CPU's compiler, which takes
some minutes for each; on an accelerator, of its own.
"""

import argparse
import os
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
from experiments.imagenet.programs import create_model, make_apply_fn

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "step_memory.md"
_SHAPE = (224, 224, 3)


def compiled_step(batch: int, microbatches: int) -> Any:
    """The job's step on one device with so many images, in so many pieces."""
    parallel = create_parallel("jit", jax.devices()[:1])
    model = create_model(Config(), 1000, axis_name=None)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = jax.eval_shape(
        lambda: create_train_state(
            lambda key: model.init(key, jnp.zeros((1, *_SHAPE)), train=False),
            optimizer,
            jax.random.key(0),
        )
    )
    pieces = (batch,) if microbatches == 1 else (microbatches, batch // microbatches)
    examples: Any = Batch(
        jax.ShapeDtypeStruct((*pieces, *_SHAPE), jnp.uint8),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct(pieces, jnp.int32),  # type: ignore[arg-type]
    )
    step = make_train_step(
        make_apply_fn(model, 255),
        optimizer,
        accumulated_statistics=None if microbatches == 1 else "microbatch",
    )
    return parallel.map(step, batch_axis=len(pieces) - 1).lower(state, examples).compile()


def row(batch: int, microbatches: int) -> str:
    """A line of the table."""
    memory = compiled_step(batch, microbatches).memory_analysis()
    # The new state takes the memory of the old, which is donated.
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    return f"| {batch} | {microbatches} | {held / 2**30:.2f} | {temporary / 2**30:.1f} |"


def main() -> None:
    """Prints the table; --write keeps it for docs/scaling.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    arguments = parser.parse_args()
    lines = [
        "| images on a device | microbatches | state and batch, GiB | temporaries, GiB |",
        "|---|---|---|---|",
    ]
    for batch, microbatches in ((32, 1), (256, 1), (256, 8)):
        lines.append(row(batch, microbatches))
        print(lines[-1], flush=True)
    flags = os.environ.get("XLA_FLAGS", "")
    lines += [
        "",
        "float32, as compiled with `python -m benchmarks.step_memory`: "
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}"
        + (f", XLA_FLAGS `{flags}`." if flags else "."),
    ]
    text = "\n".join(lines)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())
    print(text)


if __name__ == "__main__":
    main()
