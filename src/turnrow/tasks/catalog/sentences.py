"""Sentences to be classified that are no part of GLUE."""

from __future__ import annotations

from typing import Any

from turnrow.tasks.catalog.entry import Entry

__all__ = ["ENTRIES", "subj_row", "trec_row"]

_ONE = {"name": "classification", "text": ["sentence"], "label": "label"}

_QUESTIONS = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")


def subj_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the hub's Subj, where 0 is objective, in our form, where 0 is subjective."""
    return {"sentence": row["text"], "label": 1 - row["label"]}


def trec_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the hub's TREC, which numbers the coarse classes otherwise, in our form."""
    return {"sentence": row["text"], "label": _QUESTIONS.index(row["label_coarse_original"])}


ENTRIES = (
    Entry(
        name="mr",
        title="MR: is the sentence of a film review positive?",
        task=_ONE,
        hub={
            "train": "cornell-movie-review-data/rotten_tomatoes::train",
            "validation": "cornell-movie-review-data/rotten_tomatoes::validation",
            "test": "cornell-movie-review-data/rotten_tomatoes::test",
        },
        columns={"text": "sentence"},
        source="Pang, Lee 2005, ACL",
        notes="Its sentences overlap with those of SST-2.",
    ),
    Entry(
        name="subj",
        title="Subj: is the sentence objective?",
        task=_ONE,
        hub={
            "train": "SetFit/subj::train[:7000]",
            "validation": "SetFit/subj::train[7000:]",
            "test": "SetFit/subj::test",
        },
        reads=("text", "label"),
        convert=subj_row,
        source="Pang, Lee 2004, ACL",
        notes="0 is subjective; rows of the hub, where 0 is objective, are turned.",
    ),
    Entry(
        name="trec",
        title="TREC: what kind of thing does the question ask for?",
        task=_ONE,
        hub={
            "train": "SetFit/TREC-QC::train[:90%]",
            "validation": "SetFit/TREC-QC::train[90%:]",
            "test": "SetFit/TREC-QC::test",
        },
        reads=("text", "label_coarse_original"),
        convert=trec_row,
        source="Li, Roth 2002, COLING",
        notes="The six coarse classes: 0 ABBR, 1 ENTY, 2 DESC, 3 HUM, 4 LOC, 5 NUM; the hub numbers them otherwise.",
    ),
)
