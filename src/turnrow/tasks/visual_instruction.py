"""Visual instruction tuning: conversations about an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from turnrow.errors import UserError
from turnrow.tasks.columns import check_name, describe_split, require_columns
from turnrow.tasks.generation import checked_generation, room_for_prompt, room_to_go_on
from turnrow.tasks.images import FILES, has_image, image_files, open_image
from turnrow.tasks.likelihood import answer_losses, score_answers, tell_answers
from turnrow.tasks.padding import IGNORED, pad_rows
from turnrow.tasks.squad import exact_match, token_f1
from turnrow.tasks.task import Task
from turnrow.tasks.tokens import ready_to_pad, resolve_max_length, tokenizer_of
from turnrow.tasks.visual import VisualPrompter, last_answer, read_conversation

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["VisualInstructionTask"]


@dataclass(kw_only=True)
class VisualInstructionTask(Task):
    """Conversations about an image in the form of LLaVA (Liu et al. 2023); only what the assistant answers is learned.

    `conversations` holds turns ``{"from": "human", "value": "<image>\\nWhat is it?"}``, ``{"from": "gpt", "value": ...}``; a row without an
    image has no ``<image>``. They are written by the chat template of the model's processor. Too long ones are cut at their end.

    Metrics, less is better: `perplexity`, the exponential of `loss`, the mean over the tokens of the answers of -log p in nats. With
    `answers` the model writes the last answer of each conversation instead, and it is scored against that of the data: `exact_match`
    and `f1` of words, both without case, punctuation and articles, as SQuAD has them. What is predicted is always written.

    Tested with the architecture of LLaVA; the model must take what its image processor makes, and one token for each of the
    processor's.
    """

    name: ClassVar[str] = "visual_instruction"
    preparer: ClassVar[str] = "AutoProcessor"
    auto_model = "AutoModelForImageTextToText"
    peft_task_type = "CAUSAL_LM"
    metric_names: ClassVar[tuple[str, ...]] = ("perplexity", "loss", "exact_match", "f1")
    error_metrics: ClassVar[frozenset[str]] = frozenset({"perplexity", "loss"})

    image: str = "image"
    """The column of the image: a path, the bytes of a file, or an image of Pillow; null where there is none."""
    conversations: str = "conversations"
    """The column of the turns."""
    folder: str | None = None
    """Where relative paths begin; None: the current folder, and the folder of the data file for what is not there."""
    answers: bool = False
    """Score what the model answers, for questions with short answers, in place of how likely it finds the answers of the data."""
    generation: dict[str, Any] = field(default_factory=dict)
    """How the model answers, in the words of transformers' GenerationConfig; greedy and up to 128 tokens unless it says otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("image", "conversations"):
            check_name(getattr(self, option), option)
        if self.image == self.conversations:
            raise UserError(
                f"options 'image' and 'conversations' must name different columns, got {self.image!r} twice"
            )
        if self.folder is not None and not isinstance(self.folder, str):
            raise UserError(f"option 'folder' must be the path of a folder, got {self.folder!r}")
        if not isinstance(self.answers, bool):
            raise UserError(f"option 'answers' must be true or false, got {self.answers!r}")
        if self.metric is not None and (self.metric in self.error_metrics) == self.answers:
            raise UserError(
                f"metric {self.metric!r} is for answers: {'false' if self.answers else 'true'}; choose "
                f"{' or '.join(self._scored)}"
            )
        self.generation = {"max_new_tokens": 128, **checked_generation(self.generation)}

    @property
    def main_metric(self) -> str:
        """`perplexity`, or `exact_match` of what the model writes, unless `metric` says otherwise."""
        return self.metric or self._scored[0]

    @property
    def _scored(self) -> tuple[str, ...]:
        return self.metric_names[2:] if self.answers else self.metric_names[:2]

    def columns(self) -> list[str]:
        """Return the columns of the image and of the turns."""
        return [self.image, self.conversations]

    def input_columns(self) -> list[str]:
        """The same: what is to be answered stands among the turns."""
        return self.columns()

    def generates(self, split: str) -> bool:
        """What is predicted, and with `answers` what is scored."""
        return split == "predict" or (self.answers and split != "train")

    def generation_options(self) -> dict[str, Any]:
        """Return the option `generation`, complete."""
        return dict(self.generation)

    def prediction_length(self, max_length: int, positions: int | None) -> int:
        """As of `InstructionTask`; with `answers` prompts are cut as those are that are scored."""
        if self.answers:
            return max_length
        return room_to_go_on(max_length, positions, self.generation)

    def fit(self, train: Dataset) -> None:
        """Check that the training split has the columns; there is nothing to learn."""
        require_columns(train, self.columns(), "train")

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the model keeps its own head."""
        return {}

    def encode(self, data: Dataset, tokenizer: Any, max_length: int | None = None, *, split: str) -> Dataset:
        """Encode conversations by the processor `tokenizer`; see `Task.encode`.

        The images' files stand in `pixel_values`, which the collator reads. Rows that are answered end with the question; where they are
        scored, `gold` is the answer in the data.
        """
        from datasets import Dataset as Table
        from datasets import Features, Sequence, Value, concatenate_datasets

        require_columns(data, self.columns(), split)
        prompter = VisualPrompter(tokenizer)
        text: Any = tokenizer_of(tokenizer)
        limit = resolve_max_length(text, max_length)
        answered = self.generates(split)
        if answered:
            limit = room_for_prompt(limit, self.generation)
        files = image_files(data, self.image, split, self.folder, optional=True)
        rows: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "gold" if answered else "labels": []}
        turns = data.with_format(None).select_columns([self.conversations])
        for number, (held, row) in enumerate(zip(files, turns, strict=True), start=1):
            place = f"{describe_split(data, split)}, row {number}"
            image = open_image(held[FILES]) if has_image(held[FILES]) else None
            conversation = read_conversation(row[self.conversations], image is not None, self.conversations, place)
            if answered:
                ids = prompter.asked(conversation, image, limit, place)
                rows["gold"].append(self._gold(last_answer(conversation), split, place))
            else:
                ids, labels = prompter.answered(conversation, image, limit, place)
                rows["labels"].append(labels)
            rows["input_ids"].append(ids)
            rows["attention_mask"].append([1] * len(ids))
        many = Sequence(Value("int32"))
        texts = Table.from_dict(rows, Features({name: Value("string") if name == "gold" else many for name in rows}))
        encoded = concatenate_datasets([texts, files], axis=1)
        encoded.info.dataset_name = data.info.dataset_name
        return encoded

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a collator that pads texts and prepares images by the processor `tokenizer`.

        Rows with labels are padded at the end, those that the model goes on with at the beginning.
        """
        text = ready_to_pad(cast("PreTrainedTokenizerBase", tokenizer_of(tokenizer)))
        fill = {"input_ids": text.pad_token_id, "attention_mask": 0, "labels": IGNORED}

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = pad_rows(rows, fill, at_end="labels" in rows[0])
            images = [open_image(row[FILES]) for row in rows if has_image(row[FILES])]
            if images:
                batch |= dict(tokenizer.image_processor(images=images, return_tensors="pt"))
            return batch

        return collate

    def reduce_logits(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """Keep -log p of each row's answers, in nats, of shape (rows,)."""
        return answer_losses(logits, labels)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score -log p of shape (rows,) over the tokens of `labels` that are learned, or texts by the `gold` of `encoded`."""
        if not self.answers:
            return score_answers(predictions, labels)
        assert encoded is not None
        golds = encoded["gold"]
        return {
            name: float(np.mean([measure(said, gold) for said, gold in zip(predictions, golds, strict=True)]))
            for name, measure in (("exact_match", exact_match), ("f1", token_f1))
        }

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        """Return per row what the model wrote (`prediction`), or the `perplexity` of its answers and their `tokens`."""
        assert encoded is not None
        if "labels" not in encoded.column_names:
            return [{"prediction": said} for said in predictions]
        return tell_answers(predictions, encoded)

    def _gold(self, answer: str | None, split: str, place: str) -> str:
        if not answer and split != "predict":
            raise UserError(
                f"{place}: the conversation ends with a question or with a blank answer, so there is none to score against; remove it"
            )
        return answer or ""
