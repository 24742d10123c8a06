from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from turnrow.errors import UserError
from turnrow.selection import Chosen, Selection, read_indices


def chosen(module: str, part: str, index: list[int]) -> Chosen:
    return Chosen(module, part, (4, 6), torch.tensor(index), 0.5)


ROWS = Selection("row", "fisher", (chosen("a", "row", [0, 3]), chosen("b", "row", [1])))
BOTH = Selection("row+column", "first", (chosen("a", "row", [0]), chosen("a", "column", [5])))


def test_the_file_holds_what_was_chosen():
    assert ROWS.to_dict() == {
        "version": 1,
        "mode": "row",
        "strategy": "fisher",
        "modules": {"a": [0, 3], "b": [1]},
    }
    assert BOTH.indices() == {"a": {"row": [0], "column": [5]}}


@pytest.mark.parametrize("selection", [ROWS, BOTH], ids=["row", "row+column"])
def test_what_was_written_is_read(selection, tmp_path):
    (tmp_path / "indices.json").write_text(json.dumps(selection.to_dict()))
    assert read_indices(tmp_path / "indices.json", selection.mode) == selection.indices()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON file of indices"),
        ("[1, 2]", "is no file of indices: it must hold 'version', 'mode' and 'modules'"),
        ('{"version": 1, "mode": "row", "modules": {}}', "is no file of indices"),
        ('{"version": 2, "mode": "row", "modules": {"a": [1]}}', "has format version 2, this turnrow reads 1"),
        (
            '{"version": 1, "mode": "row", "modules": {"a": 3}}',
            r"json: modules\['a'\] is 3; it must be a list of numbers",
        ),
        ('{"version": 1, "mode": "row", "modules": {"a": null}}', r"json: modules\['a'\] is None; it must be a list"),
        ('{"version": 1, "mode": "column", "modules": {"a": [1]}}', "for mode 'column', and the mode here is 'row'"),
    ],
)
def test_broken_files_are_refused(text, message, tmp_path: Path):
    (tmp_path / "indices.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_indices(tmp_path / "indices.json", "row")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"the file '.*nowhere.json', which cannot be read \(No such file or directory\)"
    ):
        read_indices(tmp_path / "nowhere.json", "row")
