"""Findings on one page: a single HTML file that needs nothing else. What all pages share is in ``page.html.j2``."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from turnrow.files import write_bytes

__all__ = ["write_page"]


def write_page(
    path: str | os.PathLike[str],
    template: str,
    values: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    filters: Mapping[str, Callable[[Any], str]] | None = None,
) -> None:
    """Fill a template and write the page, its pictures inside.

    Args:
        path: the file, replaced atomically.
        template: its place in the package `turnrow`, such as ``"analysis/ntk/report.html.j2"``; it extends
            ``"analysis/page.html.j2"``.
        values: `title` and whatever else the template shows; text is escaped.
        pictures: PNGs by the names that the template calls them.
        filters: functions that the template writes values with, by name.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    loader = FunctionLoader(lambda name: files("turnrow").joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters or {}
    inside = {name: base64.b64encode(picture).decode("ascii") for name, picture in pictures.items()}
    text = environment.get_template(template).render(pictures=inside, **values)
    write_bytes(Path(path), text.encode("utf-8"))
