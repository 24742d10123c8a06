"""The demo's data is what its datasheet says: balanced, clean, and without repeats across or inside the splits."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

FOLDER = Path(__file__).parents[2] / "examples" / "support_tickets"
PER_INTENT = {"train": 44, "validation": 10, "test": 18}
INTENTS = {
    "account_change",
    "billing_question",
    "bug_report",
    "cancellation",
    "delivery_status",
    "feature_request",
    "login_problem",
    "refund_request",
}


def _tickets(split: str) -> list[dict[str, str]]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("split", PER_INTENT)
def test_each_intent_has_its_share_of_the_split(split: str) -> None:
    assert Counter(ticket["intent"] for ticket in _tickets(split)) == dict.fromkeys(INTENTS, PER_INTENT[split])


@pytest.mark.parametrize("split", PER_INTENT)
def test_a_ticket_is_one_text_and_one_intent(split: str) -> None:
    for ticket in _tickets(split):
        assert set(ticket) == {"text", "intent"}
        assert ticket["text"] == ticket["text"].strip() != ""


def test_no_two_tickets_are_alike() -> None:
    texts = [ticket["text"] for split in PER_INTENT for ticket in _tickets(split)]
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit_transform(texts)
    similarity = (vectors @ vectors.T).toarray()
    np.fill_diagonal(similarity, 0.0)
    first, second = np.unravel_index(similarity.argmax(), similarity.shape)
    assert similarity[first, second] < 0.6, f"{texts[first]!r} and {texts[second]!r} are nearly the same"


def test_mail_addresses_are_reserved_ones() -> None:
    texts = " ".join(ticket["text"] for split in PER_INTENT for ticket in _tickets(split))
    assert all(domain.endswith(".example") for domain in re.findall(r"\w@([\w.-]+\w)", texts))
