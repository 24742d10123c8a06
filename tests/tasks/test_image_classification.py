from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from turnrow.errors import UserError
from turnrow.tasks import ImageClassificationTask, make_task, task_from_dict

from .pictures import COLOURS, picture, png

NAMES = list(COLOURS)


def data(*names: str) -> Dataset:
    return Dataset.from_list([{"image": png(name, size=(9, 6 + n)), "label": name} for n, name in enumerate(names)])


def fitted(**options: Any) -> ImageClassificationTask:
    task = ImageClassificationTask(**options)
    task.fit(data(*NAMES))
    return task


@pytest.fixture
def processor() -> Any:
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 4, "width": 4})


def test_images_are_prepared_batch_by_batch_and_not_before(processor: Any) -> None:
    task = fitted()
    encoded = task.encode(data("blue", "red"), processor, split="train")
    assert encoded.column_names == ["pixel_values", "labels"]
    assert encoded["pixel_values"][0]["bytes"] == png("blue", size=(9, 6))
    batch = task.collator(processor)(list(encoded))
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["labels"].tolist() == [0, 2]
    expected = processor(images=[picture("blue"), picture("red")], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)


def test_prediction_reads_no_label(processor: Any) -> None:
    task = fitted()
    for rows in (data("red").remove_columns("label"), data("red").map(lambda row: {"label": "violet"})):
        encoded = task.encode(rows, processor, split="predict")
        assert encoded.column_names == ["pixel_values"]
        assert set(task.collator(processor)(list(encoded))) == {"pixel_values"}


def test_metrics_and_answers_are_those_of_classification() -> None:
    task = fitted()
    assert task.labels == ["blue", "green", "red"]
    predictions = np.eye(3)[[0, 1, 1]] * 5
    assert task.metrics(predictions, np.array([0, 1, 2]))["accuracy"] == pytest.approx(2 / 3)
    assert [row["prediction"] for row in task.decode(predictions)] == ["blue", "green", "green"]
    assert task.model_kwargs()["id2label"] == {0: "blue", 1: "green", 2: "red"}
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(UserError, match="at least two different labels, but column 'label' holds only 'red'"):
        ImageClassificationTask().fit(data("red", "red"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": ""}, "option 'image' must be the name of a column"),
        ({"image": "label"}, "'image' and 'label' must name different columns"),
        ({"folder": 3}, "option 'folder' must be the path of a folder, got 3"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task("image_classification", **options)
