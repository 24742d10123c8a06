"""Nothing is half-written: a folder appears under its name only when it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turnrow.errors import UserError
from turnrow.files import give_default_mode

__all__ = ["check_new_folder", "copy_beside", "new_folder"]


def check_new_folder(out: str | os.PathLike[str]) -> Path:
    """Return `out` as a path if it is free to be made: absent, or an empty folder.

    Raises:
        UserError: it is a file or a folder that holds something.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give the name of a folder to make")
    if out.is_dir() and any(out.iterdir()):
        names = ", ".join(sorted(entry.name for entry in out.iterdir())[:3])
        raise UserError(f"the folder {out} is not empty (it holds {names}): give a new folder, or empty this one")
    return out


@contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes the name `out` when the block ends well, and goes away when not.

    Args:
        out: the folder to make. It may exist if it is empty.

    Raises:
        UserError: `out` is a file or a folder that holds something.
    """
    out = check_new_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield temporary
        give_default_mode(temporary, 0o777)
        if out.exists():
            out.rmdir()  # empty, as checked above; replacing an empty folder is not portable
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def copy_beside(source: Path, folder: Path, *, but: tuple[str, ...], names: frozenset[str] = frozenset()) -> None:
    """Copy the files in the folder `source` that `folder` lacks, but hidden ones, those with an ending in `but` and those in `names`."""
    for entry in sorted(source.iterdir()):
        wanted = entry.is_file() and not entry.name.startswith(".") and not entry.name.endswith(but)
        wanted = wanted and entry.name not in names
        if wanted and not (folder / entry.name).exists():
            shutil.copyfile(entry, folder / entry.name)
