"""What a task is: the meeting place of a data set and a run, which knows neither the model nor the method.

A run uses a task in this order::

    task = make_task("classification", text=["sentence"], label="label")
    task.fit(train)                                    # learns what the data defines
    model = getattr(transformers, task.auto_model).from_pretrained(path, **task.model_kwargs())
    encoded = task.encode(test, tokenizer, max_length, split="test")
    ...                                                # Trainer(data_collator=task.collator(tokenizer),
                                                       #   preprocess_logits_for_metrics=task.reduce_logits)
    task.metrics(predictions, labels, encoded)
    task.decode(predictions, encoded)
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from turnrow.errors import UserError, near_matches

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self

__all__ = ["Task"]

_FORMAT_VERSION = 1


@dataclass(kw_only=True)
class Task(ABC):
    """One kind of task. A subclass is a dataclass: its fields are the options of the `task:` block of a recipe.

    How other kinds of task fit without a change here: `encode` may make several rows of one example (windows of a long
    context), different rows for `split="train"` than for the splits that are predicted (a prompt with, and without, its
    answer), and may add columns that no model reads (gold answers, offsets, the number of the example). The run hands
    the result of `encode` back as `encoded`, so that `metrics` and `decode` find those columns. `predictions` is what
    the run kept of the model's output: `reduce_logits` of the logits, or, where `generates` says so, an array of the
    texts that the model went on with.
    """

    name: ClassVar[str]
    """The name in a recipe."""
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    """The columns of an encoded split that are labels (`TrainingArguments.label_names`)."""
    metric_names: ClassVar[tuple[str, ...]]
    """All that `metrics` may report; the first is the main one, unless the recipe chooses another."""
    preparer: ClassVar[str] = "AutoTokenizer"
    """The Auto class of transformers for what makes a model's input of an example: a tokenizer, an image processor
    (``AutoImageProcessor``) or a processor that holds both (``AutoProcessor``). Wherever a tokenizer is spoken of here, it is that."""
    mean_loss: ClassVar[bool] = False
    """Whether the loss of `auto_model` is the mean over the rows of a batch (and not over all tokens of a step)."""
    error_metrics: ClassVar[frozenset[str]] = frozenset()
    """Those of `metric_names` of which less is better."""

    metric: str | None = None
    """The metric by which runs and checkpoints are compared; None: the first of `metric_names`."""

    dataset: str | None = dataclasses.field(default=None, init=False)
    """The name in `turnrow.tasks.CATALOG` by which the task was made, whose rows on the hub it understands too."""

    def __post_init__(self) -> None:
        if self.metric is not None and self.metric not in self.metric_names:
            raise UserError(
                f"task {self.name!r} has no metric {self.metric!r}; it has {', '.join(self.metric_names)}"
                f"{near_matches(str(self.metric), self.metric_names)}"
            )

    @property
    @abstractmethod
    def auto_model(self) -> str:
        """The Auto class of transformers that builds the model."""

    @property
    @abstractmethod
    def peft_task_type(self) -> str | None:
        """A `peft.TaskType`; None where peft has none that fits."""

    @property
    def main_metric(self) -> str:
        """The metric by which runs and checkpoints are compared."""
        return self.metric or self.metric_names[0]

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger main metric is a better one."""
        return self.main_metric not in self.error_metrics

    def in_our_form(self, data: Dataset) -> Dataset:
        """Return rows of the hub in the form of `columns`, where the task is one of the catalogue; others unchanged."""
        if self.dataset is None:
            return data
        from turnrow.tasks.catalog import CATALOG

        return CATALOG[self.dataset].in_our_form(data)

    @property
    def class_column(self) -> str | None:
        """The column of the class, by which few-shot examples are drawn; None: there are no classes."""
        return None

    @property
    def settles(self) -> bool:
        """Whether something of the task is chosen on the validation split once training is done; see `settle`."""
        return False

    @property
    def start(self) -> float | None:
        """What a new head is to answer before it has learned anything, where that is one number: see `RegressionTask`. Call `fit` first."""
        return None

    @abstractmethod
    def columns(self) -> list[str]:
        """Return the columns that a labelled split must have."""

    @abstractmethod
    def input_columns(self) -> list[str]:
        """Return the columns that prediction needs, without the labels."""

    @abstractmethod
    def fit(self, train: Dataset) -> None:
        """Learn from the training split what the data defines, such as the labels.

        Raises:
            UserError: the split is empty, or lacks a column or a value.
        """

    @abstractmethod
    def model_kwargs(self) -> dict[str, Any]:
        """Return what `auto_model.from_pretrained` must know. Call `fit` first."""

    @abstractmethod
    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, split: str
    ) -> Dataset:
        """Turn a split into what the model reads: input_ids, attention_mask, ... and the columns of `label_names`.

        Args:
            data: rows with `columns()`.
            tokenizer: the model's; never changed here.
            max_length: tokens per row, special ones included; None: see `turnrow.tasks.resolve_max_length`.
            split: named in errors. Of `"predict"` no label is read, and none is in the result.

        Raises:
            UserError: the split is empty, or a column, a value or a label is missing or wrong; with the row, from 1.
        """

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Any]:
        """Return what makes a batch of encoded rows. Gives the tokenizer a pad token if it has none."""

    def reduce_logits(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """Keep of a batch's output what `metrics` and `decode` need (Trainer's `preprocess_logits_for_metrics`).

        Here the logits: encoder-decoders also return hidden states, which would fill the memory over a whole split.
        """
        return logits[0] if isinstance(logits, tuple) else logits

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """Return the loss of a batch, in place of the model's own; None: the model's own is right.

        Args:
            logits: as the model returned them.
            labels: as `encode` made them.
        """
        return None

    def generates(self, split: str) -> bool:
        """Whether the model goes on with the rows of `split` (`predict` among them) instead of being read at once."""
        return False

    def generation_options(self) -> dict[str, Any]:
        """Return how the model goes on, in the words of transformers' GenerationConfig, where `generates` says so."""
        return {}

    def prediction_length(self, max_length: int, positions: int | None) -> int:
        """Return the `max_length` to encode a split to be predicted with, given that of the other splits.

        Args:
            max_length: as of `encode`.
            positions: how many tokens the model can take in; None: it does not say.

        Raises:
            UserError: the model can take in no row that is to be predicted.
        """
        return max_length

    @abstractmethod
    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score predictions by name of metric.

        Args:
            predictions: one entry per row of the encoded split.
            labels: the labels of these rows.
            encoded: what `encode` returned, for tasks whose columns hold what scoring needs.
        """

    @abstractmethod
    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        """Return for each example a JSON object: its `prediction` in terms of the data, and a score if it has one."""

    def settle(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset) -> None:
        """Choose what `settles` speaks of, such as a threshold, by the encoded validation split and its predictions."""
        raise NotImplementedError(f"the task {self.name!r} chooses nothing once training is done")

    def to_dict(self) -> dict[str, Any]:
        """Return all that `turnrow.tasks.task_from_dict` needs to make this task again, as JSON can hold it."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        return {
            "version": _FORMAT_VERSION,
            "name": self.name,
            "dataset": self.dataset,
            "options": options,
            "learned": self._learned(),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Make the task of this class that `to_dict` described.

        Raises:
            UserError: the description is broken, or was written by a later version of turnrow.
        """
        if saved.get("version") != _FORMAT_VERSION:
            raise UserError(
                f"the saved task has format version {saved.get('version')!r}, this turnrow reads {_FORMAT_VERSION}; "
                "a higher number comes from a later turnrow: upgrade it"
            )
        options, learned = saved.get("options"), saved.get("learned")
        if not isinstance(options, Mapping) or not isinstance(learned, Mapping):
            raise UserError(f"the saved task {cls.name!r} is broken: 'options' and 'learned' must be objects")
        task = cls.from_options(options)
        # A data set that a later turnrow knows and this one does not was only of use for the form of its rows.
        from turnrow.tasks.catalog import CATALOG

        dataset = saved.get("dataset")
        task.dataset = dataset if dataset in CATALOG else None
        task._restore(learned)
        return task

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make a task from its options by name.

        Raises:
            UserError: an option is unknown or missing, or its value is wrong.
        """
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for option in options:
            if option not in fields:
                raise UserError(
                    f"task {cls.name!r} has no option {option!r}; it has {', '.join(fields)}"
                    f"{near_matches(str(option), fields)}"
                )
        for option, field in fields.items():
            if option not in options and field.default is field.default_factory is dataclasses.MISSING:
                raise UserError(f"task {cls.name!r} needs the option {option!r}; its options are {', '.join(fields)}")
        return cls(**options)

    def _learned(self) -> dict[str, Any]:
        """What `fit` learned, as JSON can hold it."""
        return {}

    def _restore(self, learned: Mapping[str, Any]) -> None:
        """Take back what `_learned` returned."""
        if learned:
            raise UserError(
                f"the saved task {self.name!r} is broken: it learns nothing, but {dict(learned)!r} was saved"
            )
