from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from turnrow.training.checkpoints import SealAndRotate, discard_incomplete, is_complete, last_complete, seal


def checkpoint(folder: Path, step: int, *, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_bytes(b"1234")
    (path / "inner" / "state").write_bytes(b"56")
    if sealed:
        seal(path)
    return path


def test_a_sealed_checkpoint_is_complete(tmp_path: Path) -> None:
    assert is_complete(checkpoint(tmp_path, 1))


def test_a_checkpoint_without_a_seal_is_not(tmp_path: Path) -> None:
    assert not is_complete(checkpoint(tmp_path, 1, sealed=False))


@pytest.mark.parametrize("damage", ["truncated", "missing", "broken seal"])
def test_a_damaged_checkpoint_is_not_complete(tmp_path: Path, damage: str) -> None:
    path = checkpoint(tmp_path, 1)
    if damage == "truncated":
        (path / "weights").write_bytes(b"12")
    elif damage == "missing":
        (path / "inner" / "state").unlink()
    else:
        (path / "complete.json").write_text('{"weights": 4')
    assert not is_complete(path)


def test_the_last_complete_one_is_chosen_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, sealed=False)
    (tmp_path / "checkpoint-x").mkdir()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"


def test_no_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert last_complete(tmp_path / "none") is None


def test_incomplete_ones_are_deleted_and_named(tmp_path: Path) -> None:
    kept, broken = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2, sealed=False)
    assert discard_incomplete(tmp_path) == [broken]
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, {4}), (2, None, {3, 4}), (2, 1, {1, 4}), (1, 1, {1, 4}), (3, 1, {1, 3, 4}), (None, None, {1, 2, 3, 4})],
)
def test_the_newest_and_the_best_stay(tmp_path: Path, keep: int | None, best: int | None, left: set[int]) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    newest = checkpoint(tmp_path, 4, sealed=False)
    state = TrainerState(global_step=4)
    state.best_model_checkpoint = str(tmp_path / f"checkpoint-{best}") if best else None
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    SealAndRotate(keep).on_save(args, state, TrainerControl())
    assert {int(path.name.rpartition("-")[2]) for path in tmp_path.iterdir()} == left
    assert is_complete(newest)
