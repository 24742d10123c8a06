"""Summaries of newspaper articles."""

from __future__ import annotations

from turnrow.tasks.catalog.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES = (
    Entry(
        name="xsum",
        title="XSum: an article of the BBC in one sentence",
        task={"name": "summarization", "generation": {"max_new_tokens": 64}},
        hub={split: f"EdinburghNLP/xsum::{split}" for split in ("train", "validation", "test")},
        source="Narayan, Cohen, Lapata 2018, EMNLP",
    ),
    Entry(
        name="cnn_dailymail",
        title="CNN/DailyMail: the highlights of an article",
        task={"name": "summarization", "generation": {"max_new_tokens": 128}},
        hub={split: f"abisee/cnn_dailymail:3.0.0:{split}" for split in ("train", "validation", "test")},
        columns={"article": "document", "highlights": "summary"},
        source="Hermann et al. 2015, NeurIPS; See, Liu, Manning 2017, ACL",
        notes="Highlights are lines, of which rougeLsum is the ROUGE-L that papers report.",
    ),
)
