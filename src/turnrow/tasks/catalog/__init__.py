"""Data sets by name, each with the task that it is."""

from turnrow.tasks.catalog import glue, sentences, text
from turnrow.tasks.catalog.entry import Entry

__all__ = ["CATALOG", "Entry"]

CATALOG: dict[str, Entry] = {
    entry.name: entry for entries in (glue.ENTRIES, sentences.ENTRIES, text.ENTRIES) for entry in entries
}
"""Every data set that is known by name."""
