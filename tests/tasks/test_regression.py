from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr

from turnrow.errors import UserError
from turnrow.tasks import RegressionTask, read_table

TASK = RegressionTask(text="sentence")


def data(labels: list[Any]) -> Dataset:
    return Dataset.from_dict({"sentence": ["a cat"] * len(labels), "label": labels})


@pytest.mark.parametrize("labels", [[0.5, 3.0], [1, 0], ["0.5", " -2e3 "]])
def test_labels_are_numbers_also_written_as_text(tiny_tokenizer: Any, labels: list[Any]) -> None:
    TASK.fit(data(labels))
    assert TASK.encode(data(labels), tiny_tokenizer, split="train")["labels"][:] == [float(label) for label in labels]


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([1.0, float("nan")], "nan (float)"),
        ([1.0, float("-inf")], "-inf (float)"),
        (["1", "inf"], "'inf' (str)"),
        (["1", "good"], "'good' (str)"),
        (["1", ""], "'' (str)"),
        ([[1.0], [2.0]], "[1.0] (list)"),
        ([True, False], "True (bool)"),
    ],
)
def test_label_that_is_no_finite_number_is_refused_with_its_row(
    tiny_tokenizer: Any, labels: list[Any], shown: str
) -> None:
    row = 2 if len(set(map(type, labels))) == 1 and str(labels[0]) in ("1", "1.0") else 1
    message = f"row {row}: the label of a regression must be a finite number, got {re.escape(shown)} in column 'label'"
    with pytest.raises(UserError, match=f"split 'train', {message}"):
        TASK.fit(data(labels))
    with pytest.raises(UserError, match=f"split 'test', {message}"):
        TASK.encode(data(labels), tiny_tokenizer, split="test")


def test_model_is_told_of_one_number() -> None:
    assert TASK.model_kwargs() == {"num_labels": 1, "problem_type": "regression"}


def test_metrics_checked_by_hand() -> None:
    scores = TASK.metrics(np.array([[1.0], [2.0], [3.0]]), np.array([2.0, 4.0, 6.0]))
    assert scores == pytest.approx({"pearson": 1.0, "spearman": 1.0, "mse": 14 / 3})


def test_metrics_are_scipys() -> None:
    generator = np.random.default_rng(0)
    predicted, labels = generator.normal(size=(2, 50)).astype(np.float32)
    scores = TASK.metrics(predicted[:, None], labels)
    assert scores["pearson"] == pytest.approx(pearsonr(predicted, labels).statistic, abs=1e-6)
    assert scores["spearman"] == pytest.approx(spearmanr(predicted, labels).statistic)
    assert scores["mse"] == pytest.approx(np.mean((predicted - labels) ** 2))


@pytest.mark.parametrize(
    ("predicted", "labels", "mse"),
    [
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 2 / 3),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], 2 / 3),
        ([2.0, 2.0], [2.0, 2.0], 0.0),
        ([1.0], [3.0], 4.0),
    ],
)
def test_correlation_with_a_constant_is_reported_as_0_without_a_warning(
    predicted: list[float], labels: list[float], mse: float
) -> None:
    scores = TASK.metrics(np.array(predicted)[:, None], np.array(labels))
    assert scores == {"pearson": 0.0, "spearman": 0.0, "mse": pytest.approx(mse)}


def test_nearly_constant_predictions_give_no_warning() -> None:
    scores = TASK.metrics(np.array([[1e6], [1e6 + 1e-10], [1e6]]), np.array([1.0, 2.0, 3.0]))
    assert -1 <= scores["pearson"] <= 1


def test_decoded_prediction_is_the_number() -> None:
    assert TASK.decode(np.array([[1.5], [-2.0]], dtype=np.float32)) == [{"prediction": 1.5}, {"prediction": -2.0}]


def test_real_data(real_data: Callable[[str, str], Path], tiny_tokenizer: Any) -> None:
    task = RegressionTask(text=["sentence1", "sentence2"])
    task.fit(read_table(real_data("stsb", "train")))
    test = read_table(real_data("stsb", "test"))
    encoded = task.encode(test, tiny_tokenizer, 64, split="test")
    labels = np.array(encoded["labels"])
    assert labels.min() == 0.0
    assert labels.max() == 5.0
    assert task.metrics(labels[:, None], labels) == pytest.approx({"pearson": 1.0, "spearman": 1.0, "mse": 0.0})
