from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from turnrow.errors import UserError
from turnrow.training import Recipe, evaluate_adapter, predict, train

from .conftest import MakeRecipe

METHODS: list[dict[str, Any]] = [
    {"name": "rocoft", "mode": "row", "r": 2},
    {"name": "rocoft", "mode": "column", "r": 2, "bias": "rocoft_only"},
    {"name": "road", "variant": "road_2", "group_size": 8},
    {"name": "lora", "r": 2, "target_modules": "all-linear", "lora_dropout": 0.1},
    {"name": "head"},
    {"name": "full"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(str(v) for v in m.values())[:20])
def test_evaluate_and_predict_reproduce_the_run_exactly(make_recipe: MakeRecipe, method: dict[str, Any]) -> None:
    recipe = make_recipe(method=method)
    result = train(recipe)
    assert evaluate_adapter(result.adapter, recipe.data.test, quiet=True) == result.metrics["after"]
    again = result.folder.root / "again.jsonl"
    predict(result.adapter, recipe.data.test, output=again, quiet=True)
    assert again.read_bytes() == result.folder.predictions.read_bytes()


def test_a_run_learns(make_recipe: MakeRecipe) -> None:
    training = {"num_train_epochs": 12, "learning_rate": 2e-2, "save_strategy": "no", "eval_strategy": "no"}
    metrics = train(make_recipe(method={"name": "rocoft", "r": 16}, training=training)).metrics
    assert metrics["after"]["accuracy"] == 1.0 > metrics["before"]["accuracy"]


def test_the_folder_holds_what_was_promised(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    result = train(recipe)
    names = {path.name for path in result.folder.root.iterdir()}
    assert names == {
        "adapter",
        "checkpoints",
        "recipe.yaml",
        "metrics.json",
        "predictions.jsonl",
        "history.jsonl",
        "curve.png",
        "report.html",
    }
    assert Recipe.from_yaml(result.folder.recipe) == recipe
    adapter = {path.name for path in result.adapter.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "turnrow.json",
        "task.json",
        "tokenizer.json",
    } <= adapter
    rows = [json.loads(line) for line in result.folder.predictions.read_text().splitlines()]
    assert len(rows) == 10
    assert list(rows[0]) == ["sentence", "label", "prediction", "probability"]


def test_metrics_name_every_figure(make_recipe: MakeRecipe) -> None:
    metrics = json.loads(train(make_recipe(seed=3)).folder.metrics.read_text())
    assert metrics["before"].keys() == metrics["after"].keys() >= {"accuracy"}
    linears = 2 * (4 * 16 * 2 + 16 * 2 + 24 * 2) + 16 * 2
    assert metrics["trainable_parameters"] - linears == 16 * 2 + 2
    assert metrics["total_parameters"] > metrics["trainable_parameters"]
    assert metrics["seconds_per_step"] > 0
    assert metrics["peak_memory_bytes"] > 2**20
    assert (metrics["steps"], metrics["epochs"], metrics["seed"]) == (8, 2.0, 3)
    assert {"turnrow", "torch", "transformers", "peft", "python"} <= metrics["versions"].keys()
    assert metrics["rows"] == {"train": 24, "validation": 6, "test": 10}


def test_the_adapter_is_one_that_peft_loads(make_recipe: MakeRecipe, tiny_base: Path) -> None:
    result = train(make_recipe())
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    model = PeftModel.from_pretrained(base, str(result.adapter))
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert torch.equal(model.base_model.model.classifier.weight, saved["base_model.model.classifier.weight"])
    assert json.loads((result.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_base)


def test_the_same_recipe_gives_the_same_adapter_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = train(make_recipe(output_dir=str(tmp_path / "a")))
    second = train(make_recipe(output_dir=str(tmp_path / "b")))
    for path in first.adapter.iterdir():
        assert path.read_bytes() == (second.adapter / path.name).read_bytes(), path.name


def test_another_seed_gives_another_adapter(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = train(make_recipe(output_dir=str(tmp_path / "a"), training={"max_steps": 1}))
    second = train(make_recipe(output_dir=str(tmp_path / "b"), training={"max_steps": 1}, seed=1))
    name = "adapter_model.safetensors"
    assert (first.adapter / name).read_bytes() != (second.adapter / name).read_bytes()


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"training": {"bf16": True}}], ids=["base", "autocast"])
def test_half_precision_reproduces_its_figures_too(make_recipe: MakeRecipe, changes: dict[str, Any]) -> None:
    recipe = make_recipe(method={"name": "rocoft", "mode": "column", "r": 2}, **changes)
    result = train(recipe)
    again = result.folder.root / "again.jsonl"
    predict(result.adapter, recipe.data.test, output=again, quiet=True)
    assert again.read_bytes() == result.folder.predictions.read_bytes()
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32, torch.int64}


def test_the_best_checkpoint_is_what_is_saved(make_recipe: MakeRecipe) -> None:
    """The learning rate breaks everything after the first epoch, so the first checkpoint is the best."""
    training = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "num_train_epochs": 3,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    result = train(make_recipe(training=training))
    losses = {
        entry["step"]: entry["eval_loss"]
        for entry in map(json.loads, result.folder.history.read_text().splitlines())
        if "eval_loss" in entry
    }
    best = min(losses, key=losses.__getitem__)
    assert result.metrics["checkpoint_step"] == best
    checkpoint = load_file(result.folder.checkpoints / f"checkpoint-{best}" / "adapter_model.safetensors")
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert checkpoint.keys() == saved.keys()
    assert all(torch.equal(saved[name], checkpoint[name]) for name in saved)


def test_regression_on_a_single_text(make_recipe: MakeRecipe) -> None:
    task = {"name": "regression", "text": "sentence", "label": "stars"}
    training = {"num_train_epochs": 15, "learning_rate": 1e-2, "save_strategy": "no"}
    recipe = make_recipe(task=task, method={"name": "full"}, training=training)
    result = train(recipe)
    assert result.metrics["after"]["mse"] < result.metrics["before"]["mse"]
    assert evaluate_adapter(result.adapter, recipe.data.test, quiet=True) == result.metrics["after"]


def test_a_validation_split_may_be_left_out(make_recipe: MakeRecipe) -> None:
    data = make_recipe().data
    result = train(make_recipe(data={"train": data.train, "test": data.test}, training={"max_steps": 1}))
    assert "validation" not in result.metrics["rows"]


def test_a_finished_run_is_refused_returned_or_replaced(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training={"max_steps": 1})
    first = train(recipe)
    with pytest.raises(UserError, match="already holds a finished run"):
        train(recipe)
    assert train(recipe, resume=True).metrics == first.metrics
    (first.folder.root / "notes.txt").touch()
    other = train(make_recipe(training={"max_steps": 2}), overwrite=True)
    assert other.metrics["steps"] == 2
    assert (first.folder.root / "notes.txt").exists()


def test_overwriting_deletes_nothing_before_the_new_run_can_start(make_recipe: MakeRecipe) -> None:
    first = train(make_recipe(training={"max_steps": 1}))
    data = {"train": "nowhere.jsonl", "test": "nowhere.jsonl"}
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        train(make_recipe(data=data), overwrite=True)
    assert first.folder.metrics.exists()
    assert first.adapter.exists()


def test_a_label_unseen_in_training_is_refused_before_the_folder_is_made(make_recipe: MakeRecipe, films: Path) -> None:
    (films / "test.jsonl").write_text('{"sentence": "a film", "label": 7}\n')
    recipe = make_recipe()
    with pytest.raises(UserError, match="label 7 .*not seen in training"):
        train(recipe)
    assert not Path(recipe.output_dir).exists()


def test_a_metric_without_a_value_for_the_validation_split_cannot_choose_a_checkpoint(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    rows = tmp_path / "three.jsonl"
    rows.write_text("".join(json.dumps({"sentence": "a story", "label": label}) + "\n" for label in (0, 1, 2) * 2))
    data = dict.fromkeys(("train", "validation", "test"), str(rows))
    with pytest.raises(UserError, match="metric_for_best_model is 'f1', which has no value .* accuracy, f1_macro, "):
        train(make_recipe(data=data, training={"metric_for_best_model": "f1"}))
