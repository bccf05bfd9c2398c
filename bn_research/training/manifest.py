"""The list of what a checkpoint holds, by which damage is found before anything is read."""

import hashlib
import json
from pathlib import Path
from typing import Any

from bn_research.claims import atomic

_NAME = "manifest.json"


class DamageError(ValueError):
    """A folder is not as it was written; the message says why in a few words."""


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes JSON-able content beside the SHA-256 of every file of the folder, and of itself."""
    files = {
        str(path.relative_to(folder)): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _NAME
    }
    body = json.dumps({"files": files, **content})
    seal = hashlib.sha256(body.encode()).hexdigest()
    atomic.write_bytes(folder / _NAME, f"{seal}\n{body}\n".encode())


def read_manifest(folder: Path, *, check_files: bool = True) -> dict[str, Any]:
    """What was written, after comparing it, and every file, with the digests.

    Raises:
      DamageError: something is missing, cannot be read or is not what was written.
    """
    name = _NAME
    try:
        seal, _, body = (folder / _NAME).read_bytes().partition(b"\n")
        body = body.removesuffix(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != seal:
            raise DamageError(f"{name} is not what was written")
        manifest = json.loads(body)
        for name, digest in manifest["files"].items() if check_files else ():
            if _digest(folder / name) != digest:
                raise DamageError(f"{name} is not what was written")
    except FileNotFoundError:
        raise DamageError(f"{name} is missing") from None
    except OSError as error:
        raise DamageError(f"{name} cannot be read: {error.strerror}") from None
    return manifest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
