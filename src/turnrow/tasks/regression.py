"""Regression of a number on a text or a pair of texts."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from turnrow.errors import UserError
from turnrow.tasks.columns import describe_split, require_columns, value_column
from turnrow.tasks.sequence import SequenceTask, finite_logits

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["RegressionTask"]


@dataclass(kw_only=True)
class RegressionTask(SequenceTask):
    """A finite number for each text or pair; numbers may be written as text, as CSV files have them.

    Metrics: `pearson` and `spearman` correlation and `mse`, the mean squared error. A correlation is undefined where
    predictions or labels are constant, or where there is only one row; it is then reported as 0: such predictions say
    nothing about the labels.
    """

    name: ClassVar[str] = "regression"
    metric_names: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse")
    error_metrics: ClassVar[frozenset[str]] = frozenset({"mse"})

    mean: float | None = field(default=None, init=False, repr=False, compare=False)
    """Of the training labels; only a new head asks for it, so that it is not saved."""

    @property
    def start(self) -> float | None:
        """The mean of the training labels. From 0, few steps at a small learning rate do not even get there, and bend all else to it."""
        return self.mean

    def fit(self, train: Dataset) -> None:
        """Learn the mean of the training labels."""
        require_columns(train, self.columns(), "train")
        self.mean = float(np.mean(self._encode_labels(train, "train")))

    def model_kwargs(self) -> dict[str, Any]:
        """Ask for a head of one output, trained by the squared error."""
        return {"num_labels": 1, "problem_type": "regression"}

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score predictions of shape (rows, 1) against numbers of shape (rows,)."""
        from scipy.stats import pearsonr, spearmanr

        predicted = finite_logits(predictions, 1)[:, 0]
        expected = np.asarray(labels, dtype=np.float64).reshape(predicted.shape)
        return {
            "pearson": _correlation(pearsonr, predicted, expected),
            "spearman": _correlation(spearmanr, predicted, expected),
            "mse": float(np.mean((predicted - expected) ** 2)),
        }

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        """Return per row the number that the model predicts (`prediction`)."""
        return [{"prediction": float(value)} for value in finite_logits(predictions, 1)[:, 0]]

    def _encode_labels(self, data: Dataset, split: str) -> list[float]:
        values = value_column(data, self.label, split)
        numbers = [_finite_number(value) for value in values]
        for row, (value, number) in enumerate(zip(values, numbers, strict=True), start=1):
            if number is None:
                raise UserError(
                    f"{describe_split(data, split)}, row {row}: the label of a regression must be a finite number, got "
                    f"{value!r} ({type(value).__name__}) in column {self.label!r}"
                )
        return [number for number in numbers if number is not None]


def _finite_number(value: object) -> float | None:
    """Return the value as a float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _correlation(measure: Any, predicted: np.ndarray, expected: np.ndarray) -> float:
    if len(predicted) < 2:
        return 0.0
    with warnings.catch_warnings():
        # scipy warns of constant input and returns nan; what is reported instead is in the docstring of the task.
        warnings.simplefilter("ignore")
        value = float(measure(predicted, expected).statistic)
    return value if math.isfinite(value) else 0.0
