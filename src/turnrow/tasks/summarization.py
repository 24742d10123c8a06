"""Summaries: the model writes one, and what it shares with the reference is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from turnrow.errors import UserError
from turnrow.tasks.columns import check_name
from turnrow.tasks.generation import GenerationTask
from turnrow.tasks.gold import check_golds, golds

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["SummarizationTask"]


@dataclass(kw_only=True)
class SummarizationTask(GenerationTask):
    """A short text that says what a long one says.

    Metrics (Lin 2004, "ROUGE"), each the mean over rows of the F-measure, from 0 to 1, by the package rouge-score with Porter's
    stemmer: `rouge1` and `rouge2` of the words and pairs of words in common, `rougeL` of the longest common subsequence of words,
    `rougeLsum` of those of each line of the reference, which is what papers on CNN/DailyMail call ROUGE-L: there a line is a sentence.
    Of several references the one counts that fits best, for each metric by itself.

    A word is a run of the letters a to z and digits, in any case: that is all that ROUGE sees. References without a word, as in
    other scripts, are refused.
    """

    name: ClassVar[str] = "summarization"
    metric_names: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    default_new_tokens: ClassVar[int] = 128

    prompt: str | list[str] = "Summarize the following text.\n\n{document}\n\nSummary:\n"
    """As in every task that generates."""
    target: str = "{summary}"
    """The summary to learn."""
    gold: str = "summary"
    """The column of the reference, or of a list of references."""

    def __post_init__(self) -> None:
        check_name(self.gold, "gold")
        super().__post_init__()

    def gold_columns(self) -> list[str]:
        """The column `gold`."""
        return [self.gold]

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, split: str
    ) -> Dataset:
        """Encode documents, with summaries where they are learned; refuse a reference without a word. See `Task.encode`.

        Raises:
            UserError: besides, that the package rouge-score is missing, before anything is trained.
        """
        encoded = super().encode(data, tokenizer, max_length, split=split)
        if self.gold in encoded.column_names:
            _rouge()
            check_golds(data, self.gold, split, _words, "a summary with a word in the letters a to z, or digits")
        return encoded

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score texts of shape (rows,) against the references in `encoded`."""
        assert encoded is not None
        scorer = _rouge().RougeScorer(list(self.metric_names), use_stemmer=True)
        scores = [
            scorer.score_multi(golds(value), text) for value, text in zip(encoded[self.gold], predictions, strict=True)
        ]
        return {name: float(np.mean([row[name].fmeasure for row in scores])) for name in self.metric_names}

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        """Return per row the summary (`prediction`)."""
        return [{"prediction": text} for text in predictions]


def _words(text: str) -> bool | None:
    return any(letter.isascii() and letter.isalnum() for letter in text) or None


def _rouge() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError(
            "summaries are scored by the package rouge-score, which is not installed: pip install 'turnrow[eval]'"
        ) from error
    return rouge_scorer
