"""Re-selection in a run: resumed across a choice it ends with the same bytes, and the saved adapter holds all that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.training import evaluate_adapter, train

from .conftest import MakeRecipe
from .test_resume import CrashError, crash

TRAINING = {"save_steps": 3, "warmup_steps": 2, "eval_strategy": "no"}


@pytest.mark.parametrize("mode", ["row", "column"])
@pytest.mark.parametrize("strategy", ["gradient", "cycle"])
def test_resumed_across_a_choice_it_ends_with_the_same_bytes(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, strategy: str
) -> None:
    changes: dict[str, Any] = {
        "method": {"name": "rocoft", "mode": mode, "r": 2},
        "training": TRAINING,
        "reselection": {"every": 2, "strategy": strategy, "samples": 6},
    }
    whole = train(make_recipe(**changes, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        crash(patch, 6)
        with pytest.raises(CrashError):
            train(make_recipe(**changes))
    resumed = train(make_recipe(**changes), resume=True)
    assert resumed.metrics["resumed_from_step"] == 3  # after the first choice of three
    for file in whole.adapter.iterdir():
        assert (resumed.adapter / file.name).read_bytes() == file.read_bytes(), file.name
    assert resumed.metrics["after"] == whole.metrics["after"]


def test_the_saved_adapter_holds_the_union_and_evaluates_to_the_same_figures(
    make_recipe: MakeRecipe, films: Path
) -> None:
    recipe = make_recipe(reselection={"every": 2, "strategy": "cycle", "budget": 5}, training={"num_train_epochs": 3})
    result = train(recipe)
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    counts = {len(tensor) for name, tensor in tensors.items() if name.endswith("row_index")}
    assert counts == {4}  # two sets of two; a third would exceed the budget
    assert not any("settled" in name for name in tensors)
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert set(map(tuple, config["indices"].values())) == {(0, 1, 2, 3)}
    assert evaluate_adapter(result.adapter, str(films / "test.jsonl"), quiet=True) == result.metrics["after"]
    whole = result.metrics["trainable_parameters"]
    assert whole == train(make_recipe(output_dir=recipe.output_dir), overwrite=True).metrics["trainable_parameters"]


def test_the_best_checkpoint_is_loaded_with_what_it_had_settled(make_recipe: MakeRecipe, films: Path) -> None:
    training = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    result = train(make_recipe(training=training, reselection={"every": 3, "strategy": "gradient"}))
    assert evaluate_adapter(result.adapter, str(films / "test.jsonl"), quiet=True) == result.metrics["after"]


@pytest.mark.parametrize(
    ("section", "method", "message"),
    [
        ({}, {"name": "rocoft"}, "reselection.every is missing"),
        ({"every": 0}, {"name": "rocoft"}, "reselection.every is 0; expected a whole number of 1 or more"),
        ({"evry": 5}, {"name": "rocoft"}, "evry.*did you mean 'every'"),
        ({"every": 5, "strategy": "best"}, {"name": "rocoft"}, "reselection.strategy is 'best'"),
        ({"every": 5, "budget": 2}, {"name": "rocoft", "r": 3}, "reselection.budget is 2, below the 3 rows"),
        ({"every": 5}, {"name": "lora", "r": 2}, "reselection is for method rocoft; the recipe's method is 'lora'"),
        (5, {"name": "rocoft"}, "reselection is 5; expected a mapping"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(
    make_recipe: MakeRecipe, section: Any, method: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(method=method, reselection=section)


def test_experts_are_refused_before_anything_is_trained(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_decoder_tokenizer: PreTrainedTokenizerFast
) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_local_experts": 2,
    }
    base = tmp_path / "mixtral"
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tiny_decoder_tokenizer), **sizes)).save_pretrained(base)
    tiny_decoder_tokenizer.save_pretrained(base)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "the film was good"}) + "\n")
    recipe = make_recipe(
        model=str(base), task={"name": "language_modelling"}, data=dict.fromkeys(("train", "test"), str(texts)), max_length=16,
        training={"eval_strategy": "no"}, reselection={"every": 1000, "strategy": "cycle"},
    )  # fmt: skip
    with pytest.raises(UserError, match="reselection is for linear layers, not for fused experts"):
        train(recipe)
    assert not (tmp_path / "run").exists()
