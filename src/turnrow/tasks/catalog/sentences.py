"""Sentences to be classified that are no part of GLUE."""

from __future__ import annotations

from turnrow.tasks.catalog.entry import Entry

__all__ = ["ENTRIES"]

_ONE = {"name": "classification", "text": ["sentence"], "label": "label"}

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
        columns={"text": "sentence"},
        source="Pang, Lee 2004, ACL",
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
        columns={"text": "sentence", "label_coarse": "label"},
        source="Li, Roth 2002, COLING",
        notes="The six coarse classes.",
    ),
)
