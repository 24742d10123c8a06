"""Every recipe that is shipped binds, and runs on a few rows of data of its shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turnrow.tasks import Task, make_task
from turnrow.tasks.sequence import SequenceTask
from turnrow.training import Recipe, train

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"sst2", "rte", "stsb", "demo-head", "demo-rocoft", "demo-full"} <= {path.stem for path in RECIPES}


def rows_for(task: Task) -> list[dict[str, object]]:
    """A few rows in the form that a task reads."""
    if isinstance(task, SequenceTask):
        labels: list[object] = [0.5, 4.0] if task.name == "regression" else [0, 1]
        return [dict.fromkeys(task.text_columns, "the film was good") | {task.label: label} for label in labels * 3]
    raise NotImplementedError(task.name)


def name_of(path: Path) -> str:
    return "-".join(path.relative_to(REPOSITORY / "recipes").with_suffix("").parts)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_shipped_recipe_runs(path: Path, tiny_base: Path, tmp_path: Path) -> None:
    task = make_task(**Recipe.from_yaml(path).task)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_for(task)))
    overrides = {
        "model": tiny_base,
        "output_dir": tmp_path / "run",
        "max_length": 16,
        "training.max_steps": 2,
        "training.per_device_train_batch_size": 3,
        "training.use_cpu": "true",
        "training.disable_tqdm": "true",
        **{f"data.{split}": tmp_path / "rows.jsonl" for split in ("train", "validation", "test")},
    }
    recipe = Recipe.from_yaml(path, [f"--{name}={value}" for name, value in overrides.items()])
    # The tiny base has as many features as a group of RoAd has by default, or fewer.
    if recipe.method["name"] == "road":
        recipe = Recipe.from_dict({**recipe.to_dict(), "method": {**recipe.method, "group_size": 2}})
    result = train(recipe)
    assert result.metrics["steps"] == 2


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_shipped_recipe_says_how_it_is_called(path: Path) -> None:
    called = path.relative_to(REPOSITORY).as_posix()
    assert f"--config {called}" in path.read_text() or path.stem.startswith("demo-")


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("demo-")], ids=lambda path: path.stem)
def test_the_demo_finds_its_data_from_anywhere(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_yaml(path)
    for file in (recipe.data.train, recipe.data.validation, recipe.data.test):
        assert Path(str(file)).is_file()
