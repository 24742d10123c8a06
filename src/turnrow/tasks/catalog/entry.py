"""What the catalogue knows of a data set: the task that it is, where its splits lie on the hub, and how they look there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Entry"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A data set by name. A recipe says ``task: {name: cola}`` and gets the task, its options and the splits on the hub.

    Local files have the form that `task` reads. Rows of the hub are turned into it: columns are renamed by `columns`, or rows
    rewritten by `convert`.
    """

    name: str
    """What a recipe calls it."""
    title: str
    """One line for people: the published name, and what is asked."""
    task: Mapping[str, Any]
    """The section ``task`` of a recipe: the kind's name and its options, of which a recipe may override any."""
    hub: Mapping[str, str] = field(default_factory=dict)
    """``train``, ``validation`` and ``test`` as hub ids, ``OWNER/NAME:CONFIG:SPLIT``. A split is missing where none is public."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name of each column of the hub whose name differs."""
    reads: tuple[str, ...] = ()
    """The hub's columns that `convert` reads: rows that have them all are in the hub's form."""
    convert: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
    """A row in our form from a row of the hub, where it takes more than other names; None of a row to be left out."""
    source: str
    """Who published it, to be cited."""
    notes: str = ""
    """What a user has to know, such as how the test split was made."""

    def in_our_form(self, data: Dataset) -> Dataset:
        """Return `data` in the form that the task reads; unchanged where it is not in the hub's form."""
        held = set(data.column_names)
        if self.convert is not None and held.issuperset(self.reads):
            from datasets import Dataset as Table

            # Not by `map`, which would turn "false" back into a truth value where the hub's column of that name held those.
            rows = (self.convert(row) for row in data.with_format(None))
            converted = Table.from_list([row for row in rows if row is not None])
            converted.info.dataset_name = data.info.dataset_name
            return converted
        renamed = {theirs: ours for theirs, ours in self.columns.items() if theirs in held}
        if not renamed:
            return data
        # A column that has our name already holds something else there.
        return data.remove_columns([ours for ours in renamed.values() if ours in held]).rename_columns(renamed)
