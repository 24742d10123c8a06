"""Re-selection during a run: every n steps other rows or columns are trained, and what was learned stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from turnrow.errors import UserError
from turnrow.training.batches import collated
from turnrow.training.options import check_names
from turnrow.tuners import check_reselection, move_optimizer_state, reselect

__all__ = ["Reselect", "Reselection"]


@dataclass(frozen=True, kw_only=True)
class Reselection:
    """The section ``reselection`` of a recipe."""

    every: int
    """Steps between two choices."""
    strategy: str = "gradient"
    """``gradient``, ``fisher`` or ``cycle``."""
    budget: int | None = None
    """The most rows or columns of a module that are trained over time; None sets no limit."""
    samples: int = 64
    """Training rows that a choice by gradient looks at, drawn anew each time."""

    @classmethod
    def from_dict(cls, values: Any, method: Mapping[str, Any]) -> Reselection:
        """Read and check the section.

        Raises:
            UserError: an unknown name, a value out of range, or a method that does not go with it.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"reselection is {values!r}; expected a mapping such as {{every: 100, strategy: gradient}}")
        check_names(values, [f.name for f in fields(cls)], "reselection")
        if "every" not in values:
            raise UserError("reselection.every is missing: after how many steps are other rows or columns chosen?")
        for name in ("every", "budget", "samples"):
            value = values.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"reselection.{name} is {value!r}; expected a whole number of 1 or more")
        section = cls(**values)
        if method["name"] != "rocoft":
            raise UserError(f"reselection is for method rocoft; the recipe's method is {method['name']!r}")
        from turnrow import RocoftConfig

        config = RocoftConfig(**{name: value for name, value in method.items() if name != "name"})
        check_reselection(config, section.strategy, section.budget)
        return section


class Reselect(TrainerCallback):
    """Chooses anew at the end of every n-th step, and lets the optimizer's state follow.

    A choice depends on the adapter, the seed and the number of the step alone, so a resumed run makes the same ones.

    Args:
        settings: the recipe's section.
        rows: the encoded training split, with the columns that the model takes.
        collate: makes a batch of rows.
        batch_size: rows in a batch.
        seed: with the step it decides which rows are looked at.
    """

    def __init__(
        self,
        settings: Reselection,
        rows: Dataset,
        collate: Callable[[list[dict[str, Any]]], Any],
        batch_size: int,
        seed: int,
    ) -> None:
        self.settings = settings
        self._rows, self._collate, self._batch_size, self._seed = rows, collate, batch_size, seed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse several processes: each would have to choose the same."""
        if args.world_size > 1:
            raise UserError(f"reselection works in one process; this run has {args.world_size}")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Choose anew, but for the last step, after which nothing would be trained."""
        if state.global_step % self.settings.every or state.global_step >= state.max_steps:
            return
        moves = reselect(
            model,
            None if self.settings.strategy == "cycle" else self._batches(state.global_step),
            strategy=self.settings.strategy,
            budget=self.settings.budget,
        )
        move_optimizer_state(getattr(optimizer, "optimizer", optimizer), moves)

    def _batches(self, step: int) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        chosen = torch.randperm(len(self._rows), generator=generator)[: self.settings.samples].tolist()
        return list(collated(self._rows.select(chosen), self._collate, self._batch_size))
