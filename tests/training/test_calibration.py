"""A run chooses what it trains by its first training rows; so does `turnrow select`, without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from turnrow.errors import UserError
from turnrow.selection import read_indices
from turnrow.tasks import make_task, read_table
from turnrow.training import Recipe, evaluate_adapter, train
from turnrow.training import calibration as module
from turnrow.training.arguments import training_arguments
from turnrow.training.base import load_base
from turnrow.training.calibration import select_indices, write_indices
from turnrow.training.trainer import make_trainer

from .conftest import MakeRecipe

GRADIENT = {"name": "rocoft", "r": 2, "selection": "gradient"}


def trained_rows(adapter: Path) -> dict[str, list[int]]:
    saved = load_file(adapter / "adapter_model.safetensors")
    end = ".rocoft_row_index"
    return {
        name.removeprefix("base_model.model.").removesuffix(end): index.tolist()
        for name, index in saved.items()
        if name.endswith(end)
    }


def seen_by_calibration(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, samples: int) -> list[list[int]]:
    seen: list[list[int]] = []

    def watch(model: Any, batches: Any, adapter_name: str) -> Any:
        held = list(batches)
        for batch in held:
            rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            seen.extend(ids[mask == 1].tolist() for ids, mask in rows)
        return select(model, held, adapter_name)

    select = module.select
    monkeypatch.setattr(module, "select", watch)
    select_indices(recipe, samples)
    return seen


def test_the_rows_are_the_first_that_training_sees(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(method=GRADIENT, seed=5)
    task = make_task(**recipe.task)
    table = read_table(recipe.data.train, "train")
    task.fit(table)
    base = load_base(recipe.model, task)
    encoded = task.encode(table, base.tokenizer, split="train")
    args = training_arguments(recipe, task, str(Path(recipe.output_dir)))
    loader = make_trainer(
        task, base.model, base.tokenizer, args, train=encoded, validation=encoded
    ).get_train_dataloader()
    first_epoch = [
        ids[mask == 1].tolist()
        for batch in loader
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert seen_by_calibration(monkeypatch, recipe, 10) == first_epoch[:10]
    assert seen_by_calibration(monkeypatch, recipe, 1000) == first_epoch


def test_a_run_trains_what_select_chooses(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(method=GRADIENT, calibration_samples=12, training={"max_steps": 2})
    result = train(recipe)
    selection = select_indices(recipe)
    rows = trained_rows(result.adapter)
    assert rows == selection.indices()
    assert any(index != [0, 1] for index in rows.values())
    figures = json.loads(result.folder.metrics.read_text())["selection"]
    shares = [chosen.share for chosen in selection]
    assert figures == {
        "strategy": "gradient",
        "calibration_samples": 12,
        "mean_share_of_scores": pytest.approx(sum(shares) / len(shares)),
    }
    assert evaluate_adapter(result.adapter, recipe.data.test, quiet=True) == result.metrics["after"]


def test_a_run_with_the_file_is_the_run_with_the_strategy(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    chosen = make_recipe(method=GRADIENT, output_dir=str(tmp_path / "chosen"), training={"max_steps": 2})
    write_indices(tmp_path / "indices.json", select_indices(chosen))
    method = {"name": "rocoft", "r": 2, "indices": str(tmp_path / "indices.json")}
    given = train(make_recipe(method=method, output_dir=str(tmp_path / "given"), training={"max_steps": 2}))
    assert given.metrics["selection"] is None
    first, second = (load_file(r.adapter / "adapter_model.safetensors") for r in (train(chosen), given))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # the adapter holds the numbers, not the place of the file
    (tmp_path / "indices.json").unlink()
    held = json.loads((given.adapter / "adapter_config.json").read_text())["indices"]
    assert held == trained_rows(given.adapter)
    assert evaluate_adapter(given.adapter, chosen.data.test, quiet=True) == given.metrics["after"]


def test_other_methods_are_not_calibrated(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "select", None)
    for method in (
        {"name": "lora", "r": 1, "target_modules": "all-linear"},
        {"name": "full"},
        {"name": "rocoft", "r": 1},
    ):
        result = train(make_recipe(method=method, training={"max_steps": 1}), overwrite=True)
        assert result.metrics["selection"] is None


def test_an_interrupted_run_resumes_to_the_same_adapter(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    method = GRADIENT | {"selection": "wanda_mixed"}
    whole = train(make_recipe(method=method, output_dir=str(tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-8")
    resumed = train(make_recipe(method=method, output_dir=str(tmp_path / "cut")), resume=True)
    assert resumed.metrics["resumed_from_step"] == 4
    name = "adapter_model.safetensors"
    assert (whole.adapter / name).read_bytes() == (resumed.adapter / name).read_bytes()


@pytest.mark.parametrize("mode", ["row", "row+column"])
def test_the_file_has_a_line_per_module(make_recipe: MakeRecipe, tmp_path: Path, mode: str) -> None:
    selection = select_indices(make_recipe(method={"name": "rocoft", "mode": mode, "r": 2, "selection": "last"}))
    write_indices(tmp_path / "deep" / "indices.json", selection)
    text = (tmp_path / "deep" / "indices.json").read_text()
    assert text.splitlines()[:5] == [
        "{",
        '  "version": 1,',
        f'  "mode": "{mode}",',
        '  "strategy": "last",',
        '  "modules": {',
    ]
    given = "[14, 15]" if mode == "row" else '{"row": [14, 15], "column": [14, 15]}'
    assert f'    "bert.encoder.layer.0.attention.self.query": {given},' in text.splitlines()
    assert read_indices(tmp_path / "deep" / "indices.json", mode) == selection.indices()


def test_a_file_of_indices_is_found_beside_the_recipe(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    write_indices(folder / "indices.json", select_indices(make_recipe()))
    made = make_recipe().to_dict() | {"method": {"name": "rocoft", "r": 2}}
    Recipe.from_dict(made).to_yaml(folder / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_yaml(folder / "recipe.yaml", ["--method.indices", "indices.json"])
    assert recipe.method["indices"] == str(folder / "indices.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "lora", "target_modules": "all-linear"}}, "method 'lora' trains no rows or columns"),
        ({"method": {"name": "rocoft", "indices": [0, 1]}}, "method.indices names already what is trained"),
    ],
)
def test_a_recipe_with_nothing_to_select_is_refused(make_recipe: MakeRecipe, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_indices(make_recipe(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "rocoft", "selection": "fischer"}}, "selection is 'fischer'; .*; did you mean 'fisher'"),
        ({"calibration_samples": 0}, "calibration_samples is 0; expected an integer from 1"),
        ({"method": {"name": "rocoft", "indices": "nowhere.json"}}, "the file 'nowhere.json', which cannot be read"),
    ],
)
def test_bad_values_are_refused_by_the_recipe(make_recipe: MakeRecipe, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(**changes)


def test_more_rows_than_a_module_has_are_refused_before_the_folder_is_made(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(method=GRADIENT | {"r": 17})
    with pytest.raises(UserError, match="r is 17, but module '.*' has only 16 rows"):
        train(recipe)
    assert not Path(recipe.output_dir).exists()
