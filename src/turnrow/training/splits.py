"""The splits of a run: read from where the recipe says, in the form of the task, and few-shot where it asks for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from turnrow.errors import UserError
from turnrow.tasks import Task, draw_few_shot, read_table
from turnrow.training.options import check_options

if TYPE_CHECKING:
    from turnrow.training.recipe import Recipe

__all__ = ["FewShot", "read_split", "read_splits", "read_training"]


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """The section ``data.few_shot``: train on a few rows of each class.

    Raises:
        UserError: a value out of range.
    """

    k: int
    """Rows of each class."""
    seed: int | None = None
    """Decides which; by default the recipe's."""
    validation: bool = False
    """Draw as many other rows of the training split for validation, in place of a split of its own."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"data.few_shot.k is {self.k!r}; expected an integer from 1")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"data.few_shot.seed is {self.seed!r}; expected an integer from 0")

    @classmethod
    def from_dict(cls, section: Any) -> FewShot:
        """Read the section of a recipe."""
        if not isinstance(section, Mapping) or "k" not in section:
            raise UserError(f"data.few_shot is {section!r}; expected a mapping with k, such as {{k: 16, seed: 42}}")
        return cls(**check_options(section, cls, "data.few_shot"))


def read_splits(recipe: Recipe, task: Task) -> dict[str, Dataset]:
    """Read the splits of a run in the form of `task`.

    Raises:
        UserError: a split cannot be read, or has too few rows of a class.
    """
    tables = read_training(recipe, task)
    others = {name: read_split(recipe, task, name) for name in recipe.data.splits if name not in tables}
    return tables | others


def read_training(recipe: Recipe, task: Task) -> dict[str, Dataset]:
    """Read the training split alone, with the validation split if that is drawn from it."""
    whole = read_split(recipe, task, "train")
    if recipe.data.few_shot is None:
        return {"train": whole}
    asked = FewShot.from_dict(recipe.data.few_shot)
    seed = recipe.seed if asked.seed is None else asked.seed
    train, validation = draw_few_shot(whole, task, asked.k, seed, validation=asked.validation)
    return {"train": train} if validation is None else {"train": train, "validation": validation}


def read_split(recipe: Recipe, task: Task, name: str) -> Dataset:
    """Read one split that the recipe names, whole, in the form of `task`."""
    return task.in_our_form(read_table(recipe.data.splits[name], name))
