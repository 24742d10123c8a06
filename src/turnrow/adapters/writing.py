"""The folder of an adapter or a merged model that is to be made: free, and there only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turnrow.errors import UserError
from turnrow.files import whole_folder

__all__ = ["check_new_folder", "copy_beside", "new_folder"]


def check_new_folder(out: str | os.PathLike[str]) -> Path:
    """Return `out` as a path if it is free to be made: absent, or an empty folder.

    Raises:
        UserError: it is a file, a folder that holds something, or the current one, which cannot be put in place anew.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give the name of a folder to make")
    if out.is_dir() and out.samefile(os.curdir):
        raise UserError(f"{out} is the current folder: give the name of a folder to make")
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
    with whole_folder(check_new_folder(out)) as folder:
        yield folder


def copy_beside(source: Path, folder: Path, *, but: tuple[str, ...], names: frozenset[str] = frozenset()) -> None:
    """Copy the files in the folder `source` that `folder` lacks, but hidden ones, those with an ending in `but` and those in `names`."""
    for entry in sorted(source.iterdir()):
        wanted = entry.is_file() and not entry.name.startswith(".") and not entry.name.endswith(but)
        wanted = wanted and entry.name not in names
        if wanted and not (folder / entry.name).exists():
            shutil.copyfile(entry, folder / entry.name)
