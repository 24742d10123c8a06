"""Word problems: the model writes a solution, and the number or the option that it ends in is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from turnrow.errors import UserError, near_matches
from turnrow.tasks.columns import check_name
from turnrow.tasks.extraction import check_markers, extract_letter, extract_number, numbers, written
from turnrow.tasks.generation import GenerationTask
from turnrow.tasks.gold import check_golds, golds, share
from turnrow.tasks.prompts import ALPACA_PROMPTS

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["ArithmeticTask"]

# A number of at most four decimals is taken to mean just what it says.
_EXACT = 10_000


@dataclass(kw_only=True)
class ArithmeticTask(GenerationTask):
    """A word problem whose answer is a number, or the letter of an option.

    The answer is taken from the text by the rules of `turnrow.tasks.extraction`, the same that are printed there, and compared
    with the column `gold`, never with the solution that is learned. Numbers are compared as rationals: a gold number of at most four
    decimals must be met exactly; any other, such as the 1.8333333333333335 in MAWPS, within `tolerance`, relative to it. Of several
    gold answers any will do.

    Metrics: `accuracy`, the share of all rows that are right, where a text without an answer counts as wrong; `unparsable`, the share
    of those texts; `answered_accuracy`, the share that is right of the others, 0 where there are none.
    """

    name: ClassVar[str] = "arithmetic"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "unparsable", "answered_accuracy")
    error_metrics: ClassVar[frozenset[str]] = frozenset({"unparsable"})
    default_new_tokens: ClassVar[int] = 256

    prompt: str | list[str] = field(default_factory=lambda: list(ALPACA_PROMPTS))
    """As in every task that generates; here that of LLM-Adapters (Hu et al. 2023), which is Alpaca's."""
    target: str = "{output}"
    """The solution to learn."""
    gold: str = "answer"
    """The column that is scored against: a number, a letter, or a list of such."""
    answer: Literal["number", "letter"] = "number"
    """What a gold answer is."""
    letters: str = "ABCDE"
    """With letters: those of the options."""
    markers: list[str] = field(default_factory=lambda: ["####", "the answer is"])
    """Texts behind which the answer stands; case does not matter."""
    tolerance: float = 1e-4
    """The relative error up to which a number counts as met, where the gold number has more than four decimals."""

    def __post_init__(self) -> None:
        check_name(self.gold, "gold")
        super().__post_init__()
        if self.answer not in ("number", "letter"):
            raise UserError(
                f"option 'answer' must be 'number' or 'letter', got {self.answer!r}"
                f"{near_matches(str(self.answer), ['number', 'letter'])}"
            )
        if not str(self.letters).isascii() or not str(self.letters).isalpha():
            raise UserError(f"option 'letters' must be letters such as 'ABCDE', got {self.letters!r}")
        check_markers(self.markers)
        tolerance: object = self.tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
            raise UserError(f"option 'tolerance' must be a number from 0, less than 1, got {tolerance!r}")

    def gold_columns(self) -> list[str]:
        """The column `gold`."""
        return [self.gold]

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, split: str
    ) -> Dataset:
        """Encode prompts, with solutions where they are learned; refuse a gold answer that is none. See `Task.encode`."""
        encoded = super().encode(data, tokenizer, max_length, split=split)
        if self.gold in encoded.column_names:
            what = "one number" if self.answer == "number" else f"one of the letters {', '.join(self.letters)}"
            check_golds(data, self.gold, split, self._read_gold(), what)
        return encoded

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score texts of shape (rows,) against the gold column of `encoded`."""
        assert encoded is not None
        answers = [self._extract(text) for text in predictions]
        right = [
            self._is_right(answer, golds(value)) for answer, value in zip(answers, encoded[self.gold], strict=True)
        ]
        answered = [answer is not None for answer in answers]
        return {
            "accuracy": share(right),
            "unparsable": share([not given for given in answered]),
            "answered_accuracy": share([was for was, given in zip(right, answered, strict=True) if given]),
        }

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        """Return per row the answer (`prediction`, None if there is none), whether it is `unparsable`, and what was `generated`."""
        answers = [self._extract(text) for text in predictions]
        return [
            {
                "prediction": written(answer) if isinstance(answer, Fraction) else answer,
                "unparsable": answer is None,
                "generated": text,
            }
            for answer, text in zip(answers, predictions, strict=True)
        ]

    def _extract(self, text: str) -> Fraction | str | None:
        if self.answer == "number":
            return extract_number(text, self.markers)
        return extract_letter(text, self.letters, self.markers)

    def _read_gold(self) -> Callable[[str], Fraction | str | None]:
        return _one_number if self.answer == "number" else self._one_letter

    def _one_letter(self, text: str) -> str | None:
        letter = text.strip().strip("().").upper()
        return letter if len(letter) == 1 and letter in self.letters.upper() else None

    def _is_right(self, answer: Fraction | str | None, gold: list[str]) -> bool:
        expected = map(self._read_gold(), gold)
        if isinstance(answer, Fraction):
            return any(isinstance(value, Fraction) and self._meets(answer, value) for value in expected)
        return answer is not None and answer in expected

    def _meets(self, answer: Fraction, gold: Fraction) -> bool:
        if _EXACT % gold.denominator == 0:
            return answer == gold
        return abs(answer - gold) <= Fraction(self.tolerance) * abs(gold)


def _one_number(text: str) -> Fraction | None:
    found = numbers(text)
    return found[0] if len(found) == 1 else None
