"""The folder of a run: its config, its environment, and a ledger of what it has measured.

The ledger is `metrics.jsonl`, a line for each measurement. A run started again with the same config
reads it and goes on. A line that a kill cut short is dropped, and measured again to the same bits.
One run at a time may use the folder.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bn_research.claims.results import write_json

_PACKAGES = (
    "bn_research absl-py flax jax jaxlib ml_collections numpy optax orbax-checkpoint pydantic "
    "scikit-learn scipy tensorflow-datasets"
).split()


class WorkdirError(ValueError):
    """A workdir that a run must not use; the message is one line for people."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A folder that belongs to one experiment with one config."""

    path: Path
    config: Mapping[str, Any]

    def check(self) -> None:
        """Raises unless a run with this config may use the folder; writes nothing.

        Raises:
          WorkdirError: it belongs to another config, is somebody else's folder, or in use.
        """
        self._check_config()
        if self._lock_path.exists():
            with self._locked():
                pass

    def _check_config(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise WorkdirError(f"workdir {self.path} is a file: give the name of a folder")
        if not self._config_path.exists():
            # A run killed before it wrote its config has left its lock.
            if any(self.path.iterdir()) and not self._lock_path.exists():
                raise WorkdirError(
                    f"workdir {self.path} is not empty and holds no config.json of a run: give "
                    "another --workdir"
                )
            return
        try:
            saved = json.loads(self._config_path.read_text())
            differing = sorted(
                key
                for key in {*saved, *self.config}
                if saved.get(key, ...) != _plain(self.config).get(key, ...)
            )
        except (OSError, ValueError, TypeError) as error:
            raise WorkdirError(
                f"workdir {self.path}: config.json cannot be read ({error}); give another --workdir"
            ) from error
        if "experiment" in differing:
            raise WorkdirError(
                f"workdir {self.path} belongs to a run of {saved.get('experiment')!r}: give "
                "another --workdir"
            )
        if differing:
            changes = ", ".join(
                f"{key} (there {saved.get(key, 'absent')!r}, now {_plain(self.config).get(key)!r})"
                for key in differing
            )
            raise WorkdirError(
                f"workdir {self.path} belongs to a run with another config: {changes}; give the "
                "same config to continue it, or another --workdir"
            )

    def check_shared(self) -> None:
        """Raises unless this process sees the folder that process 0 of its job has opened.

        Raises:
          WorkdirError: it does not, or was started with another config.
        """
        if not self._config_path.exists():
            raise WorkdirError(
                f"workdir {self.path} is not where process 0 sees it: give a folder that all "
                "processes see"
            )
        self._check_config()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the folder with `config.json` and `environment.json`, unless they are there.

        Inside it the folder is this run's alone.

        Raises:
          WorkdirError: as `check`.
        """
        self._check_config()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkdirError(f"workdir {self.path} cannot be made: {error}") from error
        with self._locked():
            self._check_config()  # of the run that had the lock until now
            (self.path / "figures").mkdir(exist_ok=True)
            if not self._environment_path.exists():
                write_json(self._environment_path, environment())
            if not self._config_path.exists():
                write_json(self._config_path, _plain(self.config))
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the folder's lock, which the kernel frees however the process ends.

        The text in its file names the last holder, who need not hold it still.
        """
        try:
            file = self._lock_path.open("a+")
        except OSError as error:
            raise WorkdirError(f"workdir {self.path} cannot be written to: {error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise WorkdirError(
                    f"workdir {self.path} is in use by {file.read().strip() or 'another run'}: "
                    "wait until that has ended, or give another --workdir"
                ) from None
            except OSError as error:
                raise WorkdirError(f"workdir {self.path} cannot be locked: {error}") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    @property
    def _config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def _lock_path(self) -> Path:
        return self.path / ".lock"

    @property
    def _environment_path(self) -> Path:
        return self.path / "environment.json"


class Ledger:
    """Measurements by name, each computed once in the life of a workdir.

    Args:
      path: `metrics.jsonl`; made if absent.
    """

    def __init__(self, path: Path):
        """Reads the ledger; a last line that was cut short is dropped."""
        self._path = path
        self._records: dict[str, dict[str, Any]] = {}
        whole = 0
        if path.exists():
            content = path.read_bytes()
            for line in content.splitlines(keepends=True):
                try:
                    record = json.loads(line)
                    self._records[record["name"]] = record
                except (ValueError, KeyError, TypeError) as error:
                    if whole + len(line) < len(content):
                        raise WorkdirError(
                            f"{path} is damaged in the middle ({error}): give another --workdir"
                        ) from error
                    break
                if not line.endswith(b"\n"):
                    del self._records[record["name"]]
                    break
                whole += len(line)
            if whole < len(content):
                os.truncate(path, whole)

    def __contains__(self, name: str) -> bool:
        """Whether this has been measured."""
        return name in self._records

    def get(
        self, name: str, measure: Callable[..., Mapping[str, Any]], *given: Any
    ) -> dict[str, Any]:
        """The record of this name; ``measure(*given)`` written down if there is none yet.

        Numbers that are not finite are kept as null.
        """
        if name not in self._records:
            record = _plain({"name": name, **measure(*given)})
            with self._path.open("ab") as file:
                file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._records[name] = record
        return self._records[name]

    def get_all(
        self, measures: Mapping[str, Callable[[], Mapping[str, Any]]], *, unit: str
    ) -> list[dict[str, Any]]:
        """Records in order, each as of `get`, with a progress bar in this unit."""
        with tqdm(measures.items(), unit=unit, dynamic_ncols=True) as bar:
            records = []
            for name, measure in bar:
                bar.set_description(name)
                records.append(self.get(name, measure))
        return records


def environment() -> dict[str, Any]:
    """Versions, devices and commit of this process."""
    import jax

    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
        "commit": _commit(),
        "versions": versions,
    }


def _commit() -> str | None:
    """Commit of the source tree, marked when it has changes; None outside a repository."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _plain(value: Any) -> Any:
    """Value as JSON gives it back: lists for tuples, null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
