"""Tasks whose answer is one of the classes that the training split has: what all of them share, whatever the model reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from turnrow.errors import UserError, near_matches
from turnrow.tasks.columns import check_name, describe_split, require_columns, value_column
from turnrow.tasks.sequence import finite_logits
from turnrow.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ClassTask", "Label"]

Label = int | str | bool

# So many labels are listed in an error before the rest is counted.
_LISTED_LABELS = 20


@dataclass(kw_only=True)
class ClassTask(Task):
    """One of the labels that the training split has.

    Labels are integers, text or booleans, and are compared as text, so that the 1 of a JSON file is the 1 of a CSV file.
    Integers, also those written as text, are numbered in numeric order and all others in the order of their text, so
    that the numbering does not depend on the order of the rows.

    Metrics: `accuracy`; `f1_macro`, the mean over the classes that occur among labels or predictions; with two classes
    `f1` of the second (`1`, `True`, ...); `matthews_correlation`. A value that is undefined, because only one class
    occurs or one is never predicted, counts as 0, as in scikit-learn.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "f1_macro", "matthews_correlation")
    mean_loss: ClassVar[bool] = True

    label: str = "label"
    """The column of the label."""
    labels: list[Label] = field(default_factory=list, init=False)
    """The labels in the order of their numbers; `fit` fills it."""

    def __post_init__(self) -> None:
        check_name(self.label, "label")
        super().__post_init__()

    @property
    def class_column(self) -> str:
        """The column of the label."""
        return self.label

    def fit(self, train: Dataset) -> None:
        """Learn the labels of the training split and number them."""
        require_columns(train, self.columns(), "train")
        self._take_labels(sorted(set(self._label_values(train, "train")), key=str), describe_split(train, "train"))

    def model_kwargs(self) -> dict[str, Any]:
        """Return the number and names of the labels, for a head of one output each."""
        names = [str(label) for label in self._known_labels()]
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score logits of shape (rows, labels) against label numbers of shape (rows,)."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        classes = len(self._known_labels())
        predicted = finite_logits(predictions, classes).argmax(axis=1)
        scores = {
            "accuracy": accuracy_score(labels, predicted),
            "f1_macro": f1_score(labels, predicted, average="macro", zero_division=0),
            # scikit-learn too gives 0 where only one class occurs, but with a warning.
            "matthews_correlation": matthews_corrcoef(labels, predicted) if len({*labels, *predicted}) > 1 else 0.0,
        }
        if classes == 2:
            scores["f1"] = f1_score(labels, predicted, pos_label=1, zero_division=0)
        return {name: float(scores[name]) for name in self.metric_names if name in scores}

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        """Return per row the label as the data has it (`prediction`) and the model's `probability` of it."""
        from scipy.special import softmax

        known = self._known_labels()
        probabilities = softmax(finite_logits(predictions, len(known)), axis=1)
        return [
            {"prediction": known[number], "probability": float(row[number])}
            for number, row in zip(probabilities.argmax(axis=1), probabilities, strict=True)
        ]

    def _encode_labels(self, data: Dataset, split: str) -> list[int]:
        known = self._known_labels()
        names = [str(label) for label in known]
        numbers = {name: number for number, name in enumerate(names)}
        values = self._label_values(data, split)
        for row, value in enumerate(values, start=1):
            if str(value) not in numbers:
                listed = ", ".join(repr(label) for label in known[:_LISTED_LABELS])
                rest = f" and {len(known) - _LISTED_LABELS} more" if len(known) > _LISTED_LABELS else ""
                raise UserError(
                    f"{describe_split(data, split)}, row {row}: label {value!r} in column {self.label!r} was not seen in "
                    f"training; known labels are {listed}{rest}{near_matches(str(value), names)}"
                )
        return [numbers[str(value)] for value in values]

    def _label_values(self, data: Dataset, split: str) -> list[Label]:
        values = value_column(data, self.label, split)
        for row, value in enumerate(values, start=1):
            if not isinstance(value, Label) or not str(value).strip():
                raise UserError(
                    f"{describe_split(data, split)}, row {row}: a label must be an integer, a text or a boolean, got "
                    f"{value!r} ({type(value).__name__}) in column {self.label!r}; numbers with fractions are the "
                    "labels of the task 'regression'"
                )
        return values

    def _take_labels(self, labels: list[Label], place: str) -> None:
        if len(labels) < 2:
            raise UserError(
                f"{place}: classification needs at least two different labels, but column {self.label!r} holds only "
                f"{', '.join(map(repr, labels))}"
            )
        if self.metric == "f1" and len(labels) != 2:
            raise UserError(
                f"{place}: metric 'f1' is for two classes, and column {self.label!r} holds {len(labels)}; "
                "choose 'f1_macro'"
            )
        if all(map(_is_integer, labels)):
            labels = sorted(labels, key=lambda label: (int(label), str(label)))
        self.labels = labels

    def _known_labels(self) -> list[Label]:
        if not self.labels:
            raise RuntimeError("the task knows no labels yet: call fit on the training split first")
        return self.labels

    def _learned(self) -> dict[str, Any]:
        return {"labels": list(self.labels)}

    def _restore(self, learned: Mapping[str, Any]) -> None:
        labels = learned.get("labels")
        if not isinstance(labels, list) or not all(isinstance(label, Label) for label in labels):
            raise UserError(
                f"the saved task {self.name!r} is broken: 'labels' must be a list of labels, got {labels!r}"
            )
        self.labels = labels


def _is_integer(label: Label) -> bool:
    if isinstance(label, str):
        return label.lstrip("-").isdecimal() and label.count("-") <= 1
    return not isinstance(label, bool)
