"""Visual instruction tuning of a tiny LLaVA, from the recipe to the predictions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from turnrow.errors import UserError
from turnrow.training import evaluate_adapter, predict, train

from ..tasks.pictures import COLOURS, picture, write_png
from .conftest import MakeRecipe, save_llava

TASK: dict[str, Any] = {"name": "visual_instruction", "generation": {"max_new_tokens": 6}}
QUESTION = {"from": "human", "value": "<image>\nColour?"}


@pytest.fixture
def tiny_llava(tmp_path: Path) -> str:
    return save_llava(tmp_path / "llava")


@pytest.fixture
def talks(tmp_path: Path) -> dict[str, str]:
    source = random.Random(0)
    files = {}
    for colour in COLOURS:
        write_png(tmp_path / "talks" / "pictures", colour)
    for split, size in (("train", 18), ("validation", 4), ("test", 5)):
        rows: list[dict[str, Any]] = [
            {"image": f"pictures/{c}.png", "conversations": [QUESTION, {"from": "gpt", "value": c}]}
            for c in source.choices(list(COLOURS), k=size)
        ]
        rows[-1] = {"image": None, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
        files[split] = str(tmp_path / "talks" / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.mark.parametrize(
    "method",
    [
        {"name": "rocoft", "mode": "row", "r": 2, "selection": "gradient"},
        {"name": "road", "variant": "road_1", "group_size": 8, "target_modules": ["q_proj", "v_proj"]},
        {"name": "lora", "r": 2, "target_modules": "all-linear"},
        {"name": "full"},
    ],
    ids=lambda method: method["name"],
)
def test_evaluate_and_predict_reproduce_the_run(
    make_recipe: MakeRecipe, tiny_llava: str, talks: dict[str, str], method: dict[str, Any]
) -> None:
    recipe = make_recipe(model=tiny_llava, task=TASK, data=talks, method=method)
    result = train(recipe)
    assert list(result.metrics["after"]) == ["perplexity", "loss"]
    assert evaluate_adapter(result.adapter, talks["test"], quiet=True) == result.metrics["after"]
    rows = [json.loads(line) for line in result.folder.predictions.read_text().splitlines()]
    assert [list(row) for row in rows] == [["image", "conversations", "perplexity", "tokens"]] * 5
    asked = [{"image": picture("red"), "conversations": [QUESTION]}]
    assert [list(row) for row in predict(result.adapter, asked, quiet=True)] == [["conversations", "prediction"]]


def test_the_vision_tower_can_be_left_out(make_recipe: MakeRecipe, tiny_llava: str, talks: dict[str, str]) -> None:
    names = []
    for excluded in ({}, {"exclude_modules": ".*vision_tower.*"}):
        recipe = make_recipe(
            model=tiny_llava, task=TASK, data=talks, method={"name": "rocoft", "r": 2, **excluded}, training={"max_steps": 1},
            output_dir=f"{Path(tiny_llava).parent}/{len(names)}",
        )  # fmt: skip
        with safe_open(train(recipe).adapter / "adapter_model.safetensors", "pt") as held:
            names.append(set(held.keys()))
    assert names[0] > names[1] > set()
    assert all("vision_tower" in name for name in names[0] - names[1])
    assert not any("vision_tower" in name for name in names[1])


def test_a_run_learns_to_see(make_recipe: MakeRecipe, tiny_llava: str, talks: dict[str, str]) -> None:
    training = {"num_train_epochs": 40, "learning_rate": 1e-2, "save_strategy": "no", "eval_strategy": "no"}
    task = {**TASK, "answers": True}
    recipe = make_recipe(model=tiny_llava, task=task, data=talks, method={"name": "full"}, training=training)
    result = train(recipe)
    assert result.metrics["main_metric"] == "exact_match"
    assert result.metrics["after"]["exact_match"] == 1.0 > result.metrics["before"]["exact_match"]
    assert evaluate_adapter(result.adapter, talks["test"], quiet=True) == result.metrics["after"]
    again = result.folder.root / "again.jsonl"
    predict(result.adapter, talks["test"], output=again, quiet=True)
    assert again.read_bytes() == result.folder.predictions.read_bytes()


def test_the_best_checkpoint_is_found_by_the_validation_split(
    make_recipe: MakeRecipe, tiny_llava: str, talks: dict[str, str]
) -> None:
    recipe = make_recipe(model=tiny_llava, task=TASK, data=talks, training={"load_best_model_at_end": True})
    history = [json.loads(line) for line in train(recipe).folder.history.read_text().splitlines()]
    assert sum("eval_perplexity" in entry for entry in history) == 2


def test_a_row_longer_than_the_model_is_refused_before_training(
    make_recipe: MakeRecipe, tiny_llava: str, talks: dict[str, str]
) -> None:
    with pytest.raises(
        UserError, match="row 1: the conversation takes 36 tokens with its image, of which max_length keeps 20"
    ):
        train(make_recipe(model=tiny_llava, task=TASK, data=talks, max_length=20))


def test_a_set_without_splits_on_the_hub_says_so(make_recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"data.train is missing; .*\(of llava_instruct the hub has none\)"):
        make_recipe(task={"name": "llava_instruct"}, data={})
