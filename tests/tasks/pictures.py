"""Images of one colour, in every form in which a data set may hold them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def picture(colour: str = "red", size: tuple[int, int] = (12, 9), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", size, COLOURS[colour]).convert(mode)


def png(colour: str = "red", **how: Any) -> bytes:
    held = io.BytesIO()
    picture(colour, **how).save(held, "PNG")
    return held.getvalue()


def write_png(folder: Path, colour: str, name: str | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or f"{colour}.png")
    path.write_bytes(png(colour))
    return str(path)
