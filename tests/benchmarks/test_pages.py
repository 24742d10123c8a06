"""Tables in the documentation are those that the kept results give."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import probe

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "markdown"), [("probe.md", probe.markdown)], ids=["probe"])
def test_the_page_holds_the_tables_of_the_results(page, markdown):
    text = (DOCS / page).read_text(encoding="utf-8")
    for table in markdown().split("\n\n"):
        assert table in text, f"docs/{page} is not what the command prints now: paste it in again"
