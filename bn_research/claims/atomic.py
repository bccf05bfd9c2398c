"""Files that are either whole or not there, whatever interrupts the run."""

import os
import uuid
from pathlib import Path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Path of a file whose readers see the old content or the new, never a part.

    Missing parent folders are created.

    Raises:
      OSError: the file could not be written; the old file, if any, is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since os.replace is atomic within one file system only. Not `tempfile`,
    # whose files nobody but their owner may read.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
