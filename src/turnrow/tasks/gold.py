"""The answers that predictions are scored against: one to a row, or a list of which any will do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from turnrow.errors import UserError
from turnrow.tasks.columns import describe_split, value_column

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["check_golds", "golds", "share"]

T = TypeVar("T")


def golds(value: object) -> list[str]:
    """Return the answers in a cell as text."""
    return [str(answer) for answer in (value if isinstance(value, list | tuple) else [value])]


def check_golds(data: Dataset, column: str, split: str, read: Callable[[str], T | None], what: str) -> None:
    """Refuse a split in which a gold answer is missing, blank, or such that `read` makes nothing of it.

    Args:
        data: the split, with `column`.
        column: a gold answer to a row, or a list of them; text, numbers or truth values.
        split: named in errors.
        read: turns a gold answer into what is compared; None where it cannot.
        what: what a gold answer must be, for errors.
    """
    for row, value in enumerate(value_column(data, column, split), start=1):
        answers = value if isinstance(value, list | tuple) else [value]
        bad = [answer for answer in answers if not _is_plain(answer) or read(str(answer)) is None]
        if bad or not answers:
            raise UserError(
                f"{describe_split(data, split)}, row {row}: column {column!r} must hold {what}, or a list of such, got {value!r}"
            )


def share(flags: list[bool]) -> float:
    """Return which part of the flags is set; 0 of none."""
    return sum(flags) / len(flags) if flags else 0.0


def _is_plain(answer: Any) -> bool:
    return isinstance(answer, str | int | float) and bool(str(answer).strip())
