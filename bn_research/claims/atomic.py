"""Files that are either whole or not there, whatever interrupts the run."""

import os
import uuid
from pathlib import Path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write ``data`` so that a reader of ``path`` sees the old file or the new one, never a part.

    Args:
        path: Where to write; missing parent folders are created.
        data: The whole content.

    Returns:
        The path.

    Raises:
        OSError: The file could not be written; the old file, if any, is untouched.
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
