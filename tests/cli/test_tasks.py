"""``turnrow tasks``: everything that a recipe can name is listed, and what is shown of one is what it stands for."""

from __future__ import annotations

import pytest
import yaml

from turnrow.cli.main import main
from turnrow.tasks import CATALOG, TASKS


def test_kinds_and_data_sets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    printed = capsys.readouterr().out
    for name in (*TASKS, *CATALOG):
        assert f" {name} " in printed


def test_a_data_set_is_shown_with_what_it_stands_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "qqp"]) == 0
    head, _, shown = capsys.readouterr().out.partition("stands for\n")
    assert CATALOG["qqp"].source in head
    assert CATALOG["qqp"].notes in head
    assert yaml.safe_load(shown) == {"task": CATALOG["qqp"].task, "data": CATALOG["qqp"].hub}


def test_a_kind_is_shown_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "classification"]) == 0
    printed = capsys.readouterr().out
    assert "  text: str | list[str]\n" in printed
    assert "  label: str = 'label'\n" in printed
    assert "text_columns" not in printed


def test_an_unknown_name_is_an_error_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "rt"]) == 2
    assert "there is no task 'rt'; turnrow tasks lists them; did you mean 'rte'" in capsys.readouterr().err
