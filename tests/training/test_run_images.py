"""Tasks on images, from the recipe to the predictions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from safetensors import safe_open
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from turnrow.errors import UserError
from turnrow.training import evaluate_adapter, predict, train

from ..tasks.pictures import COLOURS, picture, png, write_png
from .conftest import MakeRecipe

TASK = {"name": "image_classification"}


@pytest.fixture
def colours(tmp_path: Path) -> dict[str, str]:
    """What colour is the picture? Files beside the data."""
    source = random.Random(0)
    files = {}
    for colour in COLOURS:
        write_png(tmp_path / "colours" / "pictures", colour)
    for split, size in (("train", 18), ("validation", 6), ("test", 9)):
        rows = [{"image": f"pictures/{c}.png", "label": c} for c in source.choices(list(COLOURS), k=size)]
        files[split] = str(tmp_path / "colours" / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture
def tiny_vit(tmp_path: Path) -> Path:
    """A folder with a ViT of two layers, without a head, and its image processor."""
    folder = tmp_path / "vit"
    ViTModel(vit_config()).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def vit_config(**changes: Any) -> ViTConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTConfig(image_size=8, patch_size=4, **sizes, **changes)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "rocoft", "mode": "row", "r": 2, "selection": "gradient"},
        {"name": "road", "variant": "road_1", "group_size": 8, "target_modules": "all-linear"},
        {"name": "lora", "r": 2, "target_modules": "all-linear"},
        {"name": "head"},
        {"name": "full"},
    ],
    ids=lambda method: method["name"],
)
def test_evaluate_and_predict_reproduce_the_run(
    make_recipe: MakeRecipe, tiny_vit: Path, colours: dict[str, str], method: dict[str, Any]
) -> None:
    result = train(make_recipe(model=str(tiny_vit), task=TASK, data=colours, method=method))
    assert evaluate_adapter(result.adapter, colours["test"], quiet=True) == result.metrics["after"]
    again = result.folder.root / "again.jsonl"
    rows = predict(result.adapter, colours["test"], output=again, quiet=True)
    assert again.read_bytes() == result.folder.predictions.read_bytes()
    assert list(rows[0]) == ["image", "label", "prediction", "probability"]
    if method["name"] != "full":
        with safe_open(result.adapter / "adapter_model.safetensors", "pt") as held:
            assert {name for name in held.keys() if "classifier" in name} == {  # noqa: SIM118
                "base_model.model.classifier.weight", "base_model.model.classifier.bias",
            }  # fmt: skip


def test_a_run_learns(make_recipe: MakeRecipe, tiny_vit: Path, colours: dict[str, str]) -> None:
    training = {"num_train_epochs": 8, "learning_rate": 1e-2, "save_strategy": "no", "eval_strategy": "no"}
    recipe = make_recipe(model=str(tiny_vit), task=TASK, data=colours, training=training)
    metrics = train(recipe).metrics
    assert metrics["after"]["accuracy"] == 1.0 > metrics["before"]["accuracy"]
    # Images in memory and bytes are predicted as their files are, and are no part of the answer.
    adapter = Path(recipe.output_dir) / "adapter"
    for cells in ([picture("red"), picture("blue")], [png("red"), png("blue")]):
        rows = predict(adapter, [{"image": cell} for cell in cells], quiet=True)
        assert [list(row) for row in rows] == [["prediction", "probability"]] * 2
        assert [row["prediction"] for row in rows] == ["red", "blue"]


def test_a_head_for_as_many_other_classes_is_trained_too(
    make_recipe: MakeRecipe, tmp_path: Path, colours: dict[str, str]
) -> None:
    ViTForImageClassification(vit_config(num_labels=3)).save_pretrained(tmp_path / "headed-vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "headed-vit")
    recipe = make_recipe(model=str(tmp_path / "headed-vit"), task=TASK, data=colours, training={"max_steps": 1})
    train(recipe)
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["modules_to_save"] == ["classifier"]


def test_images_of_a_table_of_the_hub_are_trained_on(make_recipe: MakeRecipe, tiny_vit: Path, tmp_path: Path) -> None:
    files = {}
    for split in ("train", "test"):
        table = Dataset.from_list([{"img": {"bytes": png(c), "path": None}, "label": n} for n, c in enumerate(COLOURS)])
        files[split] = str(tmp_path / f"{split}.parquet")
        table.to_parquet(files[split])
    recipe = make_recipe(model=str(tiny_vit), task={**TASK, "image": "img"}, data=files, training={"max_steps": 1})
    result = train(recipe)
    assert evaluate_adapter(result.adapter, files["test"], quiet=True) == result.metrics["after"]


def test_few_images_of_each_class_are_drawn(make_recipe: MakeRecipe, tiny_vit: Path, tmp_path: Path) -> None:
    rows = [{"image": png(c, size=(6, 5 + n)), "label": c} for c in COLOURS for n in range(3)]
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    for file in files.values():
        Dataset.from_list(rows).to_parquet(file)
    data = {**files, "few_shot": {"k": 1, "validation": True}}
    metrics = train(make_recipe(model=str(tiny_vit), task=TASK, data=data, training={"max_steps": 1})).metrics
    assert metrics["rows"] == {"train": 3, "validation": 3, "test": 9}


def test_a_length_in_tokens_is_refused_for_images(
    make_recipe: MakeRecipe, tiny_vit: Path, colours: dict[str, str]
) -> None:
    with pytest.raises(
        UserError, match="max_length is 8, but the task reads images alone, which have no tokens; leave it out"
    ):
        train(make_recipe(model=str(tiny_vit), task=TASK, data=colours, max_length=8))
