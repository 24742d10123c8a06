from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from turnrow.errors import UserError
from turnrow.training.folder import RunFolder

from .conftest import MakeRecipe


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_new_folder_is_free(folder: RunFolder, make_recipe: MakeRecipe) -> None:
    for flags in ({"resume": False, "overwrite": False}, {"resume": True, "overwrite": False}):
        folder.check(make_recipe(), **flags)
    folder.open(make_recipe())
    assert folder.recipe.read_text() == make_recipe().to_yaml()


def test_files_of_others_do_not_stand_in_the_way(folder: RunFolder, make_recipe: MakeRecipe) -> None:
    folder.root.mkdir()
    (folder.root / "notes.txt").touch()
    folder.check(make_recipe(), resume=False, overwrite=False)


@pytest.mark.parametrize(("finished", "state"), [(False, "an unfinished run"), (True, "a finished run")])
def test_a_folder_with_a_run_is_refused(folder: RunFolder, make_recipe: MakeRecipe, finished: bool, state: str) -> None:
    folder.open(make_recipe())
    if finished:
        folder.metrics.write_text("{}")
    with pytest.raises(UserError, match=rf"already holds {state}; continue it with --resume, .* --overwrite"):
        folder.check(make_recipe(), resume=False, overwrite=False)
    folder.check(make_recipe(), resume=True, overwrite=False)
    folder.check(make_recipe(), resume=False, overwrite=True)


def test_resume_and_overwrite_exclude_each_other(folder: RunFolder, make_recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match="choose one"):
        folder.check(make_recipe(), resume=True, overwrite=True)


def test_a_folder_under_a_file_is_refused(folder: RunFolder, make_recipe: MakeRecipe) -> None:
    folder.root.touch()
    with pytest.raises(UserError, match="inner' lies under '.*run', which is a file; choose another"):
        RunFolder(folder.root / "deep" / "inner").check(make_recipe(), resume=False, overwrite=False)


def test_a_file_is_no_folder(folder: RunFolder, make_recipe: MakeRecipe) -> None:
    folder.root.touch()
    with pytest.raises(UserError, match="is a file; choose a folder"):
        folder.check(make_recipe(), resume=False, overwrite=False)


def test_files_of_our_names_without_a_run_are_never_deleted(folder: RunFolder, make_recipe: MakeRecipe) -> None:
    folder.root.mkdir()
    folder.report.write_text("someone's thesis")
    for flags in ({"resume": False, "overwrite": True}, {"resume": True, "overwrite": False}):
        with pytest.raises(UserError, match=r"has report\.html, which turnrow would write, but no recipe\.yaml"):
            folder.check(make_recipe(), **flags)


def test_resume_with_another_recipe_names_what_changed(folder: RunFolder, make_recipe: MakeRecipe) -> None:
    folder.open(make_recipe())
    with pytest.raises(UserError, match="another recipe: seed was 0 and is now 1"):
        folder.check(make_recipe(seed=1), resume=True, overwrite=False)


def test_a_moved_folder_can_be_resumed(folder: RunFolder, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder.open(make_recipe())
    moved = RunFolder(folder.root.rename(tmp_path / "moved"))
    moved.check(replace(make_recipe(), output_dir=str(moved.root)), resume=True, overwrite=False)


def test_clearing_removes_ours_and_only_ours(folder: RunFolder, make_recipe: MakeRecipe) -> None:
    folder.open(make_recipe())
    (folder.checkpoints / "checkpoint-1").mkdir(parents=True)
    folder.metrics.write_text("{}")
    (folder.root / "notes.txt").touch()
    folder.clear()
    assert [path.name for path in folder.root.iterdir()] == ["notes.txt"]


def test_leftovers_of_a_killed_process_are_removed(folder: RunFolder, make_recipe: MakeRecipe) -> None:
    folder.open(make_recipe())
    (folder.root / ".adapter.abc").mkdir()
    (folder.root / ".metrics.json.xyz").touch()
    folder.open(make_recipe())
    assert [path.name for path in folder.root.iterdir()] == ["recipe.yaml"]
