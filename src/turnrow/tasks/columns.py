"""Take columns out of a split and refuse what is missing, naming split, file, column and row (rows counted from 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from turnrow.errors import UserError, near_matches

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "check_name",
    "describe_split",
    "is_name",
    "plain_columns",
    "require_columns",
    "text_column",
    "value_column",
]


def is_name(value: object) -> bool:
    """Whether a value can be the name of a column."""
    return isinstance(value, str) and bool(value)


def check_name(value: object, option: str) -> None:
    """Refuse a value of `option` that cannot be the name of a column."""
    if not is_name(value):
        raise UserError(f"option {option!r} must be the name of a column, got {value!r}")


def describe_split(data: Dataset, split: str) -> str:
    """Name a split for an error, with the file or hub data set that it was read from where that is known."""
    return f"split {split!r} ({data.info.dataset_name})" if data.info.dataset_name else f"split {split!r}"


def require_columns(data: Dataset, columns: Sequence[str], split: str) -> None:
    """Refuse a split without rows, or without one of `columns`."""
    if len(data) == 0:
        raise UserError(f"{describe_split(data, split)} is empty: it holds no rows")
    for column in columns:
        if column not in data.column_names:
            raise UserError(
                f"{describe_split(data, split)} has no column {column!r}; its columns are "
                f"{', '.join(repr(name) for name in data.column_names)}{near_matches(column, data.column_names)}"
            )


def value_column(data: Dataset, column: str, split: str) -> list[Any]:
    """Return the values of a column; a null is refused."""
    values = list(data.with_format(None)[column])
    for row, value in enumerate(values, start=1):
        if value is None:
            raise UserError(
                f"{describe_split(data, split)}, row {row}: column {column!r} has no value (missing or null)"
            )
    return values


def text_column(data: Dataset, column: str, split: str) -> list[str]:
    """Return the values of a column that must hold text; an empty text is text."""
    values = value_column(data, column, split)
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise UserError(
                f"{describe_split(data, split)}, row {row}: column {column!r} must hold text, "
                f"got {value!r} ({type(value).__name__})"
            )
    return values


def plain_columns(data: Dataset) -> list[str]:
    """Return the columns whose values JSON can hold: all but images and other bytes."""
    return [name for name, feature in data.features.items() if _is_plain(feature)]


def _is_plain(feature: Any) -> bool:
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, list):
        return all(map(_is_plain, feature))
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _is_plain(inner)
    return getattr(feature, "dtype", "") not in ("binary", "large_binary") and not hasattr(feature, "decode_example")
