"""Nothing is half-written: a file appears under its name only when it is complete."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["replace_bytes"]


def replace_bytes(path: Path, data: bytes) -> None:
    """Write `data` through a temporary file beside `path`, so that a reader sees the old or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # A temporary file is private to its owner; a finished one is as readable as any that the user makes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
