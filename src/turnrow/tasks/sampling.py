"""Few-shot splits: k examples of each class, drawn by a seed (Gao et al. 2021, LM-BFF, section 3).

The rows of a class are ordered by the SHA-256 of the seed and of what the model reads of them, and the first k are taken. So a draw
depends on neither the order of the rows, nor columns that the task does not read, nor the platform or the version of a random number
generator. It is not the draw of LM-BFF's own script, which shuffles the lines of its files.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from turnrow.errors import UserError
from turnrow.tasks.columns import describe_split, require_columns, value_column
from turnrow.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["FEW_SHOT_SEEDS", "draw_few_shot"]

FEW_SHOT_SEEDS = (13, 21, 42, 87, 100)
"""Those of LM-BFF and of what follows its protocol, with k = 16."""


def draw_few_shot(
    data: Dataset,
    task: Task,
    k: int,
    seed: int,
    *,
    validation: bool = False,
    split: str = "train",
    option: str = "few_shot.k",
) -> tuple[Dataset, Dataset | None]:
    """Draw k rows of each class, and as many others for validation if asked.

    Rows that are equal in all that the model reads count as one, so that no example is in both splits, and are left out where they
    are of different classes. The rows come class by class, in the order that they were drawn in.

    Args:
        data: the whole training split, in our form.
        task: says what is read, and which column holds the class.
        k: rows of each class in each of the splits.
        seed: another one gives another draw.
        validation: whether to draw a validation split too.
        split: named in errors.
        option: what the user called k, for errors.

    Returns:
        The training split and the validation split, if any.

    Raises:
        UserError: the task has no classes, or some class has too few rows (each such with its number).
    """
    column = task.class_column
    if column is None:
        raise UserError(
            f"few-shot rows are drawn by class, and the task {task.name!r} has no classes; leave out data.few_shot"
        )
    require_columns(data, task.columns(), split)
    drawn = _ordered(data, task.input_columns(), value_column(data, column, split), seed)
    needed = 2 * k if validation else k
    if short := {name: len(rows) for name, rows in drawn.items() if len(rows) < needed}:
        raise UserError(
            f"{describe_split(data, split)}: {needed} different rows of each class are needed"
            f"{f' ({k} to train on, {k} for validation)' if validation else ''}, but there are "
            + ", ".join(f"{count} of class {name!r}" for name, count in short.items())
            + f"; lower {option}"
        )
    parts = [data.select([row for rows in drawn.values() for row in rows[part : part + k]]) for part in (0, k)]
    return parts[0], parts[1] if validation else None


def _ordered(data: Dataset, columns: list[str], classes: list[Any], seed: int) -> dict[str, list[int]]:
    """The different rows of each class in the order of their hashes; classes in the order of their names."""
    firsts: dict[str, int] = {}
    names: dict[str, set[str]] = {}
    for row, (values, name) in enumerate(zip(_plain(data.select_columns(columns)), classes, strict=True)):
        digest = _digest(seed, [values[column] for column in columns])
        firsts.setdefault(digest, row)
        names.setdefault(digest, set()).add(str(name))
    drawn: dict[str, list[int]] = {name: [] for name in sorted({str(name) for name in classes})}
    for digest in sorted(firsts):
        # What stands there with several classes is an example of none.
        if len(names[digest]) == 1:
            drawn[min(names[digest])].append(firsts[digest])
    return drawn


def _digest(seed: int, values: list[Any]) -> str:
    held = hashlib.sha256(f"{seed}:".encode())
    for value in values:
        held.update(json.dumps(value, ensure_ascii=False, sort_keys=True, default=_of_bytes).encode("utf-8", "replace"))
    return held.hexdigest()


def _of_bytes(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()


def _plain(data: Dataset) -> Dataset:
    """Images as their files, not decoded."""
    from datasets import Image

    held = data.with_format(None)
    for name, feature in data.features.items():
        if isinstance(feature, Image):
            held = held.cast_column(name, Image(decode=False))
    return held
