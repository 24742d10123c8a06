"""Tables in the documentation are those that the kept results give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import few_shot, probe
from benchmarks.serving import table as serving
from benchmarks.serving_load import report as serving_load

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def _all_of(pattern, markdown):
    files = sorted(RESULTS.glob(pattern))
    assert files
    return "\n\n".join(markdown(json.loads(file.read_text(encoding="utf-8"))).strip() for file in files)


PAGES = {
    "few-shot": ("kernels.md", few_shot.markdown),
    "probe": ("probe.md", probe.markdown),
    "serving": ("serving.md", lambda: _all_of("serving-*-cpu.json", serving.markdown)),
    "serving-load": ("serving.md", lambda: _all_of("serving-load.json", serving_load.markdown)),
}


@pytest.mark.parametrize(("page", "markdown"), PAGES.values(), ids=PAGES)
def test_the_page_holds_the_tables_of_the_results(page, markdown):
    text = (DOCS / page).read_text(encoding="utf-8")
    for table in markdown().split("\n\n"):
        assert table in text, f"docs/{page} is not what the command prints now: paste it in again"
