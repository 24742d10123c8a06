"""Data sets by name, each with the task that it is."""

from turnrow.tasks.catalog import (
    arithmetic,
    commonsense,
    glue,
    instruction,
    prompts,
    question_answering,
    sentences,
    summarization,
    text,
    vision,
)
from turnrow.tasks.catalog.entry import Entry

__all__ = ["CATALOG", "Entry"]

_SETS = (
    glue,
    sentences,
    prompts,
    question_answering,
    commonsense,
    arithmetic,
    summarization,
    instruction,
    text,
    vision,
)
CATALOG: dict[str, Entry] = {entry.name: entry for entries in _SETS for entry in entries.ENTRIES}
"""Every data set that is known by name."""
