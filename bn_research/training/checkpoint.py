"""Checkpoints through orbax: atomic, the newest kept, a broken one named in one line."""

import contextlib
import gc
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message is one line for people."""


class Checkpointer:
    """Saves pytrees with a JSON-able note under increasing numbers, keeping the newest.

    A save becomes visible whole or not at all, so a process killed while saving leaves the
    checkpoint before. PRNG keys are saved as their data.

    Args:
      directory: made if absent; holds one folder for each checkpoint.
      max_to_keep: how many to keep.
    """

    def __init__(self, directory: Path, *, max_to_keep: int = 1):
        """Opens the directory."""
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, enable_async_checkpointing=False
        )
        with _quiet():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, number: int, state: Any, note: dict[str, Any]) -> None:
        """Saves state and note; returns when they are on disk."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(_to_saved, state)),
            note=ocp.args.JsonSave(note),
        )
        with _quiet():
            self._manager.save(number, args=args, force=True)
            self._manager.wait_until_finished()

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Number and note of the newest checkpoint, or None when there is none.

        Raises:
          CheckpointError: it cannot be read.
        """
        number = self._manager.latest_step()
        if number is None:
            return None
        restored = self._restore(number, ocp.args.Composite(note=ocp.args.JsonRestore()))
        return number, restored["note"]

    def restore(self, number: int, template: Any) -> Any:
        """The state saved under number.

        Args:
          number: of a checkpoint.
          template: pytree of arrays or ShapeDtypeStructs with the state's structure, shapes and
            dtypes.

        Raises:
          CheckpointError: it cannot be read, or its shapes are not the template's.
        """
        abstract = jax.tree.map(_to_abstract, template)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        saved = self._restore(number, args)["state"]
        for want, got in zip(jax.tree.leaves(abstract), jax.tree.leaves(saved), strict=True):
            if want.shape != got.shape or want.dtype != got.dtype:
                raise CheckpointError(
                    f"checkpoint {self.directory / str(number)} is of another model: it holds "
                    f"{got.dtype}{list(got.shape)} where {want.dtype}{list(want.shape)} is needed; "
                    "use another --workdir"
                )
        return jax.tree.map(_from_saved, template, saved)

    def verify(self) -> None:
        """Reads the newest checkpoint whole.

        Raises:
          CheckpointError: it cannot be read.
        """
        number = self._manager.latest_step()
        if number is not None:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(), note=ocp.args.JsonRestore())
            self._restore(number, args)

    def _restore(self, number: int, args: Any) -> Any:
        failure = None
        with _quiet():
            try:
                return self._manager.restore(number, args=args)
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                reason = " ".join(str(error).split())[:120]
                failure = f"{type(error).__name__}: {reason}"
            # Reads that were abandoned complain when collected; do that while nobody listens.
            gc.collect()
        raise CheckpointError(
            f"checkpoint {self.directory / str(number)} is damaged or cut ({failure}); remove that "
            "folder to continue without it, or use another --workdir"
        )

    def close(self) -> None:
        """Waits for pending work and frees the manager."""
        self._manager.close()


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_saved(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _to_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )


def _from_saved(template: Any, leaf: Any) -> Any:
    return jax.random.wrap_key_data(leaf) if _is_key(template) else leaf


@contextlib.contextmanager
def _quiet():
    """Orbax logs every save through absl; a progress bar shares that stream."""
    logger = logging.getLogger("absl")
    level, hook = logger.level, sys.unraisablehook
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook
