"""Every recipe that is shipped binds, and runs on a few rows of data of its shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.tasks.pictures import write_png
from tests.training.conftest import save_llava
from tests.training.test_generation import byte_tokenizer
from turnrow.tasks import ExtractiveQATask, GenerationTask, Task, VisualInstructionTask, make_task
from turnrow.tasks.sequence import SequenceTask
from turnrow.training import Recipe, train

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"sst2", "rte", "stsb", "demo-head", "demo-rocoft", "demo-full"} <= {path.stem for path in RECIPES}


def rows_for(task: Task, folder: Path) -> list[dict[str, Any]]:
    """A few rows in the form that a task reads; pictures lie in `folder`."""
    text = "the film was good"
    if isinstance(task, SequenceTask):
        labels: list[object] = [0.5, 4.0] if task.name == "regression" else [0, 1]
        return [dict.fromkeys(task.text_columns, text) | {task.label: label} for label in labels * 3]
    if isinstance(task, ExtractiveQATask):
        answers = {"text": ["good"], "answer_start": [text.index("good")]}
        row = {"id": "a", "title": "", "context": text, "question": "how was the film ?", "answers": answers}
        return [row | {"id": str(number)} for number in range(6)]
    if isinstance(task, VisualInstructionTask):
        write_png(folder, "red")
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]
        return [{"image": "red.png", "conversations": turns}] * 6
    assert isinstance(task, GenerationTask)
    gold = {"arithmetic": "3", "multiple_choice": (getattr(task, "labels", None) or ["true"])[0]}.get(task.name, text)
    row = dict.fromkeys(task.columns(), text) | dict.fromkeys(task.gold_columns(), gold)
    # What is offered is named where it is asked.
    return [row | {"instruction": "Answer format: true/false, solution1/solution2"}] * 6


@pytest.fixture
def small_base(tmp_path: Path, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """A tiny base of the class that a task asks for."""

    def make(auto_model: str) -> Path:
        folder = tmp_path / "small"
        sizes = {"vocab_size": 300, "max_position_embeddings": 1024}
        if auto_model == "AutoModelForCausalLM":
            layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
            LlamaForCausalLM(LlamaConfig(**sizes, **layers)).save_pretrained(folder)
        elif auto_model == "AutoModelForImageTextToText":
            return Path(save_llava(folder))
        elif auto_model == "AutoModelForSeq2SeqLM":
            layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
            widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
            BartForConditionalGeneration(BartConfig(**sizes, **layers, **widths)).save_pretrained(folder)
        else:
            return tiny_base
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


def name_of(path: Path) -> str:
    return "-".join(path.relative_to(REPOSITORY / "recipes").with_suffix("").parts)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_shipped_recipe_runs(
    path: Path, small_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_yaml(path).to_dict()
    task = make_task(**recipe["task"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_for(task, tmp_path)))
    recipe["data"] = {split: str(tmp_path / "rows.jsonl") for split in ("train", "validation", "test")}
    quick = {"max_steps": 1, "per_device_train_batch_size": 3, "use_cpu": True, "disable_tqdm": True, "bf16": False}
    # Checkpoints, picture and page are the same for every recipe, and take longer than these models' training.
    quick |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    monkeypatch.setattr("turnrow.training.curve.draw_curve", lambda *_: None)
    monkeypatch.setattr("turnrow.training.report.write_report", lambda *_: None)
    recipe["training"] |= quick
    if task.generation_options():
        recipe["task"]["generation"] = {**task.generation_options(), "max_new_tokens": 2}
    if recipe["method"]["name"] == "road":
        # The tiny bases have fewer features than a group of RoAd by default.
        recipe["method"]["group_size"] = 2
    # Its own length is for models with as many positions.
    length = 1000 if isinstance(task, GenerationTask) else 64 if isinstance(task, VisualInstructionTask) else 16
    changed = {"model": str(small_base(task.auto_model)), "max_length": length, "output_dir": str(tmp_path / "run")}
    assert train(Recipe.from_dict(recipe | changed)).metrics["steps"] == 1


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
