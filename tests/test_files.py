"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from turnrow.files import whole_folder, write_bytes, write_json, write_lines, write_text


def test_a_file_is_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    write_lines(tmp_path / "f", ["a\n", "b\n"])
    assert (tmp_path / "f").read_bytes() == b"a\nb\n"
    assert os.listdir(tmp_path) == ["f"]


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    write_json(tmp_path / "f", {"perplexity": float("inf"), "loss": [800.5, float("nan")], "steps": 3})

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    read = json.loads((tmp_path / "f").read_text(), parse_constant=refuse)
    assert read == {"perplexity": None, "loss": [800.5, None], "steps": 3}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "f", b"old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_text_that_is_none_changes_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    with pytest.raises(UnicodeEncodeError, match="surrogates"):
        write_text(tmp_path / "f", "\ud800")
    with pytest.raises(TypeError, match="expected str"):
        write_lines(tmp_path / "f", ["new", 1])  # type: ignore[list-item]
    assert (tmp_path / "f").read_text() == "old"


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "f", "x")
    assert (tmp_path / "a" / "b" / "f").read_text() == "x"


def test_permissions_are_those_of_ordinary_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text(tmp_path / "f", "x")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_json_keeps_letters_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Grüße", "value": 0.1})
    assert "Grüße" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "Grüße", "value": 0.1}


def test_a_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    for name in ("first", "second"):
        with whole_folder(path) as temporary:
            (temporary / name).touch()
    assert [entry.name for entry in path.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    with whole_folder(path) as temporary:
        (temporary / "first").touch()
    with pytest.raises(RuntimeError, match="half way"), whole_folder(path) as temporary:
        (temporary / "second").touch()
        raise RuntimeError("half way")
    assert [entry.name for entry in path.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [path]
