"""Instruction tuning: answers to instructions, or what the assistant says in conversations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from turnrow.errors import UserError
from turnrow.tasks.columns import describe_split, is_name, require_columns
from turnrow.tasks.conversations import answered_conversation, asked_conversation, read_turns
from turnrow.tasks.encoding import encode_rows
from turnrow.tasks.generation import GenerationTask, room_for_prompt, room_to_go_on
from turnrow.tasks.likelihood import answer_losses, score_answers, tell_answers
from turnrow.tasks.packing import PackedCollator, pack_rows
from turnrow.tasks.padding import LanguageCollator
from turnrow.tasks.prompts import ALPACA_PROMPTS, check_chat
from turnrow.tasks.templates import choose
from turnrow.tasks.tokens import resolve_max_length

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["InstructionTask"]


@dataclass(kw_only=True)
class InstructionTask(GenerationTask):
    """Instructions with their answers, or conversations; only what is answered is learned.

    Rows are of one of two forms. `prompt` and `target` name columns, as those of Alpaca, `instruction`, `input` and `output`. Or
    `messages` names a column with a list of messages, each with `role` and `content`, in the form of UltraFeedback's `chosen`,
    with as many turns as it likes: they are written by the tokenizer's chat template, and all that the assistant answers is learned.

    What is scored is the likelihood of the answers in the data: metrics, less is better, are `perplexity`, the exponential of `loss`,
    the mean over the tokens of the answers of -log p in nats. That says how well the answers are foreseen, not how good those
    are that the model would give; for that `turnrow predict` lets it write, in the form that AlpacaEval judges: `instruction`, `output`
    and `generator` (Li et al. 2023, https://github.com/tatsu-lab/alpaca_eval); let the name of its file end in .json.
    """

    name: ClassVar[str] = "instruction"
    metric_names: ClassVar[tuple[str, ...]] = ("perplexity", "loss")
    error_metrics: ClassVar[frozenset[str]] = frozenset(metric_names)
    default_new_tokens: ClassVar[int] = 512

    prompt: str | list[str] = field(default_factory=lambda: list(ALPACA_PROMPTS))
    """As in every task that generates; here Alpaca's (Taori et al. 2023)."""
    target: str = "{output}"
    """The answer to learn."""
    messages: str | None = None
    """The column of the conversations, in place of `prompt` and `target`."""
    packing: bool = False
    """Put several training examples into one row, and all rows of a batch into one without padding (best-fit decreasing). An example
    sees no other, and positions begin anew with each: see `turnrow.tasks.packing.PackedCollator` for the models of which that
    holds. A step then sees more examples, so it is another training than without."""
    generator: str = "turnrow"
    """The name of the model in the form that AlpacaEval judges."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.messages is not None and not is_name(self.messages):
            raise UserError(f"option 'messages' must be the name of a column, got {self.messages!r}")
        if not isinstance(self.packing, bool):
            raise UserError(f"option 'packing' must be true or false, got {self.packing!r}")
        if not is_name(self.generator):
            raise UserError(f"option 'generator' must be the name of the model, got {self.generator!r}")
        if self.messages is not None and (self.chat or self.system is not None):
            raise UserError(
                "options 'chat' and 'system' are for prompts; with 'messages' the conversations say themselves what they begin with"
            )
        if self.architecture == "encoder-decoder" and (self.messages is not None or self.packing):
            raise UserError("options 'messages' and 'packing' are for architecture 'decoder'")

    def columns(self) -> list[str]:
        """Return the columns of the prompt and of the answer, or that of the conversations."""
        return super().columns() if self.messages is None else [self.messages]

    def input_columns(self) -> list[str]:
        """The columns without which there is no prompt."""
        return super().input_columns() if self.messages is None else [self.messages]

    def gold_columns(self) -> list[str]:
        """None: the answer that is learned is the one that is scored."""
        return []

    def generates(self, split: str) -> bool:
        """Only what is predicted; labelled splits are scored by the likelihood of their answers."""
        return split == "predict"

    def prediction_length(self, max_length: int, positions: int | None) -> int:
        """A prompt as long as a whole example, and behind it the answer, as far as the model has positions."""
        if self.architecture != "decoder":
            return max_length
        return room_to_go_on(max_length, positions, self.generation)

    def fit(self, train: Dataset) -> None:
        """Check that the training split has the columns; there is nothing to learn."""
        require_columns(train, self.columns(), "train")

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, split: str
    ) -> Dataset:
        """Encode what is asked and answered, or, of a split to be predicted, what is asked; see `Task.encode`.

        Where there are more than `max_length` tokens, the longest texts of a prompt are cut, and of a conversation the oldest
        exchanges are left out first. An answer is cut at its end only where it would leave what is asked less than half.
        """
        if self.messages is None:
            encoded = super().encode(data, tokenizer, max_length, split=split)
            if split == "predict":
                encoded = encoded.add_column("instruction", [self._instruction(row) for row in data.with_format(None)])
        else:
            encoded = self._encode_conversations(data, tokenizer, max_length, split, self.messages)
        if self.packing and split == "train":
            return pack_rows(encoded, resolve_max_length(tokenizer, max_length))
        return encoded

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a collator that pads a batch to its longest row, or puts packed rows into one."""
        padded = LanguageCollator(tokenizer, decoder=self.architecture == "decoder")
        if not self.packing:
            return padded
        packed = PackedCollator()
        # Packed rows need no mask; rows that are evaluated are not packed.
        return lambda rows: padded(rows) if "attention_mask" in rows[0] else packed(rows)

    def reduce_logits(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """Keep -log p of each row's answers, in nats, of shape (rows,)."""
        return answer_losses(logits, labels, self.architecture == "decoder")

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score -log p of shape (rows,) over the tokens of `labels` that are learned."""
        return score_answers(predictions, labels)

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        """Return per row the `perplexity` of its answers and how many `tokens` they have; of what the model wrote, `instruction`,
        `output` and `generator`.
        """
        assert encoded is not None
        if "labels" not in encoded.column_names:
            return [
                {"instruction": asked, "output": text, "generator": self.generator}
                for asked, text in zip(encoded["instruction"], predictions, strict=True)
            ]
        return tell_answers(predictions, encoded)

    def _encode_conversations(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, split: str, column: str
    ) -> Dataset:
        require_columns(data, [column], split)
        check_chat(tokenizer, f"column {column!r} holds conversations")
        limit = resolve_max_length(tokenizer, max_length)
        if split == "predict":
            limit = room_for_prompt(limit, self.generation)

        def encode_row(row: dict[str, Any], number: int) -> dict[str, Any]:
            place = f"{describe_split(data, split)}, row {number + 1}"
            turns = read_turns(row[column], column, place)
            if split == "predict":
                ids = asked_conversation(tokenizer, turns, limit, place)
                asked = [turn["content"] for turn in turns if turn["role"] == "user"]
                return {"input_ids": ids, "attention_mask": [1] * len(ids), "instruction": asked[-1] if asked else ""}
            ids, labels = answered_conversation(tokenizer, turns, limit, place)
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

        return encode_rows(data, encode_row, split)

    def _instruction(self, row: dict[str, Any]) -> str:
        """What is asked, without the words of the template: the texts of its columns."""
        texts = self._texts(row, "a row")
        return "\n\n".join(texts[name] for name in choose(self._templates, texts).columns)
