from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnrow.errors import UserError
from turnrow.tasks.windows import Frame, window_slices

from .reading import CONTEXT, QUESTION


@pytest.fixture
def typed_tokenizer(tiny_tokenizer: Any) -> Any:
    """One that tells question and context apart by token types, as BERT's does."""
    tiny_tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tiny_tokenizer


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 30))
def test_windows_cover_the_text_and_overlap(length: int, room: int, overlap: int) -> None:
    windows = list(window_slices(length, room, overlap))
    assert windows[0].start == 0
    assert windows[-1].stop == length
    assert all(window.stop - window.start <= room for window in windows)
    shared = min(overlap, room // 2)
    for before, after in itertools.pairwise(windows):
        assert before.stop - before.start == room
        assert before.stop - after.start == shared
        assert after.stop > before.stop


def test_no_text_has_one_empty_window() -> None:
    assert list(window_slices(0, 5, 2)) == [slice(0, 0)]


def test_windows_are_those_of_the_tokenizer(tiny_tokenizer: Any) -> None:
    """transformers' own way of long contexts gives the same rows, to the last special token."""
    frame = Frame.of(tiny_tokenizer)
    question = tiny_tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    context = tiny_tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    for max_length in (len(question) + 7, len(question) + 10, 60):
        room = frame.room(max_length) - len(question)
        overlap = min(2, room // 2)
        theirs = tiny_tokenizer(
            QUESTION, CONTEXT, max_length=max_length, truncation="only_second", stride=overlap,
            return_overflowing_tokens=True, return_token_type_ids=True,
        )  # fmt: skip
        ours = [frame.window(question, context[part]) for part in window_slices(len(context), room, overlap)]
        assert [window.input_ids for window in ours] == theirs["input_ids"]
        for window, row in zip(ours, range(len(ours)), strict=True):
            assert window.context_start == theirs.sequence_ids(row).index(1)
            assert window.input_ids[window.null] == tiny_tokenizer.cls_token_id


def test_token_types_are_the_tokenizers(typed_tokenizer: Any) -> None:
    frame = Frame.of(typed_tokenizer)
    question, context = (typed_tokenizer(t, add_special_tokens=False)["input_ids"] for t in (QUESTION, CONTEXT))
    window = frame.window(question, context)
    theirs = typed_tokenizer(QUESTION, CONTEXT)
    assert window.input_ids == theirs["input_ids"]
    assert window.token_type_ids == theirs["token_type_ids"]
    assert set(theirs["token_type_ids"]) == {0, 1}


def test_without_a_class_token_the_end_of_the_row_says_no_answer(tiny_decoder_tokenizer: Any) -> None:
    """GPT-2 puts nothing around a pair: a newline parts it, and its end-of-sequence token is added."""
    frame = Frame.of(tiny_decoder_tokenizer)
    question, context = (tiny_decoder_tokenizer(text)["input_ids"] for text in ("who?", "a cat"))
    window = frame.window(question, context)
    assert tiny_decoder_tokenizer.decode(window.input_ids) == "who?\na cat<|endoftext|>"
    assert window.null == len(window.input_ids) - 1
    assert tiny_decoder_tokenizer.decode(window.input_ids[window.context_start :]) == "a cat<|endoftext|>"


def test_the_tokens_that_a_decoder_puts_before_a_text_stay(closing_tokenizer: Any) -> None:
    from tokenizers import processors

    closing_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    window = Frame.of(closing_tokenizer).window([5], [6, 7])
    assert window.input_ids == [0, 5, 0, 6, 7, closing_tokenizer.eos_token_id]
    assert (window.context_start, window.null) == (3, 5)


def test_a_tokenizer_without_either_token_is_refused(tiny_decoder_tokenizer: Any) -> None:
    tiny_decoder_tokenizer.eos_token = None
    with pytest.raises(
        UserError, match="has neither a class token nor an end-of-sequence token to stand for 'no answer"
    ):
        Frame.of(tiny_decoder_tokenizer)
