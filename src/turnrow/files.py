"""Nothing is half-written: a file or folder appears under its name only when it is complete."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp, mkstemp
from typing import Any

from turnrow.errors import UserError

__all__ = [
    "check_output",
    "file_above",
    "finite_or_null",
    "whole_folder",
    "write_bytes",
    "write_json",
    "write_lines",
    "write_text",
]


def check_output(path: Path, name: str) -> None:
    """Refuse a path at which no file can be written, before the work whose result is to go there.

    Args:
        path: where the file is to be.
        name: what the user calls it, such as ``"--output"``.

    Raises:
        UserError: `path` is a folder, or lies under a file.
    """
    if path.is_dir():
        raise UserError(f"{name} {str(path)!r} is a folder; give the path of a file in it")
    if (above := file_above(path)) is not None:
        raise UserError(f"{name} {str(path)!r} lies under {str(above)!r}, which is a file; give another path")


def file_above(path: Path) -> Path | None:
    """The file that stands where a folder above `path` would have to be, or None."""
    return next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file through a temporary one beside it, so that a reader sees the old or the new one, on the disk; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _give_default_mode(temporary, 0o666)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Like `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Like `write_text`, for lines that have their ends."""
    write_text(path, "".join(lines))


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, indented; see `finite_or_null`."""
    write_text(path, json.dumps(finite_or_null(value), indent=2, ensure_ascii=False) + "\n")


def finite_or_null(value: Any) -> Any:
    """Return `value` with None in place of each number that is not finite, such as a perplexity that overflows: JSON has none."""
    if isinstance(value, dict):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends well, and goes away when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        _give_default_mode(temporary, 0o777)
        if path.exists():
            # A folder cannot be replaced in one step; the old one goes only after the new one is complete.
            old = Path(mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _give_default_mode(path: str | os.PathLike[str], mode: int) -> None:
    """What `tempfile` makes is private to its owner; a finished file or folder is as readable as any that the user makes.

    Args:
        path: a file or folder.
        mode: 0o666 of a file, 0o777 of a folder; less what the user's umask takes away.
    """
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, mode & ~umask)
