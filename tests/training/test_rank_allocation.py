"""AdaLoRA's budget moves in a run, and other methods have none; methods of ours that are peft's in disguise survive a reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from turnrow.training import Recipe, evaluate_adapter, train

ADALORA = {
    "name": "adalora", "init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": 18,
    "target_modules": "all-linear",
}  # fmt: skip


def recipe(base: Path, films: Path, method: dict[str, Any], folder: Path) -> Recipe:
    return Recipe(
        model=str(base),
        task={"name": "classification", "text": "sentence"},
        data={"folder": str(films)},  # type: ignore[arg-type]
        method=method,
        training={"learning_rate": 1e-2, "num_train_epochs": 3, "per_device_train_batch_size": 4, "disable_tqdm": True},
        output_dir=str(folder),
    )


# A module of which no rank is left is stored with tensors of no size, which peft takes for a broken shard.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape")
# And it looks for the modules under the names of their tensors.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
def test_the_budget_of_adalora_is_spent(tiny_base: Path, films: Path, tmp_path: Path) -> None:
    result = train(recipe(tiny_base, films, ADALORA, tmp_path / "run"))
    assert result.metrics["steps"] == 18
    from turnrow.training.saved import load_saved

    model = load_saved(result.adapter).model
    assert isinstance(model, PeftModel)
    pattern: Any = model.peft_config["default"].rank_pattern  # type: ignore[attr-defined]
    kept = sum(sum(map(bool, ranks)) for ranks in pattern.values())
    # The initial rank is 4 in each; the budget is 1 on average.
    assert kept == len(pattern)
    assert {sum(map(bool, ranks)) for ranks in pattern.values()} != {4}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "bitfit"},
        {"name": "lora_fa", "r": 2, "target_modules": "all-linear"},
        {"name": "lora", "r": 2, "target_modules": "all-linear", "bias": "all"},
        {"name": "lora", "r": 2, "target_modules": ["query"], "bias": "lora_only"},
    ],
    ids=lambda method: "-".join([method["name"], method.get("bias", "none")]),
)
def test_what_was_trained_is_what_is_loaded(
    method: dict[str, Any], tiny_base: Path, films: Path, tmp_path: Path
) -> None:
    result = train(recipe(tiny_base, films, method, tmp_path / "run"))
    assert evaluate_adapter(result.adapter, str(films / "test.jsonl"), quiet=True) == result.metrics["after"]
    assert result.metrics["before"] != result.metrics["after"]
