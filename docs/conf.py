"""Sphinx: `make docs`."""

from __future__ import annotations

import turnrow

project = "turnrow"
author = copyright = "The turnrow developers"
release = turnrow.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"turnrow {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
# The links that GitHub makes of headings, so that a page reads the same there and here.
myst_heading_anchors = 3
