"""The page of results: made from the files of runs alone, and as the repository holds it."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.suite.published import published_tables, to_markdown
from benchmarks.suite.report import DOCS, results_page, write_html


def test_the_page_in_the_repository_is_the_one_that_the_runs_make() -> None:
    assert (DOCS / "results.md").read_text(encoding="utf-8") == results_page(), (
        "python -m benchmarks.suite report writes it anew"
    )


def test_the_readme_shows_lines_of_the_page() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("**What to train.**") : readme.index("**Two tasks in one model.**")]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 3
    page = results_page().splitlines()
    assert [line for line in lines if line not in page] == []


def test_every_picture_of_the_page_is_there() -> None:
    pictures = re.findall(r"\]\((figures/[^)]+)\)", results_page())
    assert pictures
    for picture in pictures:
        assert (DOCS / picture).is_file(), picture


def test_without_any_run_nothing_is_claimed_of_ours(tmp_path: Path) -> None:
    page = results_page(tmp_path)
    claims = page[page.index("## Claim by claim") : page.index("## What the papers print")]
    assert "(not yet run)" in claims
    assert " ± " not in page.replace(claims, "").replace("Mean ± standard", "")


def test_published_tables_are_marked_as_such_and_have_a_value_a_column() -> None:
    for name, table in published_tables().items():
        assert all(len(values) == len(table["columns"]) for values in table["rows"].values()), name
        printed = to_markdown(table)
        assert f"(published: {table['source']})" in printed
        assert printed.count("\n| ") == 1 + len(table["rows"])


def test_one_page_of_html_has_its_pictures_inside(tmp_path: Path) -> None:
    write_html(tmp_path / "results.html", DOCS)
    page = (tmp_path / "results.html").read_text(encoding="utf-8")
    assert "<table>" in page
    assert 'src="data:image/png;base64,' in page
    assert 'src="figures' not in page
