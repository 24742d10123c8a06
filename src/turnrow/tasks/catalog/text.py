"""Running text for language modelling."""

from __future__ import annotations

from turnrow.tasks.catalog.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES = (
    Entry(
        name="wikitext2",
        title="WikiText-2: articles of Wikipedia",
        task={"name": "language_modelling", "text": "text"},
        hub={
            "train": "Salesforce/wikitext:wikitext-2-raw-v1:train",
            "validation": "Salesforce/wikitext:wikitext-2-raw-v1:validation",
            "test": "Salesforce/wikitext:wikitext-2-raw-v1:test",
        },
        source="Merity et al. 2017, ICLR",
        notes="The raw form. Its rows are lines, many of them empty.",
    ),
)
