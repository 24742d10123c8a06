"""Prompted classification and few-shot splits, from the recipe to the predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import make_task
from turnrow.training import Recipe, evaluate_adapter, predict, train
from turnrow.training.calibration import select_indices
from turnrow.training.splits import read_training

from .conftest import MakeRecipe, tiny_config

TASK = {"name": "prompt", "template": "{sentence} it was {mask} .", "label_words": {0: "bad", 1: "good"}}
CAUSAL = {**TASK, "template": "{sentence} it was {mask}", "architecture": "causal"}


@pytest.fixture
def masked_base(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    BertForMaskedLM(tiny_config(len(tiny_tokenizer))).save_pretrained(tmp_path / "masked")
    tiny_tokenizer.save_pretrained(tmp_path / "masked")
    return str(tmp_path / "masked")


@pytest.fixture
def causal_base(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "causal")
    tiny_tokenizer.save_pretrained(tmp_path / "causal")
    return str(tmp_path / "causal")


def check(recipe: Recipe) -> dict[str, Any]:
    result = train(recipe)
    test = recipe.data.splits["test"]
    assert evaluate_adapter(result.adapter, test, quiet=True) == result.metrics["after"]
    again = result.folder.root / "again.jsonl"
    predict(result.adapter, test, output=again, quiet=True)
    assert again.read_bytes() == result.folder.predictions.read_bytes()
    return result.metrics


@pytest.mark.parametrize(
    "method",
    [
        {"name": "rocoft", "mode": "row", "r": 2, "selection": "gradient"},
        {"name": "road", "variant": "road_1", "group_size": 8},
        {"name": "lora", "r": 2, "target_modules": "all-linear"},
        {"name": "full"},
    ],
    ids=lambda method: method["name"],
)
def test_evaluate_and_predict_reproduce_a_masked_run(
    make_recipe: MakeRecipe, masked_base: str, method: dict[str, Any]
) -> None:
    metrics = check(make_recipe(model=masked_base, task=TASK, method=method))
    if method["name"] == "rocoft":
        # The rows of the encoder and of the head's own layer; nothing is new, so nothing is trained whole.
        assert metrics["trainable_parameters"] == 2 * 2 * (4 * 16 + 16 + 24) + 2 * 16


def test_evaluate_and_predict_reproduce_a_causal_run(make_recipe: MakeRecipe, causal_base: str) -> None:
    check(make_recipe(model=causal_base, task=CAUSAL, method={"name": "rocoft", "r": 2}, max_length=20))


def test_virtual_tokens_before_a_prompt_are_no_part_of_it(make_recipe: MakeRecipe, causal_base: str) -> None:
    method = {"name": "prompt_tuning", "num_virtual_tokens": 3}
    metrics = train(make_recipe(model=causal_base, task=CAUSAL, method=method, max_length=20)).metrics
    assert metrics["trainable_parameters"] == 3 * 16
    assert set(metrics["after"]) == {"accuracy", "f1", "f1_macro", "matthews_correlation"}


@pytest.mark.parametrize("task", [TASK, CAUSAL], ids=["masked", "causal"])
def test_a_run_learns(make_recipe: MakeRecipe, masked_base: str, causal_base: str, task: dict[str, Any]) -> None:
    training = {"num_train_epochs": 25, "learning_rate": 1e-2, "save_strategy": "no", "eval_strategy": "no"}
    base = causal_base if "architecture" in task else masked_base
    metrics = train(make_recipe(model=base, task=task, method={"name": "full"}, training=training)).metrics
    assert metrics["after"]["accuracy"] == 1.0 > metrics["before"]["accuracy"]


def test_a_method_that_needs_peft_to_know_the_task_is_refused(make_recipe: MakeRecipe, masked_base: str) -> None:
    method = {"name": "prompt_tuning", "num_virtual_tokens": 3}
    with pytest.raises(UserError, match="method prompt_tuning: peft has no such model for the task of this recipe"):
        train(make_recipe(model=masked_base, task=TASK, method=method))


def few_shot(films: Path, **section: Any) -> dict[str, Any]:
    return {"train": str(films / "train.jsonl"), "test": str(films / "test.jsonl"), "few_shot": section}


def test_few_rows_of_each_class_are_trained_on(make_recipe: MakeRecipe, films: Path) -> None:
    recipe = make_recipe(data={**few_shot(films, k=3, seed=13), "validation": str(films / "validation.jsonl")})
    metrics = check(recipe)
    assert metrics["rows"] == {"train": 6, "validation": 6, "test": 10}
    assert Recipe.from_yaml(Path(recipe.output_dir) / "recipe.yaml") == recipe


def test_validation_is_drawn_from_the_training_split_too(
    make_recipe: MakeRecipe, films: Path, masked_base: str
) -> None:
    recipe = make_recipe(
        model=masked_base, task=TASK, data=few_shot(films, k=3, seed=13, validation=True),
        training={"load_best_model_at_end": True},
    )  # fmt: skip
    result = train(recipe)
    assert result.metrics["rows"] == {"train": 6, "validation": 6, "test": 10}
    history = [json.loads(line) for line in result.folder.history.read_text().splitlines()]
    assert sum("eval_accuracy" in entry for entry in history) == 2


def test_the_seed_of_the_recipe_draws_where_no_other_is_given(
    make_recipe: MakeRecipe, films: Path, tmp_path: Path
) -> None:
    training = {"max_steps": 1}
    runs = [({}, 13), ({"seed": 13}, 0), ({}, 0)]
    drawn = []
    for number, (section, seed) in enumerate(runs):
        recipe = make_recipe(
            data=few_shot(films, k=2, **section), seed=seed, training=training, method={"name": "rocoft", "selection": "gradient"},
            output_dir=str(tmp_path / str(number)),
        )  # fmt: skip
        drawn.append(read_training(recipe, make_task(**recipe.task))["train"]["sentence"][:])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_choice_by_data_looks_at_the_drawn_rows(make_recipe: MakeRecipe, films: Path) -> None:
    recipe = make_recipe(data=few_shot(films, k=2, seed=13), method={"name": "rocoft", "r": 2, "selection": "gradient"})
    chosen = train(recipe).folder.adapter / "turnrow.json"
    assert chosen.exists()
    whole = make_recipe(data=few_shot(films, k=2, seed=13) | {"few_shot": None}, method=dict(recipe.method))
    assert select_indices(recipe).to_dict() != select_indices(whole).to_dict()


def test_a_folder_gives_way_to_the_drawn_validation_split(make_recipe: MakeRecipe, films: Path) -> None:
    recipe = make_recipe(data={"folder": str(films), "few_shot": {"k": 2, "validation": True}})
    assert set(recipe.data.splits) == {"train", "test"}
    assert recipe.data.validates


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"seed": 13}, "data.few_shot is {'seed': 13}; expected a mapping with k"),
        (16, "data.few_shot"),
        ({"k": 0}, "data.few_shot.k is 0; expected an integer from 1"),
        ({"k": "many"}, "data.few_shot.k is 'many'; expected"),
        ({"k": 2, "seed": -1}, "data.few_shot.seed is -1; expected an integer from 0"),
        ({"k": 2, "sead": 1}, "data.few_shot has no field 'sead'; did you mean 'seed'"),
        ({"k": 99}, "99 different rows of each class are needed, but there are"),
    ],
)
def test_wrong_sections_are_refused(make_recipe: MakeRecipe, films: Path, section: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(make_recipe(data={**few_shot(films), "few_shot": section}))


def test_two_validation_splits_are_refused(make_recipe: MakeRecipe, films: Path) -> None:
    data = {**few_shot(films, k=2, validation=True), "validation": str(films / "validation.jsonl")}
    with pytest.raises(UserError, match="data.few_shot.validation draws one from the training split; leave one out"):
        make_recipe(data=data)


def test_a_recipe_file_and_the_command_line_can_ask_for_few_shot(
    make_recipe: MakeRecipe, films: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: m\ntask: {{name: prompt, template: '{{sentence}}? {{mask}}', label_words: {{0: No, 1: Yes}}}}\n"
        f"data: {{folder: {films}, few_shot: {{k: 16, seed: 42, validation: true}}}}\n"
        "method: {name: rocoft}\noutput_dir: runs/x\n"
    )
    recipe = Recipe.from_yaml(file, ["--data.few_shot.k", "4"])
    assert recipe.data.few_shot == {"k": 4, "seed": 42, "validation": True}
    assert recipe.task["label_words"] == {0: "No", 1: "Yes"}


def test_few_rows_can_be_asked_of_a_data_set_by_name(make_recipe: MakeRecipe) -> None:
    data = make_recipe(task={"name": "sst2-prompt"}, data={"few_shot": {"k": 16, "seed": 13, "validation": True}}).data
    assert data.splits == {"train": "nyu-mll/glue:sst2:train", "test": "nyu-mll/glue:sst2:validation"}
    assert data.validates
