"""A file or folder appears whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from turnrow.adapters.writing import new_folder
from turnrow.errors import UserError


def test_folder_appears_only_at_the_end(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "a"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert os.listdir(tmp_path / "out") == ["a"]


def test_failure_leaves_nothing_behind(tmp_path):
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").touch()
            raise KeyboardInterrupt("in the middle")

    with pytest.raises(KeyboardInterrupt, match="in the middle"):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_full_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match=r"is not empty \(it holds mine\)"), new_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["mine"]


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="out is a file"), new_folder(tmp_path / "out"):
        pass


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the current folder"), new_folder("."):
        pass
    assert os.listdir(tmp_path) == []


def test_permissions_are_those_of_ordinary_files(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    for name in (".", "file"):
        modes = [stat.S_IMODE((tmp_path / parent / name).stat().st_mode) for parent in ("plain", "out")]
        assert modes[0] == modes[1]
