"""Checkpoints through orbax: atomic, the newest kept, a broken one named in one line."""

import contextlib
import gc
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

_MANIFEST = "manifest.json"  # digest of each file, shape and dtype of each leaf


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
        folder = self.directory / str(number)
        leaves = _layout(jax.tree.map(_to_abstract, state))
        manifest = {"files": _digests(folder), "leaves": leaves}
        (folder / _MANIFEST).write_text(json.dumps(manifest))

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
        # Orbax would cast another dtype and cut another shape, so both are compared before.
        wanted = _layout(abstract)
        saved = self._manifest(number).get("leaves", wanted)
        for name in sorted({*saved, *wanted}):
            if saved.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {self.directory / str(number)} is of another model: it holds "
                    f"{saved.get(name, 'nothing')} at {name} where {wanted.get(name, 'nothing')} "
                    "is needed; use another --workdir"
                )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        saved = self._restore(number, args)["state"]
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

    def _manifest(self, number: int) -> dict[str, dict[str, str]]:
        """The manifest, after comparing every file with its digest.

        Orbax notices most damage by itself, but not all, and some of it in threads that complain
        on stderr. A process killed between saving and this file leaves none to compare with.
        """
        folder = self.directory / str(number)
        if not (folder / _MANIFEST).exists():
            return {}
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
        except ValueError:
            raise self._damaged(number, f"{_MANIFEST} cannot be read") from None
        expected, found = manifest["files"], _digests(folder)
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                raise self._damaged(number, f"{name} is not what was written")
        return manifest

    def _damaged(self, number: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.directory / str(number)} is damaged or cut ({reason}); remove that "
            "folder to continue without it, or use another --workdir"
        )

    def _restore(self, number: int, args: Any) -> Any:
        self._manifest(number)
        failure = None
        with _quiet():
            try:
                return self._manager.restore(number, args=args)
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                reason = " ".join(str(error).split())[:120]
                failure = f"{type(error).__name__}: {reason}"
            # Reads that were abandoned complain when collected; do that while nobody listens.
            gc.collect()
        raise self._damaged(number, str(failure))

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
    if not _is_key(template):
        return leaf
    return jax.random.wrap_key_data(leaf, impl=template.dtype._impl.name)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but the manifest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _MANIFEST
    }


def _layout(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf, by its path."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


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
