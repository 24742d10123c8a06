"""Language modelling: how well a decoder foresees the tokens of plain text."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from turnrow.errors import UserError
from turnrow.tasks.columns import check_name, describe_split, require_columns, text_column
from turnrow.tasks.likelihood import finite_losses, perplexity, token_losses
from turnrow.tasks.padding import IGNORED, LanguageCollator
from turnrow.tasks.task import Task
from turnrow.tasks.tokens import resolve_max_length

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["LanguageModellingTask"]


@dataclass(kw_only=True)
class LanguageModellingTask(Task):
    """The next token of running text, for decoders.

    The rows' texts follow each other, each closed by the end-of-sequence token, and are cut into blocks of `max_length` tokens.
    Within a block each token is foreseen from all before it; the first of a block from nothing, so it is not counted.

    Metrics, less is better: `perplexity`, the exponential of `loss`, the mean over tokens of -log p in nats; `bits_per_byte`, which
    is comparable between tokenizers: the sum of -log2 p over the bytes of the texts as UTF-8. The tokens that are not counted, one
    a block, flatter it by so much: give models that are compared the same `max_length`, or long blocks.
    """

    name: ClassVar[str] = "language_modelling"
    auto_model = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    metric_names: ClassVar[tuple[str, ...]] = ("perplexity", "loss", "bits_per_byte")
    error_metrics: ClassVar[frozenset[str]] = frozenset(metric_names)

    text: str = "text"
    """The column of the text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.text, "text")

    def columns(self) -> list[str]:
        """Return the column of the text."""
        return [self.text]

    def input_columns(self) -> list[str]:
        """The text."""
        return [self.text]

    def fit(self, train: Dataset) -> None:
        """Check that there is text; there is nothing to learn."""
        require_columns(train, self.columns(), "train")
        text_column(train, self.text, "train")

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the model keeps its own head."""
        return {}

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, split: str
    ) -> Dataset:
        """Return blocks of tokens, with the `example` (from 0) that each token belongs to; see `Task.encode`.

        The `bytes` of a block are those of the texts that begin in it.
        """
        from datasets import Dataset as Table

        require_columns(data, self.columns(), split)
        texts = text_column(data, self.text, split)
        limit = resolve_max_length(tokenizer, max_length)
        if limit < 3:
            raise UserError(f"max_length is {limit}; language modelling needs blocks of at least 3 tokens")
        ids: list[int] = []
        owners: list[int] = []
        begins: list[int] = []
        for example, tokens in enumerate(_tokens(texts, tokenizer)):
            if not tokens:
                raise UserError(
                    f"{describe_split(data, split)}, row {example + 1}: the text is empty, and this tokenizer has no "
                    "end-of-sequence token to close it with; remove the row"
                )
            begins.append(len(ids))
            ids += tokens
            owners += [example] * len(tokens)
        if len(ids) < 2:
            raise UserError(f"{describe_split(data, split)} holds no text of two tokens, so there is none to foresee")
        ends = [*range(limit, len(ids), limit), len(ids)]
        if len(ids) % limit == 1 and len(ends) > 1:
            ends[-2] -= 1  # a last block of one token would foresee nothing
        blocks = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        sizes = np.zeros(len(ids), dtype=int)
        sizes[begins] = [len(text.encode()) for text in texts]
        encoded = Table.from_dict(
            {
                "input_ids": [ids[block] for block in blocks],
                "attention_mask": [[1] * len(ids[block]) for block in blocks],
                "labels": [ids[block] for block in blocks],
                "example": [owners[block] for block in blocks],
                "bytes": [int(sizes[block].sum()) for block in blocks],
            }
        )
        encoded.info.dataset_name = data.info.dataset_name
        encoded._fingerprint = uuid.uuid4().hex
        return encoded

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a collator that pads the last block of a split."""
        return LanguageCollator(tokenizer)

    def reduce_logits(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """Keep -log p of each token, of shape (blocks, tokens): the vocabulary's logits would fill the memory."""
        return token_losses(logits[0] if isinstance(logits, tuple) else logits, labels)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score -log p of shape (blocks, tokens) over all tokens but the first of each block."""
        losses = finite_losses(predictions, "blocks")
        counted = np.asarray(labels) != IGNORED
        counted[:, 0] = False
        total, tokens = float(losses[counted].sum()), int(counted.sum())
        mean = total / tokens
        scores = {"perplexity": perplexity(mean), "loss": mean}
        if encoded is not None and (size := sum(encoded["bytes"])):
            scores["bits_per_byte"] = total / math.log(2) / size
        return scores

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        """Return for each text its `perplexity` and how many of its `tokens` were counted; None of a text without any."""
        losses = finite_losses(predictions, "blocks")
        assert encoded is not None
        owners = [np.asarray(block) for block in encoded["example"]]
        examples = 1 + max(int(block.max()) for block in owners)
        sums, counts = np.zeros(examples), np.zeros(examples, dtype=int)
        for row, owner in zip(losses, owners, strict=True):
            np.add.at(sums, owner[1:], row[1 : len(owner)])
            np.add.at(counts, owner[1:], 1)
        return [
            {"perplexity": perplexity(total / count) if count else None, "tokens": int(count)}
            for total, count in zip(sums, counts, strict=True)
        ]


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, batch: int = 1000) -> Iterator[list[int]]:
    """Of each text; closed by the end-of-sequence token alone, whatever else the tokenizer would put around it."""
    end = tokenizer.eos_token_id
    for start in range(0, len(texts), batch):
        for ids in tokenizer(texts[start : start + batch], add_special_tokens=False, verbose=False)["input_ids"]:
            yield list(ids) + ([] if end is None else [end])
