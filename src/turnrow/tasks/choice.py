"""Multiple choice: the model writes a label, or each label is scored by how likely the model finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from turnrow.errors import UserError, near_matches
from turnrow.tasks.columns import check_name, describe_split, require_columns, value_column
from turnrow.tasks.encoding import encode_rows
from turnrow.tasks.extraction import check_markers, extract_label, named_labels
from turnrow.tasks.generation import GenerationTask, refuse_empty
from turnrow.tasks.gold import share
from turnrow.tasks.likelihood import answer_losses, finite_losses
from turnrow.tasks.padding import IGNORED
from turnrow.tasks.prompts import ALPACA_PROMPTS
from turnrow.tasks.templates import Template
from turnrow.tasks.tokens import resolve_max_length

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["MultipleChoiceTask"]

_SCORINGS = ("generation", "likelihood")
_NORMALIZATIONS = ("sum", "mean")


@dataclass(kw_only=True)
class MultipleChoiceTask(GenerationTask):
    """A question to be answered by one of a few labels, such as ``true`` and ``false``, or ``answer1`` to ``answer4``.

    What is learned is `target`. What is scored depends on `scoring`:

    - ``generation``: the model writes, and the label is taken from its text by the rules of `turnrow.tasks.extraction`. A text that
      names none, or several, counts as wrong.
    - ``likelihood``: `choice` is filled with each label, and the label counts whose text the model finds most likely after the
      prompt, which is the same for all of them; the token that ends an answer counts too. Among equals the first label wins.
      Nothing is generated, and each example costs as many rows as there are labels.

    Metrics: `accuracy`, the share of all rows that are right; with ``generation`` also `unparsable`, the share of the texts without
    a label.
    """

    name: ClassVar[str] = "multiple_choice"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "unparsable")
    error_metrics: ClassVar[frozenset[str]] = frozenset({"unparsable"})
    default_new_tokens: ClassVar[int] = 32

    prompt: str | list[str] = field(default_factory=lambda: list(ALPACA_PROMPTS))
    """As in every task that generates; here that of LLM-Adapters (Hu et al. 2023), which is Alpaca's."""
    target: str = "{output}"
    """The answer to learn."""
    gold: str = "answer"
    """The column of the label that is right."""
    labels: list[str] | None = None
    """The labels; None: those of the training split. They are compared as text, in any case."""
    offered: bool = False
    """Choose among the labels that the prompt names (two at least, or among all), as where some questions have three answers and
    others five."""
    scoring: Literal["generation", "likelihood"] = "generation"
    """How a label is chosen."""
    choice: str = "the correct answer is {label}"
    """With likelihood: the answer that gives a label."""
    normalize: Literal["sum", "mean"] = "sum"
    """With likelihood: whether the log-probabilities of a choice's tokens are added, or averaged, so that long choices have no
    disadvantage."""
    markers: list[str] = field(default_factory=lambda: ["answer is"])
    """With generation: texts behind which the label stands, where they occur."""
    known: list[str] = field(default_factory=list, init=False)
    """The labels in their order; `fit` fills it where `labels` does not say."""

    def __post_init__(self) -> None:
        check_name(self.gold, "gold")
        super().__post_init__()
        for option, allowed in (("scoring", _SCORINGS), ("normalize", _NORMALIZATIONS)):
            if (value := getattr(self, option)) not in allowed:
                raise UserError(
                    f"option {option!r} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
                    f"{near_matches(str(value), allowed)}"
                )
        if self.scoring == "likelihood" and self.metric == "unparsable":
            raise UserError("metric 'unparsable' is for scoring 'generation'; every choice has a likelihood")
        if not isinstance(self.offered, bool):
            raise UserError(f"option 'offered' must be true or false, got {self.offered!r}")
        check_markers(self.markers)
        if Template(self.choice, "choice").columns != ("label",):
            raise UserError(f"option 'choice' must hold {{label}} and no other name in braces, got {self.choice!r}")
        if self.labels is not None:
            given: object = self.labels
            if not isinstance(given, list | tuple):
                raise UserError(f"option 'labels' must be a list such as ['true', 'false'], got {given!r}")
            self._take([_name(label) for label in given], "option 'labels'")

    def gold_columns(self) -> list[str]:
        """The column `gold`."""
        return [self.gold]

    def generates(self, split: str) -> bool:
        """With generation, all but the training split."""
        return self.scoring == "generation" and super().generates(split)

    def fit(self, train: Dataset) -> None:
        """Learn the labels of the training split, unless the options name them."""
        super().fit(train)
        if self.labels is None:
            require_columns(train, [self.gold], "train")
            self._take(sorted(set(self._golds(train, "train"))), describe_split(train, "train"))

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, split: str
    ) -> Dataset:
        """Encode what is learned, prompts, or with likelihood prompts with each of their choices; see `Task.encode`.

        With likelihood a row has the number of its `example` and of its `choice` among the labels, both from 0, and how many
        `tokens` its answer has.
        """
        known = self._known()
        if split == "train" or self.scoring == "generation":
            encoded = super().encode(data, tokenizer, max_length, split=split)
        else:
            encoded = self._encode_choices(data, tokenizer, max_length, split)
        if split not in ("train", "predict"):
            self._check_golds(data, split, known)
        return encoded

    def reduce_logits(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """Keep -log p of each choice, in nats, of shape (rows,)."""
        return answer_losses(logits, labels, self.architecture == "decoder")

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score texts of shape (rows,), or with likelihood -log p of shape (choices,).

        With likelihood `loss` is that of the right answers' tokens, which is what training lowers; wrong choices have no part in it.
        """
        assert encoded is not None
        golds = list(encoded[self.gold])
        if self.scoring == "likelihood":  # a row for each choice, each with the gold of its example
            golds = list(dict(zip(encoded["example"], golds, strict=True)).values())
        chosen = [row["prediction"] for row in self.decode(predictions, encoded)]
        right = [
            label is not None and label.casefold() == _name(gold).casefold()
            for label, gold in zip(chosen, golds, strict=True)
        ]
        scores = {"accuracy": share(right)}
        if self.scoring == "generation":
            return scores | {"unparsable": share([label is None for label in chosen])}
        return scores | self._loss_of_right(predictions, encoded)

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        """Return per example its label (`prediction`).

        With generation None where there is none, whether it is `unparsable`, and what was `generated`; with likelihood the
        model's `probability` of the label among the choices.
        """
        known = self._known()
        if self.scoring == "generation":
            chosen = [extract_label(text, known, self.markers) for text in predictions]
            return [
                {"prediction": label, "unparsable": label is None, "generated": text}
                for label, text in zip(chosen, predictions, strict=True)
            ]
        from scipy.special import softmax

        assert encoded is not None
        scores = self._likelihoods(predictions, encoded)
        probabilities = softmax(scores, axis=1)
        return [
            {"prediction": known[best], "probability": float(row[best])}
            for best, row in zip(scores.argmax(axis=1), probabilities, strict=True)
        ]

    def _encode_choices(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, split: str
    ) -> Dataset:
        gold = [] if split == "predict" else self.gold_columns()
        require_columns(data, [*self.input_columns(), *gold], split)
        prompter = self._prompter(tokenizer, learned=False)
        limit = resolve_max_length(tokenizer, max_length)
        template = Template(self.choice, "choice")
        known = self._known()

        def encode_batch(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            rows: list[dict[str, Any]] = []
            for place_in_batch, number in enumerate(numbers):
                row = {name: values[place_in_batch] for name, values in batch.items()}
                place = f"{describe_split(data, split)}, row {number + 1}"
                texts = self._texts(row, place)
                answers = [prompter.answer(texts, template.fill({"label": label})) for label in known]
                longest = max(map(len, answers))
                if longest >= limit:
                    raise UserError(
                        f"{place}: a choice takes {longest} tokens, and max_length is {limit}; raise it, or shorten 'choice'"
                    )
                # Shortened alike for all choices, or they would be compared after different questions.
                ids = prompter.prompt(texts, limit - longest if prompter.decoder else limit, place)
                refuse_empty(ids, place)
                for label in self._choices(prompter.filled(texts)):
                    answer = answers[label]
                    learned = [IGNORED] * len(ids) + answer if prompter.decoder else answer
                    read = ids + answer if prompter.decoder else ids
                    rows.append(
                        {
                            "input_ids": read,
                            "attention_mask": [1] * len(read),
                            "labels": learned,
                            "example": number,
                            "choice": label,
                            "tokens": len(answer),
                            **{name: row[name] for name in gold},
                        }
                    )
            return {name: [row[name] for row in rows] for name in rows[0]}

        return encode_rows(data, encode_batch, split, batched=True)

    def _choices(self, prompt: str) -> list[int]:
        known = self._known()
        named = named_labels(prompt, known) if self.offered else set()
        return [number for number, label in enumerate(known) if label in named or len(named) < 2]

    def _likelihoods(self, predictions: np.ndarray, encoded: Dataset) -> np.ndarray:
        """Log-probabilities of shape (examples, labels); minus infinity of what was no choice."""
        losses = finite_losses(predictions, "choices")
        examples, choices = np.asarray(encoded["example"]), np.asarray(encoded["choice"])
        if self.normalize == "mean":
            losses = losses / np.asarray(encoded["tokens"])
        scores = np.full((examples.max() + 1, len(self._known())), -np.inf)
        scores[examples, choices] = -losses
        return scores

    def _loss_of_right(self, predictions: np.ndarray, encoded: Dataset) -> dict[str, float]:
        """`loss`, or nothing where no right answer was a choice."""
        known = [label.casefold() for label in self._known()]
        right = np.array(
            [
                known[choice] == _name(gold).casefold()
                for choice, gold in zip(encoded["choice"], encoded[self.gold], strict=True)
            ]
        )
        if not right.any():
            return {}
        losses, tokens = finite_losses(predictions, "choices"), np.asarray(encoded["tokens"])
        return {"loss": float(losses[right].sum() / tokens[right].sum())}

    def _golds(self, data: Dataset, split: str) -> list[str]:
        values = value_column(data, self.gold, split)
        for row, value in enumerate(values, start=1):
            if not isinstance(value, str | int) or not str(value).strip():
                raise UserError(
                    f"{describe_split(data, split)}, row {row}: column {self.gold!r} must hold a label, got {value!r} "
                    f"({type(value).__name__})"
                )
        return [_name(value) for value in values]

    def _check_golds(self, data: Dataset, split: str, known: list[str]) -> None:
        names = {label.casefold() for label in known}
        for row, value in enumerate(self._golds(data, split), start=1):
            if value.casefold() not in names:
                raise UserError(
                    f"{describe_split(data, split)}, row {row}: column {self.gold!r} holds {value!r}, which is none of the labels "
                    f"{', '.join(map(repr, known))}{near_matches(value, known)}"
                )

    def _take(self, labels: list[str], place: str) -> None:
        alike = {label.casefold(): label for label in labels}
        if len(alike) < 2 or len(alike) < len(labels) or not all(label.strip() for label in labels):
            raise UserError(
                f"{place}: a choice needs at least two labels, none of them blank, and no two that differ only in case; got "
                f"{', '.join(map(repr, labels)) or 'none'}"
            )
        self.known = labels

    def _known(self) -> list[str]:
        if not self.known:
            raise RuntimeError("the task knows no labels yet: call fit on the training split first")
        return self.known

    def _learned(self) -> dict[str, Any]:
        return {"labels": list(self.known)}

    def _restore(self, learned: Mapping[str, Any]) -> None:
        labels = learned.get("labels")
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise UserError(f"the saved task {self.name!r} is broken: 'labels' must be a list of texts, got {labels!r}")
        self.known = labels


def _name(label: object) -> str:
    """A label as text; the truth values of YAML and JSON as those files write them."""
    return str(label).lower() if isinstance(label, bool) else str(label).strip()
