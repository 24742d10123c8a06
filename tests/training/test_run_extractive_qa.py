"""Extractive question answering from the recipe to the predictions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import BertForQuestionAnswering, LlamaForCausalLM, MistralForCausalLM, PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import task_from_dict
from turnrow.training import evaluate_adapter, predict, train

from .conftest import MakeRecipe, tiny_config

TASK = {"name": "extractive_qa", "doc_stride": 2, "max_answer_length": 2}


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, str]:
    """Who is green? The animal before the word, in a context of two windows, or none."""
    source = random.Random(0)
    files = {}
    for split, size in (("train", 32), ("validation", 8), ("test", 10)):
        lines = []
        for number in range(size):
            words = source.choices(["the", "house", "on", "tree", "to", "it"], k=18)
            given: dict[str, list[Any]] = {"text": [], "answer_start": []}
            if number % 4:
                animal, place = source.choice(["cat", "dog", "bird"]), source.randrange(17)
                words[place : place + 2] = [animal, "green"]
                given = {"text": [animal], "answer_start": [len(" ".join([*words[:place], ""]))]}
            lines.append({"id": number, "question": "who is green ?", "context": " ".join(words), "answers": given})
        files[split] = str(tmp_path / f"{split}-qa.jsonl")
        Path(files[split]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


@pytest.mark.parametrize(
    "method",
    [
        {"name": "rocoft", "mode": "row", "r": 2, "selection": "gradient"},
        {"name": "road", "variant": "road_1", "group_size": 8},
        {"name": "lora", "r": 2, "target_modules": "all-linear"},
        {"name": "head"},
        {"name": "full"},
    ],
    ids=lambda method: method["name"],
)
def test_evaluate_and_predict_reproduce_the_run(
    make_recipe: MakeRecipe, questions: dict[str, str], method: dict[str, Any]
) -> None:
    result = train(make_recipe(task=TASK, data=questions, method=method, max_length=20))
    assert evaluate_adapter(result.adapter, questions["test"], quiet=True) == result.metrics["after"]
    again = result.folder.root / "again.jsonl"
    predicted = predict(result.adapter, questions["test"], output=again, quiet=True)
    assert again.read_bytes() == result.folder.predictions.read_bytes()
    assert [row["id"] for row in predicted] == list(range(10))
    assert all(row["context"].find(row["best_answer"]) >= 0 for row in predicted)
    if method["name"] != "full":
        with safe_open(result.adapter / "adapter_model.safetensors", "pt") as held:
            assert {name for name in held.keys() if "qa_outputs" in name} == {  # noqa: SIM118
                "base_model.model.qa_outputs.weight", "base_model.model.qa_outputs.bias",
            }  # fmt: skip
        assert json.loads((result.adapter / "adapter_config.json").read_text())["modules_to_save"] == ["qa_outputs"]


def test_a_run_learns_and_chooses_its_threshold_on_validation(
    make_recipe: MakeRecipe, questions: dict[str, str]
) -> None:
    task = {**TASK, "no_answer_threshold": "validation"}
    training = {"num_train_epochs": 20, "learning_rate": 5e-3, "save_strategy": "no", "eval_strategy": "no"}
    result = train(make_recipe(task=task, data=questions, method={"name": "full"}, training=training, max_length=20))
    assert result.metrics["after"]["f1"] > result.metrics["before"]["f1"] + 0.2
    saved = task_from_dict(json.loads((result.adapter / "task.json").read_text())["task"])
    assert saved.threshold not in (0.0, None)  # type: ignore[attr-defined]
    validation = evaluate_adapter(result.adapter, questions["validation"], quiet=True)
    assert validation["f1"] == validation["oracle_f1"]


def test_a_head_that_the_base_has_is_trained_too(
    make_recipe: MakeRecipe, questions: dict[str, str], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    BertForQuestionAnswering(tiny_config(len(tiny_tokenizer))).save_pretrained(tmp_path / "asked")
    tiny_tokenizer.save_pretrained(tmp_path / "asked")
    recipe = make_recipe(
        model=str(tmp_path / "asked"), task=TASK, data=questions, max_length=20, training={"max_steps": 1}
    )
    assert train(recipe).metrics["trainable_parameters"] > 16 * 2 + 2
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["modules_to_save"] == ["qa_outputs"]


def save_decoder(folder: Path, kind: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    config = kind.config_class(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_decoder_without_pad_token_answers_questions(
    make_recipe: MakeRecipe, questions: dict[str, str], tmp_path: Path, tiny_decoder_tokenizer: PreTrainedTokenizerFast
) -> None:
    base = save_decoder(tmp_path / "decoder", MistralForCausalLM, tiny_decoder_tokenizer)
    result = train(make_recipe(model=base, task=TASK, data=questions, training={"max_steps": 2}))
    assert evaluate_adapter(result.adapter, questions["test"], quiet=True) == result.metrics["after"]


def test_a_base_none_of_whose_weights_are_used_is_refused(
    make_recipe: MakeRecipe, questions: dict[str, str], tmp_path: Path, tiny_decoder_tokenizer: PreTrainedTokenizerFast
) -> None:
    """transformers' Llama for questions has other names for its layers than the checkpoints of Llama have."""
    base = save_decoder(tmp_path / "decoder", LlamaForCausalLM, tiny_decoder_tokenizer)
    with pytest.raises(
        UserError, match="cannot be loaded as LlamaForQuestionAnswering: none of its weights belongs to"
    ):
        train(make_recipe(model=base, task=TASK, data=questions))


def test_a_threshold_of_the_validation_split_needs_one(make_recipe: MakeRecipe, questions: dict[str, str]) -> None:
    data = {name: questions[name] for name in ("train", "test")}
    with pytest.raises(
        UserError, match="'extractive_qa' chooses something on the validation split, but data.validation is missing"
    ):
        train(make_recipe(task={**TASK, "no_answer_threshold": "validation"}, data=data))
