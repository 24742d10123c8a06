"""Questions about a text (SQuAD). The test sets are not public: the development split is the test split, as is usual."""

from __future__ import annotations

from turnrow.tasks.catalog.entry import Entry

__all__ = ["ENTRIES"]


def _splits(name: str) -> dict[str, str]:
    return {
        "train": f"{name}::train[:95%]",
        "validation": f"{name}::train[95%:]",
        "test": f"{name}::validation",
    }


ENTRIES = (
    Entry(
        name="squad",
        title="SQuAD v1.1: which words of the paragraph answer the question?",
        task={"name": "extractive_qa"},
        hub=_splits("rajpurkar/squad"),
        source="Rajpurkar et al. 2016, EMNLP",
        notes="The training split is in the order of its articles: those at its end are for validation.",
    ),
    Entry(
        name="squad_v2",
        title="SQuAD v2.0: which words of the paragraph answer the question, if any?",
        task={"name": "extractive_qa", "no_answer_threshold": "validation"},
        hub=_splits("rajpurkar/squad_v2"),
        source="Rajpurkar, Jia, Liang 2018, ACL",
        notes=(
            "The training split is in the order of its articles: those at its end are for validation, where the threshold from which "
            "a question counts as unanswerable is chosen."
        ),
    ),
)
