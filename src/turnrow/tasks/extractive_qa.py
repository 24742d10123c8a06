"""Extractive question answering: the answer is a span of the context, or there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from turnrow.errors import UserError
from turnrow.tasks.answers import Answer, gold_answers, token_span
from turnrow.tasks.columns import check_name, describe_split, require_columns, text_column, value_column
from turnrow.tasks.encoding import encode_rows
from turnrow.tasks.padding import pad_rows
from turnrow.tasks.spans import spans_of_windows
from turnrow.tasks.squad import best_over, best_threshold, exact_match, token_f1
from turnrow.tasks.task import Task
from turnrow.tasks.tokens import ready_to_pad, resolve_max_length
from turnrow.tasks.windows import Frame, window_slices

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

__all__ = ["ExtractiveQATask"]

_OF_VALIDATION = "validation"


class _Context(NamedTuple):
    ids: list[int]
    starts: list[int]
    ends: list[int]


@dataclass(kw_only=True)
class ExtractiveQATask(Task):
    """The span of a context that answers a question, in the form of SQuAD v1.1 and v2.0.

    A column of answers holds ``{"text": [...], "answer_start": [...]}``, or a list of ``{"text": ..., "answer_start": ...}``:
    several right answers, of which the first is learned and the best counts; none, or only blank ones, where the context has no
    answer. `answer_start` counts characters, and the answer must stand there to the letter.

    A context too long for the model is read in windows that overlap; a window without the answer has 'no answer here'
    as its label. A prediction is the span of the greatest sum of the two scores over all windows. Where there are
    questions without an answer, 'no answer' is predicted if its least score over the windows exceeds that of the span by more than
    `no_answer_threshold`.

    Metrics, from 0 to 1: `f1` of words and `exact_match`, as SQuAD scores them. With unanswerable questions also the mean of
    either over those that have an answer (`has_answer_f1`, `has_answer_exact_match`), `no_answer_f1`, the share of the others that were
    left unanswered, and `oracle_f1`: the `f1` of the best threshold *for the split that is scored*, which no one knows beforehand;
    it says what a better threshold could bring and is no result. A mean over no questions counts as 0.
    """

    name: ClassVar[str] = "extractive_qa"
    auto_model = "AutoModelForQuestionAnswering"
    peft_task_type = "QUESTION_ANS"
    label_names: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions")
    metric_names: ClassVar[tuple[str, ...]] = (
        "f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer_f1", "oracle_f1",
    )  # fmt: skip
    mean_loss: ClassVar[bool] = True

    question: str = "question"
    """The column of the question."""
    context: str = "context"
    """The column of the text that it is about."""
    answers: str = "answers"
    """The column of the right answers."""
    id: str | None = None
    """A column that is kept beside the predictions; None: one called `id`, where the data have it."""
    doc_stride: int = 128
    """Tokens that neighbouring windows of a long context have in common; never more than half a window. (The step between windows, as
    transformers counts it with `stride`, is what a window holds of the context less this.)"""
    max_question_length: int = 64
    """Tokens at which a question is cut, and at half of `max_length` in any case."""
    max_answer_length: int = 30
    """Tokens of the longest span that is predicted."""
    n_best: int = 1
    """How many spans `decode` lists as `candidates`, if more than one."""
    unanswerable: bool | None = None
    """Whether there are questions without an answer; None: as the training split says."""
    no_answer_threshold: float | str = 0.0
    """By how much 'no answer' must exceed the best span. ``validation``: chosen after training, on the validation split."""

    with_null: bool = field(default=False, init=False)
    """`unanswerable`, once `fit` has looked."""
    threshold: float = field(default=0.0, init=False)
    """`no_answer_threshold`, once it is chosen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = {option: getattr(self, option) for option in ("question", "context", "answers")}
        if self.id is not None:
            names["id"] = self.id
        for option, name in names.items():
            check_name(name, option)
        if len(set(names.values())) < len(names):
            raise UserError(f"options {', '.join(names)} must name different columns, got {names}")
        for option, least in (("doc_stride", 0), ("max_question_length", 1), ("max_answer_length", 1), ("n_best", 1)):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"option {option!r} must be a whole number from {least}, got {value!r}")
        if self.unanswerable is not None and not isinstance(self.unanswerable, bool):
            raise UserError(f"option 'unanswerable' must be true, false or left out, got {self.unanswerable!r}")
        self._take_threshold()

    @property
    def settles(self) -> bool:
        """Whether the threshold is chosen on the validation split."""
        return self.no_answer_threshold == _OF_VALIDATION

    def columns(self) -> list[str]:
        """Return the columns of the question, its context and the answers, behind that of `id`, which data may lack."""
        others = [*self.input_columns(), self.answers]
        name = self.id or "id"
        return others if name in others else [name, *others]

    def input_columns(self) -> list[str]:
        """The question and its context."""
        return [self.question, self.context]

    def _required(self) -> list[str]:
        """What data to train on or to score must have: an `id` only if it was named."""
        return [*([] if self.id is None else [self.id]), *self.input_columns(), self.answers]

    def fit(self, train: Dataset) -> None:
        """Look whether there are questions without an answer."""
        require_columns(train, self._required(), "train")
        missing = [not answers for answers in self._gold(train, "train")]
        if all(missing):
            raise UserError(
                f"{describe_split(train, 'train')}: no question has an answer, so there is none to learn; column "
                f"{self.answers!r} must hold texts and their places"
            )
        self.with_null = any(missing) if self.unanswerable is None else self.unanswerable
        if not self.with_null and self.metric not in (None, "f1", "exact_match"):
            raise UserError(
                f"{describe_split(train, 'train')}: metric {self.metric!r} is for data with unanswerable questions, and "
                "here every question has an answer; choose 'f1' or 'exact_match'"
            )

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the head has two outputs whatever the data."""
        return {}

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, split: str
    ) -> Dataset:
        """Encode each question with the windows of its context, one row each; see `Task.encode`.

        But for the training split, rows carry what an answer is cut out by: `example` (from 0), `context_start`, the `starts` and `ends`
        of the window's tokens in the context, `null_position`, and, the first row of an example, its `context` and `gold`.
        """
        labelled, decoded = split != "predict", split != "train"
        require_columns(data, self._required() if labelled else self.input_columns(), split)
        for column in (self.question, self.context):
            text_column(data, column, split)
        golds = self._gold(data, split) if labelled else []
        if not self.with_null:
            self._refuse_unanswered(golds, data, split)
        frame = Frame.of(tokenizer)
        room = frame.room(resolve_max_length(tokenizer, max_length, pair=True))
        if room < 2:
            raise UserError(
                f"max_length leaves {max(room, 0)} tokens for question and context, and each needs at least one; raise it"
            )

        def encode_batch(batch: dict[str, list[str]], numbers: list[int]) -> dict[str, list[Any]]:
            rows: dict[str, list[Any]] = {name: [] for name in features}
            contexts = _tokenize_contexts(batch[self.context], tokenizer)
            questions = tokenizer(batch[self.question], add_special_tokens=False, verbose=False)["input_ids"]
            for number, text, question in zip(numbers, batch[self.context], questions, strict=True):
                answer = golds[number][0] if labelled and golds[number] else None
                for row in self._rows(question, contexts[text], answer, frame, room):
                    first = not rows["example"] or rows["example"][-1] != number
                    row |= {
                        "example": number,
                        "context": text if first else "",
                        "gold": [gold.text for gold in golds[number]] if labelled and first else [],
                    }
                    for name, held in rows.items():
                        held.append(row[name])
            return rows

        features = _features(frame.types is not None, labelled)
        encoded = encode_rows(data, encode_batch, split, batched=True, features=features)
        return encoded if decoded else encoded.select_columns([name for name in features if name in _READ])

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a collator that pads at the end, whatever the tokenizer would do: labels count from the beginning."""
        fill = {"input_ids": ready_to_pad(tokenizer).pad_token_id, "attention_mask": 0, "token_type_ids": 0}

        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            import torch

            batch = pad_rows(rows, fill)
            for name in self.label_names:
                if name in rows[0]:
                    batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.long)
            return batch

        return collate

    def reduce_logits(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """Keep the scores of each token as first and as last one, of shape (rows, tokens, 2)."""
        import torch

        return torch.stack([logits[0], logits[1]], dim=-1)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        """Score the scores of tokens, of shape (rows, tokens, 2), by the `gold` of `encoded`."""
        assert encoded is not None
        rows = self.decode(predictions, encoded)
        golds = _of_examples(encoded, "gold")
        measured = {
            name: np.array([best_over(measure, row["prediction"], gold) for row, gold in zip(rows, golds, strict=True)])
            for name, measure in (("f1", token_f1), ("exact_match", exact_match))
        }
        scores = {name: float(values.mean()) for name, values in measured.items()}
        if self.with_null:
            answerable = np.array([bool(gold) for gold in golds])
            scores |= {f"has_answer_{name}": _mean(values[answerable]) for name, values in measured.items()}
            scores["no_answer_f1"] = _mean(measured["f1"][~answerable])
            scores["oracle_f1"] = best_threshold(_with_gold(rows, golds))[1]
        return {name: scores[name] for name in self.metric_names if name in scores}

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        """Return for each question the answer as the context has it (`prediction`), where it begins, and its `score`.

        Where there are questions without an answer, also what 'no answer' has above the best span (`null_score_difference`) and the best
        span whether or not it is predicted (`best_answer`); of a question left unanswered the prediction is empty and
        `start` None. With `n_best` above 1, as many spans as `candidates`, the best first.
        """
        assert encoded is not None
        return [self._decode_example(rows, predictions) for rows in _examples(encoded)]

    def settle(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset) -> None:
        """Choose the threshold by the validation split, for the main metric if that is `exact_match`, else for `f1`."""
        rows = _with_gold(self.decode(predictions, encoded), _of_examples(encoded, "gold"))
        metric = "exact_match" if self.main_metric == "exact_match" else "f1"
        self.threshold = best_threshold(rows, metric=metric)[0] if self.with_null else 0.0

    def _rows(
        self, question: list[int], context: _Context, answer: Answer | None, frame: Frame, room: int
    ) -> Iterator[dict[str, Any]]:
        question = question[: min(self.max_question_length, room // 2)]
        span = None if answer is None else token_span(answer, context.starts, context.ends)
        for part in window_slices(len(context.ids), room - len(question), self.doc_stride):
            window = frame.window(question, context.ids[part])
            first = last = window.null
            if span is not None and part.start <= span[0] and span[1] < part.stop:
                first, last = (place - part.start + window.context_start for place in span)
            yield {
                "input_ids": window.input_ids,
                "attention_mask": [1] * len(window.input_ids),
                "token_type_ids": window.token_type_ids,
                "start_positions": first,
                "end_positions": last,
                "context_start": window.context_start,
                "starts": context.starts[part],
                "ends": context.ends[part],
                "null_position": window.null,
            }

    def _decode_example(self, windows: Sequence[Mapping[str, Any]], predictions: np.ndarray) -> dict[str, Any]:
        spans, null = spans_of_windows(windows, predictions, self.max_answer_length, self.n_best)
        text = windows[0]["context"]
        candidates: list[dict[str, Any]] = [
            {"text": text[span.start : span.end], "start": span.start, "score": span.score} for span in spans
        ]
        # Of a context without a token, 'no answer' is all there is.
        best: dict[str, Any] = candidates[0] if candidates else {"text": "", "start": None, "score": null}
        difference = null - best["score"]
        silent = self.with_null and difference > self.threshold
        chosen = {"text": "", "start": None, "score": null} if silent else best
        answer = {"prediction": chosen["text"], "start": chosen["start"], "score": chosen["score"]}
        if self.with_null:
            answer |= {"null_score_difference": difference, "best_answer": best["text"]}
        return answer if self.n_best == 1 else answer | {"candidates": candidates}

    def _gold(self, data: Dataset, split: str) -> list[list[Answer]]:
        """The right answers of each row, checked; none where there is no answer."""
        values, contexts = value_column(data, self.answers, split), text_column(data, self.context, split)
        return [
            gold_answers(value, context, self.answers, f"{describe_split(data, split)}, row {row}")
            for row, (value, context) in enumerate(zip(values, contexts, strict=True), start=1)
        ]

    def _refuse_unanswered(self, golds: Sequence[Sequence[Answer]], data: Dataset, split: str) -> None:
        for row, gold in enumerate(golds, start=1):
            if not gold:
                raise UserError(
                    f"{describe_split(data, split)}, row {row}: column {self.answers!r} holds no answer; "
                    + (
                        "option 'unanswerable' is false: leave it out, or remove the row"
                        if self.unanswerable is False
                        else "in training every question had one. Train with unanswerable: true, or remove the row"
                    )
                )

    def _take_threshold(self) -> None:
        given: object = self.no_answer_threshold
        if given == _OF_VALIDATION:
            return
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
            raise UserError(f"option 'no_answer_threshold' must be a number or {_OF_VALIDATION!r}, got {given!r}")
        self.threshold = float(given)

    def _learned(self) -> dict[str, Any]:
        return {"with_null": self.with_null, "threshold": self.threshold}

    def _restore(self, learned: Mapping[str, Any]) -> None:
        with_null, threshold = learned.get("with_null"), learned.get("threshold")
        if not isinstance(with_null, bool) or not isinstance(threshold, int | float) or isinstance(threshold, bool):
            raise UserError(
                f"the saved task {self.name!r} is broken: 'with_null' must be true or false and 'threshold' a number, got "
                f"{with_null!r} and {threshold!r}"
            )
        self.with_null, self.threshold = with_null, float(threshold)


# What a model reads of a row, labels among it.
_READ = ("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions")


def _features(types: bool, labelled: bool) -> Features:
    from datasets import Features, Sequence, Value

    whole, text, many = Value("int32"), Value("string"), Sequence(Value("int32"))
    columns = {
        "input_ids": many,
        **({"token_type_ids": many} if types else {}),
        "attention_mask": many,
        **({"start_positions": whole, "end_positions": whole} if labelled else {}),
        "example": whole,
        "context_start": whole,
        "starts": many,
        "ends": many,
        "null_position": whole,
        "context": text,
        **({"gold": Sequence(text)} if labelled else {}),
    }
    return Features(columns)


def _tokenize_contexts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, _Context]:
    """Each context once: several questions share one."""
    distinct = list(dict.fromkeys(texts))
    encoded = tokenizer(distinct, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return {
        text: _Context(list(ids), [start for start, _ in places], [end for _, end in places])
        for text, ids, places in zip(distinct, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    }


def _examples(encoded: Dataset) -> Iterator[list[dict[str, Any]]]:
    """The rows of each example, each with its number as `row`."""
    names = ["example", "context_start", "starts", "ends", "null_position", "context"]
    group: list[dict[str, Any]] = []
    for number, window in enumerate(encoded.with_format(None).select_columns(names)):
        if group and window["example"] != group[0]["example"]:
            yield group
            group = []
        group.append({**window, "row": number})
    if group:
        yield group


def _of_examples(encoded: Dataset, column: str) -> list[Any]:
    """The values of a column that the first row of each example holds."""
    plain = encoded.with_format(None)
    examples = plain["example"][:]
    return [v for n, v in enumerate(plain[column][:]) if n == 0 or examples[n] != examples[n - 1]]


def _with_gold(rows: Sequence[Mapping[str, Any]], golds: Sequence[list[str]]) -> list[dict[str, Any]]:
    return [{**row, "answers": gold} for row, gold in zip(rows, golds, strict=True)]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
