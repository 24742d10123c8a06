"""Summaries: ROUGE by hand, as the package gives it, and for references that it cannot see."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import SummarizationTask, make_task


def task(**options: Any) -> SummarizationTask:
    made = make_task("summarization", **options)
    assert isinstance(made, SummarizationTask)
    return made


def score(*pairs: tuple[str, Any]) -> dict[str, float]:
    texts = np.array([text for text, _ in pairs], dtype=object)
    return task().metrics(texts, np.zeros(len(pairs)), Dataset.from_dict({"summary": [gold for _, gold in pairs]}))


def test_rouge_by_hand() -> None:
    # 3 of 4 words, 1 of 3 pairs ("the cat"), and the longest common subsequence "the cat sat".
    scores = score(("the cat then sat", "the cat sat down"))
    assert scores == {
        "rouge1": pytest.approx(3 / 4),
        "rouge2": pytest.approx(1 / 3),
        "rougeL": pytest.approx(3 / 4),
        "rougeLsum": pytest.approx(3 / 4),
    }
    assert task().main_metric == "rouge1"


def test_words_are_compared_by_their_stems_and_without_case() -> None:
    assert score(("He WALKED home.", "he walks home"))["rouge1"] == 1


def test_lines_are_the_sentences_of_rouge_lsum() -> None:
    scores = score(("b c\na d", "a d\nb c"))
    assert scores["rougeL"] == pytest.approx(1 / 2)
    assert scores["rougeLsum"] == 1


def test_figures_are_means_over_rows_of_what_the_package_gives() -> None:
    pairs = [("a dog ran", "the dog ran home"), ("", "nothing here"), ("ein Hund läuft", "the dog läuft")]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    rows = [scorer.score(gold, text) for text, gold in pairs]
    expected = {name: np.mean([row[name].fmeasure for row in rows]) for name in task().metric_names}
    assert score(*pairs) == pytest.approx(expected)
    assert score(("", "nothing here"))["rouge1"] == 0


def test_of_several_references_the_best_counts() -> None:
    assert score(("a cat", ["a dog", "a cat"]))["rouge1"] == 1


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        (None, "split 'test', row 2: column 'summary' has no value"),
        (" ", "split 'test', row 2: column 'summary' must hold a summary with a word in the letters a to z"),
        (
            "猫が座った",
            "row 2: column 'summary' must hold a summary with a word in the letters a to z, or digits.*'猫が座った'",
        ),
    ],
)
def test_a_reference_that_nothing_can_match_is_refused(
    gold: str | None, message: str, closing_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = Dataset.from_dict({"document": ["a", "b"], "summary": ["x", gold]})
    with pytest.raises(UserError, match=message):
        task().encode(data, closing_tokenizer, 300, split="test")
    assert len(task().encode(data, closing_tokenizer, 300, split="predict")) == 2


def test_a_blank_reference_is_not_learned(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_dict({"document": ["a", "b"], "summary": ["x", ""]})
    with pytest.raises(UserError, match="split 'train', row 2: the answer is blank"):
        task().encode(data, closing_tokenizer, 300, split="train")


def test_a_long_document_is_cut_and_an_empty_one_is_read(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_dict({"document": ["ü " * 400, ""], "summary": ["x", "y"]})
    made = task(generation={"max_new_tokens": 20})
    long, empty = made.encode(data, closing_tokenizer, 200, split="test")["input_ids"]
    assert len(long) in (179, 180)
    assert closing_tokenizer.decode(long).endswith("ü\n\nSummary:\n")
    assert closing_tokenizer.decode(empty) == "<s>Summarize the following text.\n\n\n\nSummary:\n"


def test_the_package_is_asked_for_before_anything_is_trained(
    closing_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    data = Dataset.from_dict({"document": ["a"], "summary": ["x"]})
    with pytest.raises(UserError, match=r"package rouge-score, which is not installed: pip install 'turnrow\[eval\]'"):
        task().encode(data, closing_tokenizer, 300, split="test")
    # Training and writing do without.
    assert len(task().encode(data, closing_tokenizer, 300, split="train")) == 1


def test_the_summary_is_the_prediction() -> None:
    assert task().decode(np.array(["a cat"], dtype=object)) == [{"prediction": "a cat"}]


def test_the_columns_may_have_other_names() -> None:
    made = task(prompt="{article}\nTL;DR:", target="{highlights}", gold="highlights")
    assert made.columns() == ["article", "highlights"]
    with pytest.raises(UserError, match="option 'gold' must be the name of a column, got None"):
        task(gold=None)
    with pytest.raises(UserError, match="option 'prompt' names highlights, where the answer stands"):
        task(prompt="{highlights}", gold="highlights")
