"""Images as data sets hold them: paths, the bytes of files, or images in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from turnrow.errors import UserError
from turnrow.tasks.columns import describe_split

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

__all__ = ["FILES", "has_image", "image_files", "need_pillow", "open_image"]

FILES = "pixel_values"
"""The column of the files. Called as what the model reads and the collator makes of them, or Trainer would leave it out."""


def need_pillow() -> None:
    """Refuse to go on without Pillow, naming the extra that brings it."""
    if importlib.util.find_spec("PIL") is None:
        raise UserError("images are read by Pillow, which is not installed; pip install 'turnrow[vision]'")


def image_files(data: Dataset, column: str, split: str, folder: str | None, *, optional: bool = False) -> Dataset:
    """Return `FILES` alone, each image as ``{"path": ..., "bytes": ..., "place": ...}``, not decoded, after a look at its header.

    The place in the data is for the error of a file that turns out to be damaged when a batch is read.

    Args:
        data: the split. A cell holds a path, the bytes of a file, both in the form of the hub, or an image of Pillow.
        column: its column.
        split: named in errors.
        folder: where relative paths begin; None: the current folder, and the folder of the data file for what is not there.
        optional: whether a row may have no image; its cell is then null.

    Raises:
        UserError: an image is missing or cannot be read (with the row), or the column holds something else.
    """
    import pyarrow
    from datasets import Dataset as Table
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    need_pillow()
    held = data.with_format(None).select_columns([column])
    undecoded = ImageFeature(decode=False)
    if isinstance(held.features[column], Value) and held.features[column].dtype in ("string", "large_string"):
        roots = _roots(data, folder)
        cells = [None if path is None else {"path": _resolved(path, roots), "bytes": None} for path in held[column]]
        held = Table.from_dict({column: cells}, features=Features({column: undecoded}))
    else:
        try:
            held = held.cast_column(column, undecoded)
        except (TypeError, ValueError, pyarrow.ArrowException):
            raise UserError(
                f"{describe_split(data, split)}: column {column!r} must hold images (paths, bytes, or images of Pillow), and "
                f"holds {held.features[column]}"
            ) from None
    places = [f"{describe_split(data, split)}, row {row}" for row in range(1, len(held) + 1)]
    for cells, place in zip(held, places, strict=True):
        cell = cells[column]
        if not has_image(cell):
            if not optional:
                raise UserError(f"{place}: column {column!r} has no image (missing or null)")
            continue
        with _readable(cell, place):
            _opened(cell).close()
    return _with_places(held, column, places)


def _with_places(held: Dataset, column: str, places: list[str]) -> Dataset:
    """The files with their places, without a copy of their bytes."""
    import pyarrow
    import pyarrow.compute
    from datasets import Dataset as Table

    named = held if column == FILES else held.rename_column(column, FILES)
    # Beside each other first, so that rows which were chosen or shuffled stand as they are read.
    table = named.add_column("place", places).data
    fields = [pyarrow.compute.struct_field(table.column(FILES), name) for name in ("bytes", "path")]
    cells = pyarrow.compute.make_struct(*fields, table.column("place"), field_names=["bytes", "path", "place"])
    # With a name of its own, or `datasets` would hash every byte for one.
    return Table(pyarrow.table({FILES: cells}), fingerprint=uuid.uuid4().hex)


def has_image(cell: Mapping[str, Any] | None) -> bool:
    """Whether a cell of `image_files`, or one of theirs before it has a place, is not empty."""
    return cell is not None and (cell["bytes"] is not None or bool(cell["path"]))


def open_image(cell: Mapping[str, Any]) -> Image:
    """Read an image of `image_files`, upright and in RGB.

    Raises:
        UserError: its file is damaged or has gone; with its row.
    """
    from PIL import Image, ImageOps

    with _readable(cell, cell.get("place", "")), _opened(cell) as image:
        # What a camera noted of its own position; and Pillow warns of palettes whose colours are partly transparent.
        upright = ImageOps.exif_transpose(image)
        if _is_sixteen_bits(image):  # Pillow would make white whatever exceeds 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return (upright.convert("RGBA") if "transparency" in upright.info else upright).convert("RGB")


@contextlib.contextmanager
def _readable(cell: Mapping[str, Any], place: str) -> Iterator[None]:
    """Whatever Pillow raises of a file becomes an error that names it and its row."""
    from PIL import Image

    try:
        yield
    # Of a damaged file Pillow raises SyntaxError and ValueError too, as its formats do.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{place}: the image {_name(cell)} cannot be read: {_reason(error)}") from error


def _opened(cell: Mapping[str, Any]) -> Image:
    from PIL import Image

    image = Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))
    if image.mode == "F" or (image.mode == "I" and not _is_sixteen_bits(image)):
        raise ValueError("its pixels have 32 bits, and what counts as white is not known; save it with 8 or 16 bits")
    return image


def _is_sixteen_bits(image: Image) -> bool:
    # Older versions of Pillow open PNG files of such as "I".
    return image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")


def _roots(data: Dataset, folder: str | None) -> list[Path]:
    if folder is not None:
        return [Path(folder).expanduser()]
    source = Path(data.info.dataset_name or "")
    return [Path(), source.parent] if source.is_file() else [Path()]


def _resolved(path: str, roots: list[Path]) -> str:
    places = [root / path for root in roots]
    return str(next((place for place in places if place.exists()), places[0])) if path else ""


def _name(cell: Mapping[str, Any]) -> str:
    return repr(cell["path"]) if cell["path"] else f"of {len(cell['bytes'] or b''):,} bytes"


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file; relative paths begin in option 'folder', the current folder or that of the data file"
    return str(error).partition("\n")[0]
