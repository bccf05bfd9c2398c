"""Checkpoints through orbax: written while training goes on, whole or not there, each checked."""

import concurrent.futures
import itertools
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bn_research.training.manifest import DamageError, read_manifest, write_manifest
from bn_research.training.quiet import quiet_orbax

# A checkpoint is a folder with a number for a name, and becomes one by being renamed. Before it
# is "N.saving", and when it is dropped "N.dropped"; orbax has a name of its own for its unfinished.
_UNFINISHED = re.compile(r"\d+(\.saving|\.dropped)?(\.orbax-checkpoint-tmp.*)?")
_BARRIER_SECONDS = 300  # for which a process waits for another that is still writing
_REMOVALS, _SECONDS_BETWEEN_REMOVALS = 40, 0.05  # of what another thread may still be writing
_NONE, _UNREADABLE = -1, -2  # in place of a number, when process 0 tells the others


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message is one line for people."""


class Checkpointer:
    """Saves pytrees with a JSON-able note under increasing numbers, keeping the newest.

    Saving goes on in the background. A checkpoint becomes visible whole, with the digests of its
    files, or not at all, so a process killed at any moment leaves the checkpoints before. PRNG
    keys are saved as their data.

    With several processes (`jax.distributed`) each makes a Checkpointer on a folder that all of
    them see and calls the same methods in the same order: all of them write their part of the
    arrays, process 0 decides which checkpoint is whole and numbers, renames and removes.

    Args:
      directory: made if absent; holds one folder for each checkpoint. What a killed process left
        half written there is removed.
      max_to_keep: how many to keep.

    Raises:
      CheckpointError: the directory cannot be made.
    """

    def __init__(self, directory: Path, *, max_to_keep: int = 3):
        """Opens the directory."""
        self.directory = Path(directory).absolute()
        self._max_to_keep = max_to_keep
        self._is_primary = jax.process_index() == 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the folder of checkpoints {self.directory} cannot be made: {error.strerror}"
            ) from None
        if self._is_primary:
            self._remove_unfinished()
        import orbax.checkpoint as ocp  # takes a tenth of what asking for help does

        quiet_orbax()
        # Named processes meet at barriers of the coordination service, which may be waited for in
        # any thread; otherwise orbax would run a collective on the devices.
        count = jax.process_count()
        processes = ocp.options.MultiprocessingOptions(
            active_processes=set(range(count)) if count > 1 else None
        )
        # Weights do not compress (7 %), and Zarr 3 is read twice as fast as Zarr 2.
        handler = ocp.PyTreeCheckpointHandler(
            use_zarr3=True, use_compression=False, multiprocessing_options=processes
        )
        self._orbax = ocp.AsyncCheckpointer(
            handler, timeout_secs=_BARRIER_SECONDS, multiprocessing_options=processes
        )
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def save(self, number: int, state: Any, note: dict[str, Any], *, wait: bool = False) -> None:
        """Begins to save state and note, once the save before is on disk.

        Returns when the state has been copied on its devices and so may be donated or overwritten;
        all else, from the transfer to the host on, is done while training goes on. Until that is
        over the devices hold the state twice.

        Args:
          number: that no checkpoint has, larger than theirs.
          state: pytree of arrays.
          note: JSON-able.
          wait: return only when it is on disk.

        Raises:
          CheckpointError: the save before failed, or this one if it is waited for.
        """
        self.wait()
        if self._folder(number).exists():
            raise CheckpointError(f"checkpoint {self._folder(number)} exists already")
        saved = jax.tree.map(_to_saved, state)
        content = {"note": json.loads(json.dumps(note)), "leaves": _layout(saved)}
        self._pending = self._background.submit(self._write, number, saved, content)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          CheckpointError: it failed; said once.
        """
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending])  # may be interrupted, and called again
        pending, self._pending = self._pending, None
        pending.result()

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Number and note of the newest checkpoint that is whole, or None when there is none.

        Damaged ones newer than that are set aside under another name, with a line on stderr.

        Raises:
          CheckpointError: there are checkpoints and all are damaged; they are left as they are.
        """
        self.wait()
        number, failure = _NONE, None
        if self._is_primary:
            try:
                number = self._newest_whole()
            except CheckpointError as error:
                number, failure = _UNREADABLE, error
        if jax.process_count() > 1:
            number = _from_process_0(number)
        if number == _UNREADABLE:
            raise failure or CheckpointError(
                f"process 0 finds every checkpoint in {self.directory} damaged"
            )
        if number == _NONE:
            return None
        return number, self._manifest(number, check_files=False)["note"]

    def restore(self, number: int, template: Any) -> Any:
        """The state saved under number.

        Args:
          number: of a checkpoint.
          template: pytree of arrays or ShapeDtypeStructs with the state's structure, shapes and
            dtypes. A NumPy array is restored as one, a leaf with a NamedSharding with it, others
            on the first device.

        Raises:
          CheckpointError: it cannot be read, or its shapes are not the template's.
        """
        self.wait()
        folder = self._folder(number)
        abstract = jax.tree.map(_to_abstract, template)
        # Orbax would cast another dtype and cut another shape, so both are compared before.
        wanted, saved = _layout(abstract), self._manifest(number)["leaves"]
        for name in sorted({*saved, *wanted}):
            if saved.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {folder} is of another model: it holds "
                    f"{saved.get(name, 'nothing')} at {name} where {wanted.get(name, 'nothing')} "
                    "is needed; use another --workdir"
                )
        import orbax.checkpoint as ocp

        args = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
        )
        try:
            restored = self._orbax.restore(folder, args=args)
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise CheckpointError(f"checkpoint {folder} cannot be read: {_said(error)}") from None
        return jax.tree.map(_from_saved, template, restored)

    def close(self) -> None:
        """Waits for the last save, raising what wait() would, and frees the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    def _folder(self, number: int, suffix: str = "") -> Path:
        return self.directory / f"{number}{suffix}"

    def _numbers(self) -> list[int]:
        """Of the checkpoints on disk, in increasing order."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def _write(self, number: int, saved: Any, content: dict[str, Any]) -> None:
        """In the background: has orbax write the files, lists them, makes them a checkpoint."""
        import orbax.checkpoint as ocp

        saving = self._folder(number, ".saving")
        try:
            self._orbax.save(saving, args=ocp.args.PyTreeSave(saved), force=True)
            self._orbax.wait_until_finished()
            if self._is_primary:
                write_manifest(saving, content)
                saving.rename(self._folder(number))
                self._drop_old()
        except Exception as error:  # orbax and tensorstore raise many kinds
            if self._is_primary:
                self._remove_unfinished()  # makes room again on a full disk
            raise CheckpointError(
                f"checkpoint {self._folder(number)} cannot be written: {_said(error)}; "
                "the checkpoints before are kept"
            ) from None

    def _drop_old(self) -> None:
        for number in self._numbers()[: -self._max_to_keep]:
            # Renamed first, so that one removed by half is not taken for one damaged.
            dropped = self._folder(number).rename(self._folder(number, ".dropped"))
            shutil.rmtree(dropped, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        for path in self.directory.iterdir():
            if _UNFINISHED.fullmatch(path.name) and not path.name.isdigit():
                shutil.rmtree(path, ignore_errors=True)
                # After a failed save other threads of orbax may still write into it.
                for _ in range(_REMOVALS):
                    if not path.exists():
                        break
                    time.sleep(_SECONDS_BETWEEN_REMOVALS)
                    shutil.rmtree(path, ignore_errors=True)

    def _newest_whole(self) -> int:
        damaged: dict[int, DamageError] = {}
        for number in reversed(self._numbers()):
            try:
                read_manifest(self._folder(number))
            except DamageError as error:
                damaged[number] = error
                continue
            for other, reason in damaged.items():
                aside = self._set_aside(other)
                print(
                    f"checkpoint {self._folder(other)} is damaged ({reason}) and set aside as "
                    f"{aside.name}; going on from checkpoint {number}",
                    file=sys.stderr,
                )
            return number
        for number, reason in damaged.items():
            raise self._damaged(number, reason)
        return _NONE

    def _set_aside(self, number: int) -> Path:
        """Renames a checkpoint to N.damaged, or N.damaged-2 and so on."""
        names = itertools.chain([".damaged"], (f".damaged-{i}" for i in itertools.count(2)))
        free = (path for name in names if not (path := self._folder(number, name)).exists())
        return self._folder(number).rename(next(free))

    def _manifest(self, number: int, *, check_files: bool = True) -> dict[str, Any]:
        if not self._folder(number).exists():
            raise CheckpointError(f"there is no checkpoint {self._folder(number)}")
        try:
            return read_manifest(self._folder(number), check_files=check_files)
        except DamageError as error:
            raise self._damaged(number, error) from None

    def _damaged(self, number: int, error: DamageError) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self._folder(number)} is damaged or cut ({error}); remove that "
            "folder to continue without it, or use another --workdir"
        )


def _from_process_0(number: int) -> int:
    """What process 0 gives, in every process, once all devices are done with telling it.

    `multihost_utils.broadcast_one_to_all` waits for one device of each process. Where a process
    ended next, one of its devices might not have connected yet, and that of another process would
    wait for it for ever.
    """
    given = number if jax.process_index() == 0 else _UNREADABLE  # the least there is
    everywhere = jax.pmap(lambda n: jax.lax.pmax(n, "all"), axis_name="all")
    return int(everywhere(np.full(jax.local_device_count(), given)).block_until_ready()[0])


def _said(error: Exception) -> str:
    """An exception in one line; of those that hold an error of the system, that error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    code = re.search(r"os_error_code='(\d+)'", text)  # as tensorstore ends its messages
    return os.strerror(int(code[1])) if code else f"{type(error).__name__}: {text[:120]}"


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_saved(leaf: Any) -> Any:
    """A copy, of a key that of its data."""
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return jax.device_put(data, data.sharding, may_alias=False)


def _to_abstract(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _from_saved(template: Any, leaf: Any) -> Any:
    if not _is_key(template):
        return leaf
    return jax.random.wrap_key_data(leaf, impl=template.dtype._impl.name)


def _layout(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf, by its path."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
