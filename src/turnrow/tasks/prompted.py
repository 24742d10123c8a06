"""Classification by a prompt: the model fills a gap in a text, and classes are words (LM-BFF, Gao et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from turnrow.errors import UserError, near_matches
from turnrow.tasks.classes import ClassTask
from turnrow.tasks.cloze import Cloze
from turnrow.tasks.columns import describe_split, require_columns, text_column
from turnrow.tasks.encoding import encode_rows
from turnrow.tasks.label_words import label_classes, label_word_ids, label_word_logits
from turnrow.tasks.padding import IGNORED, LanguageCollator
from turnrow.tasks.tokens import left_open, resolve_max_length

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptTask"]


@dataclass(kw_only=True)
class PromptTask(ClassTask):
    """One of the labels that the training split has, told by the word that a language model puts into a template.

    No layer is new: the output of class c is the logit of its word at the mask, and the loss is the cross-entropy over these
    logits alone. Where a prompt is too long, the longest texts in it are cut, never the template.

    Metrics: see `ClassTask`.
    """

    name: ClassVar[str] = "prompt"

    template: str
    """The prompt, with columns in braces and ``{mask}`` where the label word stands: ``"{sentence} It was {mask}."``; see `Cloze`."""
    label_words: Mapping[str, str]
    """The word of each class, such as ``{0: terrible, 1: great}``; a single token each."""
    architecture: Literal["masked", "causal"] = "masked"
    """What kind of language model it is. A causal one foresees the word, so its template must end with the mask."""

    word_ids: list[int] = field(default_factory=list, init=False, compare=False, repr=False)
    """The tokens of the label words, in the order of `labels`; `encode` fills it, since they depend on the tokenizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in ("masked", "causal"):
            raise UserError(
                f"option 'architecture' must be 'masked' or 'causal', got {self.architecture!r}"
                f"{near_matches(str(self.architecture), ['masked', 'causal'])}"
            )
        cloze = self._cloze()
        if self.architecture == "causal" and not cloze.ends_with_mask:
            raise UserError(
                f"option 'template' must end with {{mask}}, as a causal model reads only what stands before it, got "
                f"{self.template!r}; rewrite it so that the label word comes last"
            )
        if self.label in cloze.columns:
            raise UserError(f"option 'template' names the column of the label, {self.label!r}: the model would read it")
        self.label_words = _checked_words(self.label_words)

    @property
    def auto_model(self) -> str:
        """The Auto class of the architecture."""
        return "AutoModelForMaskedLM" if self.architecture == "masked" else "AutoModelForCausalLM"

    @property
    def peft_task_type(self) -> str | None:
        """peft's name of the architecture; it has none for masked language models."""
        return None if self.architecture == "masked" else "CAUSAL_LM"

    def columns(self) -> list[str]:
        """Return the columns of the template and of the label."""
        return [*self.input_columns(), self.label]

    def input_columns(self) -> list[str]:
        """Those that the template names."""
        return list(self._cloze().columns)

    def fit(self, train: Dataset) -> None:
        """Learn the labels of the training split, of which each must have its word."""
        super().fit(train)
        found = [str(label) for label in self.labels]
        wordless = [name for name in found if name not in self.label_words]
        absent = [name for name in self.label_words if name not in found]
        if wordless or absent:
            raise UserError(
                f"{describe_split(train, 'train')}: column {self.label!r} holds the classes {', '.join(map(repr, found))}, and "
                f"'label_words' has words for {', '.join(map(repr, self.label_words))}; "
                + (f"give words for {', '.join(map(repr, wordless))} too" if wordless else "")
                + ("; " if wordless and absent else "")
                + (f"leave out {', '.join(map(repr, absent))}" if absent else "")
            )

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the model keeps its own head."""
        return {}

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, split: str
    ) -> Dataset:
        """Encode filled templates; see `Task.encode`.

        `labels` is the token of the label word at the place whose output foresees it, the mask or the last token of a causal model's
        prompt, and `IGNORED` elsewhere. In a split ``predict`` too, to mark that place; there it is the word of the first class.
        """
        labelled = split != "predict"
        require_columns(data, self.columns() if labelled else self.input_columns(), split)
        texts = {name: text_column(data, name, split) for name in self.input_columns()}
        cloze = self._cloze()
        self.word_ids = label_word_ids(
            tokenizer, {str(label): self.label_words[str(label)] for label in self._known_labels()}, cloze.lead
        )
        classes = self._encode_labels(data, split) if labelled else [0] * len(data)
        write = self._writer(tokenizer)
        limit = resolve_max_length(tokenizer, max_length)

        def encode_row(row: dict[str, str], number: int) -> dict[str, list[int]]:
            filled = cloze.fit(row, lambda before, after: len(write(before, after)[0]) <= limit)
            if filled is None:
                raise UserError(
                    f"{describe_split(data, split)}, row {number + 1}: the template takes more than {limit} tokens even without the "
                    "texts in it; raise max_length, or shorten the template"
                )
            ids, place = write(*filled)
            if not ids:
                raise UserError(
                    f"{describe_split(data, split)}, row {number + 1}: the prompt is empty, so the model would have nothing to "
                    "read; remove the row"
                )
            labels = [IGNORED] * len(ids)
            labels[place] = self.word_ids[classes[number]]
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

        return encode_rows(data.select_columns(list(texts)), encode_row, split)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a collator that pads a batch to its longest row."""
        return LanguageCollator(tokenizer)

    def reduce_logits(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """Keep the label words' logits at the mask, of shape (rows, classes)."""
        return label_word_logits(logits[0] if isinstance(logits, tuple) else logits, labels, self._known_words())

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy over the label words' logits at the mask, the mean over the rows, in float32."""
        import torch

        words = self._known_words()
        return torch.nn.functional.cross_entropy(
            label_word_logits(logits, labels, words).float(), label_classes(labels, words).to(logits.device)
        )

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score the label words' logits, of shape (rows, classes), against `labels` of shape (rows, tokens)."""
        import torch

        named = label_classes(torch.from_numpy(np.asarray(labels)), self._known_words()).numpy()
        return super().metrics(predictions, named, encoded)

    def _cloze(self) -> Cloze:
        return Cloze(self.template)

    def _writer(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str], tuple[list[int], int]]:
        """What turns the texts before and behind the mask into tokens, and the place whose output is read."""
        if self.architecture == "causal":

            def foresee(before: str, after: str) -> tuple[list[int], int]:
                ids = left_open(tokenizer, list(tokenizer(before, verbose=False)["input_ids"]))
                return ids, len(ids) - 1

            return foresee
        mask = tokenizer.mask_token
        if mask is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no mask token; for a model that goes on with a text set "
                "architecture: causal"
            )

        def fill(before: str, after: str) -> tuple[list[int], int]:
            ids = list(tokenizer(before + mask + after, verbose=False)["input_ids"])
            # A text may hold the mask token too.
            masks = [place for place, token in enumerate(ids) if token == tokenizer.mask_token_id]
            return ids, masks[before.count(mask)]

        return fill

    def _known_words(self) -> list[int]:
        if not self.word_ids:
            raise RuntimeError("the task knows no tokens of its label words yet: call encode first")
        return self.word_ids


def _checked_words(words: object) -> dict[str, str]:
    if not isinstance(words, Mapping) or len(words) < 2:
        raise UserError(
            f"option 'label_words' must map at least two classes to words, such as {{0: terrible, 1: great}}, got {words!r}"
        )
    for name, word in words.items():
        if not isinstance(word, str) or not word.strip():
            raise UserError(f"option 'label_words': the word of class {name!r} must be a text, got {word!r}")
    return {str(name): word.strip() for name, word in words.items()}
