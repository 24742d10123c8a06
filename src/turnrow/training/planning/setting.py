"""What all methods of a plan share: the base without its weights, the inputs, precision and checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import cached_file

from turnrow.errors import UserError
from turnrow.pretrained import resolve_model
from turnrow.selection import needs_data
from turnrow.tasks import Task, make_task, read_table
from turnrow.training.arguments import training_arguments
from turnrow.training.base import Base, checked_config, input_limit, load_tokenizer, position_limit
from turnrow.training.planning.quantized import quantize_skeleton
from turnrow.training.precision import precision, precision_name
from turnrow.training.recipe import Recipe
from turnrow.training.skeleton import Skeleton, load_skeleton

__all__ = ["Setting"]

_DEFAULT_SEQUENCE = 512
# By the class of the model: whether its labels are one a token, or one a row.
_LABEL_A_TOKEN = {
    "AutoModelForSequenceClassification": False,
    "AutoModelForQuestionAnswering": False,
    "AutoModelForCausalLM": True,
    "AutoModelForMaskedLM": True,
    "AutoModelForSeq2SeqLM": True,
}


@dataclass(frozen=True)
class Setting:
    """A recipe's base and step, without weights and data."""

    args: TrainingArguments
    task: Task
    skeleton: Skeleton
    quantization: str | Mapping[str, Any] | None
    """As of `Recipe.quantization`."""
    sequence: int
    """Tokens a row."""
    notes: tuple[str, ...]
    """What had to be assumed."""

    @classmethod
    def of(cls, recipe: Recipe, sequence: int | None) -> Setting:
        """Read what the recipe names, as far as it is there.

        Args:
            recipe: its training split is read for the labels if it is a local file.
            sequence: tokens a row; None: the longest input that the run would not cut.

        Raises:
            UserError: the recipe's arguments, model, labels or task cannot be used, or `sequence` is out of range.
        """
        task = make_task(**recipe.task)
        if task.auto_model not in _LABEL_A_TOKEN:
            raise UserError(f"plan knows the inputs of models of text, not those of the task {task.name!r}")
        # As a run builds them; nothing is written there.
        args = training_arguments(recipe, task, recipe.output_dir)
        head, notes = _head(task, recipe.data.splits["train"])
        changes = checked_config(recipe.model, resolve_model(recipe.model), recipe.model_config or {})
        skeleton = load_skeleton(recipe.model, task.auto_model, {**head, **changes}, dtype=recipe.dtype)
        tokens, more = _sequence(sequence, recipe, skeleton)
        if skeleton.model.config.pad_token_id is None:
            # Any will do: there are no tokens.
            skeleton.model.config.pad_token_id = 0
        return cls(args, task, skeleton, recipe.quantization, tokens, (*notes, *more, *_unplanned(recipe)))

    def base_for(self, method: Mapping[str, Any]) -> Skeleton:
        """A copy of the base for one method, quantized but for full fine-tuning, which trains every weight.

        Raises:
            UserError: the bytes of the quantization are not known.
        """
        base = Skeleton(copy.deepcopy(self.skeleton.model), self.skeleton.new_modules)
        if method["name"] != "full":
            quantize_skeleton(base, self.quantization)
        return base

    @property
    def device(self) -> torch.device:
        """Where the run would be on this machine."""
        return torch.device(self.args.device)

    @property
    def labels(self) -> int | None:
        """Outputs of the head; None of a model that has no head of its own for the task."""
        if self.task.auto_model != "AutoModelForSequenceClassification":
            return None
        return int(self.skeleton.model.config.num_labels or 0)

    @property
    def precision_name(self) -> str:
        """Of the forward."""
        return precision_name(self.args)

    def precision(self) -> AbstractContextManager:
        """The context in which Trainer runs a forward."""
        return precision(self.args)

    def inputs(self, batch: int) -> Mapping[str, Tensor]:
        """A batch of full rows, with a mask, as if some row were shorter."""
        size = (batch, self.sequence)
        regression = self.skeleton.model.config.problem_type == "regression"
        dtype = torch.float32 if regression else torch.long
        labels = torch.zeros(size if _LABEL_A_TOKEN[self.task.auto_model] else batch, dtype=dtype, device=self.device)
        return {
            "input_ids": torch.zeros(size, dtype=torch.long, device=self.device),
            "attention_mask": torch.ones(size, dtype=torch.long, device=self.device),
            **dict.fromkeys(self.task.label_names, labels),
        }

    def prepare(self, model: PreTrainedModel | Any) -> None:
        """Set a model up for training as Trainer does."""
        model.config.use_cache = self.args.use_cache
        model.train()
        if not self.args.gradient_checkpointing:
            return
        try:
            # transformers renamed it after 5.6; there, the former names hold the same values.
            if hasattr(model, "activation_checkpointing_enable"):
                given: Any = self.args.activation_checkpointing_kwargs
                options = dict(given or {})
                extra = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
                model.activation_checkpointing_enable(options or None, **extra)
            else:
                model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        except ValueError as error:
            raise UserError(f"training: {error}") from None


def _head(task: Task, train: str) -> tuple[dict[str, Any], list[str]]:
    """The settings of the model's head, and what was assumed of them."""
    if task.name != "classification":
        return task.model_kwargs(), []
    if not Path(train).is_file():
        return {"num_labels": 2}, [f"2 labels: the training split {train!r} is no local file"]
    task.fit(task.in_our_form(read_table(train, "train")))
    return task.model_kwargs(), []


def _unplanned(recipe: Recipe) -> list[str]:
    """What the run would do beside its steps, or in another way than the plan takes it."""
    notes = []
    if needs_data(str(recipe.method.get("selection"))):
        notes.append("the selection is made already: the pass over calibration data is not in the forecast")
    if recipe.reselection is not None:
        notes.append("nothing is selected anew: neither the scoring nor what was settled is in the forecast")
    if recipe.quantization is not None:
        notes.append(
            "quantized weights are unpacked whole, one layer at a time; full fine-tuning is of the base as it is"
        )
    return notes


def _sequence(given: int | None, recipe: Recipe, skeleton: Skeleton) -> tuple[int, list[str]]:
    """Tokens a row, and what was assumed of them."""
    positions = position_limit(skeleton.model)
    wanted = recipe.max_length if given is None else given
    if wanted is not None:
        if wanted < 1 or (positions is not None and wanted > positions):
            what = "max_length" if given is None else "sequence"
            raise UserError(f"{what} is {wanted}; expected 1 to {positions or 'any number of'} tokens a row")
        return wanted, []
    location = resolve_model(recipe.model)
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(location, "tokenizer_config.json", **quiet):
        limit = input_limit(None, Base(skeleton.model, load_tokenizer(location), ()))
        assert limit is not None  # which it is of images alone
        return limit, []
    tokens = positions or _DEFAULT_SEQUENCE
    return tokens, [f"{tokens:,} tokens a row, what the model allows: there is no tokenizer that says less"]
