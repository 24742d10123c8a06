"""The interface: options, what goes to disk, and that a task of another shape fits it without a change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset

from turnrow.errors import UserError
from turnrow.tasks import Task, make_task, task_from_dict
from turnrow.tasks.columns import require_columns

TRAIN = Dataset.from_dict({"sentence": ["good film", "bad film"], "other": ["a", "b"], "label": [1, 0]})


def saved(**changes: Any) -> dict[str, Any]:
    task = make_task("classification", text="sentence")
    task.fit(TRAIN)
    return {**task.to_dict(), **changes}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("classification", {"text": "sentence"}),
        ("classification", {"text": ["sentence", "other"], "label": "label", "metric": "f1"}),
        ("regression", {"text": ["sentence"], "metric": "mse"}),
    ],
)
def test_a_fitted_task_survives_json(name: str, options: dict[str, Any]) -> None:
    task = make_task(name, **options)
    task.fit(TRAIN)
    restored = task_from_dict(json.loads(json.dumps(task.to_dict())))
    assert restored == task
    assert restored.model_kwargs() == task.model_kwargs()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "unknown task None; tasks are classification, "),
        (saved(version=2), "format version 2, this turnrow reads 1; a higher number comes from a later turnrow"),
        (saved(options=None), "saved task 'classification' is broken: 'options' and 'learned' must be objects"),
        (saved(options={"text": "sentence", "txt": 1}), "task 'classification' has no option 'txt'"),
        (saved(learned={}), "saved task 'classification' is broken: 'labels' must be a list of labels, got None"),
        (saved(learned={"labels": [0.5]}), "'labels' must be a list of labels, got \\[0.5\\]"),
        (saved(name="regression"), "saved task 'regression' is broken: it learns nothing, but {'labels'"),
    ],
)
def test_broken_description_is_refused(description: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_from_dict(description)


def test_unknown_task_lists_those_there_are() -> None:
    with pytest.raises(
        UserError, match=r"unknown task 'clasification'; tasks are .*; did you mean 'classification' or "
    ):
        make_task("clasification", text="sentence")


def test_unknown_option_lists_those_there_are() -> None:
    with pytest.raises(
        UserError, match=r"'regression' has no option 'lable'; it has metric, text, label; did you mean 'label'\?"
    ):
        make_task("regression", text="sentence", lable="score")


def test_missing_option_is_named() -> None:
    with pytest.raises(UserError, match="task 'classification' needs the option 'text'; its options are"):
        make_task("classification", label="label")


@pytest.mark.parametrize("name", ["classification", "regression"])
def test_unknown_metric_lists_those_there_are(name: str) -> None:
    with pytest.raises(UserError, match=f"task '{name}' has no metric 'perplexity'; it has "):
        make_task(name, text="sentence", metric="perplexity")


def test_unknown_metric_suggests_a_near_one() -> None:
    with pytest.raises(UserError, match=r"did you mean 'matthews_correlation'\?"):
        make_task("classification", text="sentence", metric="mathews_correlation")


def test_main_metric_is_the_recipes_choice_and_knows_its_direction() -> None:
    assert make_task("classification", text="s").main_metric == "accuracy"
    assert make_task("classification", text="s", metric="matthews_correlation").main_metric == "matthews_correlation"
    assert make_task("regression", text="s").greater_is_better
    assert not make_task("regression", text="s", metric="mse").greater_is_better


def test_of_several_outputs_the_logits_are_kept() -> None:
    task, logits = make_task("regression", text="s"), torch.ones(2, 1)
    assert task.reduce_logits((logits, torch.ones(2, 9, 9)), logits) is logits
    assert task.reduce_logits(logits, logits) is logits


@dataclass(kw_only=True)
class LongestWindow(Task):
    """A toy in the shape of question answering: many encoded rows per example, several label columns, gold text."""

    name: ClassVar[str] = "window"
    auto_model = "AutoModelForQuestionAnswering"
    peft_task_type = "QUESTION_ANS"
    label_names: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions")
    metric_names: ClassVar[tuple[str, ...]] = ("exact_match",)

    width: int = 3

    def columns(self) -> list[str]:
        return ["context", "answer"]

    def input_columns(self) -> list[str]:
        return ["context"]

    def fit(self, train: Dataset) -> None:
        require_columns(train, self.columns(), "train")

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def encode(self, data: Dataset, tokenizer: Any, max_length: int | None = None, *, split: str) -> Dataset:
        rows = []
        for example, row in enumerate(data):
            words = row["context"].split()
            for first in range(0, len(words), self.width):
                window = words[first : first + self.width]
                rows.append({"example": example, "words": window, "answer": row["answer"]})
        return Dataset.from_list(rows)

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
        return list

    def reduce_logits(self, logits: Any, labels: Any) -> torch.Tensor:
        return torch.stack(logits, dim=-1)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        assert encoded is not None
        gold = {row["example"]: row["answer"] for row in encoded}
        decoded = self.decode(predictions, encoded)
        return {"exact_match": float(np.mean([row["prediction"] == gold[n] for n, row in enumerate(decoded)]))}

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        assert encoded is not None
        best: dict[int, dict[str, Any]] = {}
        for logits, row in zip(predictions, encoded, strict=True):
            start, end = logits.argmax(axis=0)
            found = {"prediction": " ".join(row["words"][start : end + 1]), "score": float(logits.max(axis=0).sum())}
            if found["score"] > best.get(row["example"], found | {"score": -np.inf})["score"]:
                best[row["example"]] = found
        return [best[example] for example in sorted(best)]


def test_a_task_with_windows_and_two_labels_fits_the_interface() -> None:
    data = Dataset.from_list(
        [{"context": "the cat sat on the house", "answer": "the house"}, {"context": "a dog ran", "answer": "dog"}]
    )
    task = LongestWindow.from_dict(LongestWindow(width=3).to_dict())
    encoded = task.encode(data, None, split="test")
    start = torch.tensor([[1.0, 0, 0], [0, 3, 0], [0, 1, 0]])  # window of three words, three windows
    end = torch.tensor([[1.0, 0, 0], [0, 0, 3], [0, 1, 0]])
    predictions = task.reduce_logits((start, end), None).numpy()
    assert task.decode(predictions, encoded) == [
        {"prediction": "the house", "score": 6.0},
        {"prediction": "dog", "score": 2.0},
    ]
    assert task.metrics(predictions, np.empty(0), encoded) == {"exact_match": 1.0}
