"""Every recipe that is shipped binds, and runs on a few rows of data of its shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turnrow.training import Recipe, train

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"sst2", "rte", "stsb", "demo-head", "demo-rocoft", "demo-full"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_runs(path: Path, tiny_base: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    columns = [recipe.task["text"]] if isinstance(recipe.task["text"], str) else recipe.task["text"]
    labels: list[object] = [0.5, 4.0] if recipe.task["name"] == "regression" else [0, 1]
    rows = [dict.fromkeys(columns, "the film was good") | {recipe.task["label"]: label} for label in labels * 3]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    result = train(Recipe.from_yaml(path, [f"--{name}={value}" for name, value in overrides.items()]))
    assert result.metrics["steps"] == 2


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("demo-")], ids=lambda path: path.stem)
def test_the_demo_finds_its_data_from_anywhere(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_yaml(path)
    for file in (recipe.data.train, recipe.data.validation, recipe.data.test):
        assert Path(str(file)).is_file()
