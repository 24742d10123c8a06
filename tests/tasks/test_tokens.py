from __future__ import annotations

import logging
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import make_task, ready_to_pad, resolve_max_length
from turnrow.tasks.tokens import DEFAULT_MAX_LENGTH, tokenize


def test_default_length_is_the_tokenizers_where_it_has_one(tiny_tokenizer: Any) -> None:
    assert resolve_max_length(tiny_tokenizer, None) == 64


def test_default_length_is_512_where_the_tokenizer_was_told_none(tiny_decoder_tokenizer: Any) -> None:
    assert tiny_decoder_tokenizer.model_max_length > 1e29
    assert resolve_max_length(tiny_decoder_tokenizer, None) == DEFAULT_MAX_LENGTH == 512


def test_wished_length_goes_before_the_tokenizers(tiny_tokenizer: Any) -> None:
    assert resolve_max_length(tiny_tokenizer, 7) == 7
    assert resolve_max_length(tiny_tokenizer, 1000) == 1000


def test_length_must_leave_room_for_text(tiny_tokenizer: Any) -> None:
    assert resolve_max_length(tiny_tokenizer, 3) == 3
    with pytest.raises(UserError, match=r"larger than the 2 special tokens that the tokenizer adds.*got 2"):
        resolve_max_length(tiny_tokenizer, 2)
    with pytest.raises(UserError, match=r"larger than the 3 special tokens.*got 3"):
        resolve_max_length(tiny_tokenizer, 3, pair=True)


@pytest.mark.parametrize("length", [0, -5])
def test_length_without_special_tokens_is_at_least_one(tiny_decoder_tokenizer: Any, length: int) -> None:
    assert resolve_max_length(tiny_decoder_tokenizer, 1) == 1
    with pytest.raises(UserError, match=f"max_length must be larger than the 0 special tokens.*got {length}"):
        resolve_max_length(tiny_decoder_tokenizer, length)


@pytest.mark.parametrize("length", ["128", 12.5, True])
def test_length_must_be_a_whole_number(tiny_tokenizer: Any, length: object) -> None:
    with pytest.raises(UserError, match=f"max_length must be a whole number of tokens, got {length!r}"):
        resolve_max_length(tiny_tokenizer, length)  # type: ignore[arg-type]


def test_pad_token_that_is_there_stays(tiny_tokenizer: Any) -> None:
    assert ready_to_pad(tiny_tokenizer).pad_token == "[PAD]"


def test_decoder_pads_with_its_end_of_sequence_token_and_no_new_one(tiny_decoder_tokenizer: Any) -> None:
    size = len(tiny_decoder_tokenizer)
    assert tiny_decoder_tokenizer.pad_token_id is None
    assert ready_to_pad(tiny_decoder_tokenizer) is tiny_decoder_tokenizer
    assert tiny_decoder_tokenizer.pad_token_id == tiny_decoder_tokenizer.eos_token_id
    assert len(tiny_decoder_tokenizer) == size


def test_tokenizer_that_cannot_pad_is_refused(tiny_decoder_tokenizer: Any) -> None:
    tiny_decoder_tokenizer.eos_token = None
    with pytest.raises(UserError, match="has neither a pad token nor an end-of-sequence token"):
        ready_to_pad(tiny_decoder_tokenizer)


def test_of_a_pair_the_longer_text_is_cut_first(tiny_tokenizer: Any) -> None:
    long, short = "the cat sat on the red house", "a dog"
    ids = tokenize(tiny_tokenizer, [long, short], [short, long], 9)["input_ids"]
    assert [tiny_tokenizer.decode(row) for row in ids] == [
        "[CLS] the cat sat on [SEP] a dog [SEP]",
        "[CLS] a dog [SEP] the cat sat on [SEP]",
    ]


def test_decoder_sees_a_newline_between_the_texts_of_a_pair(tiny_decoder_tokenizer: Any) -> None:
    ids = tokenize(tiny_decoder_tokenizer, ["one"], ["two"], 64)["input_ids"][0]
    assert tiny_decoder_tokenizer.decode(ids) == "one\ntwo"


def test_token_types_come_along_where_the_tokenizer_makes_them(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoded = tokenize(tiny_tokenizer, ["a dog"], ["a cat"], 64)
    assert encoded["token_type_ids"] == [[0, 0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("language_modelling", {}),
        ("instruction", {"prompt": "Say: {asked}", "target": "{text}"}),
        ("instruction", {"prompt": "Say: {asked}", "target": "{text}", "architecture": "encoder-decoder"}),
        ("instruction", {"prompt": "Say: {asked}", "target": "{text}", "chat": True}),
        ("instruction", {"messages": "messages"}),
    ],
)
def test_texts_that_are_cut_are_no_reason_to_warn(
    closing_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, kind: str, options: dict[str, Any]
) -> None:
    closing_tokenizer.model_max_length = 40
    closing_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    long = "a" * 200
    messages = [{"role": "user", "content": long}, {"role": "assistant", "content": long}]
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        rows = make_task(kind, **options).encode(
            Dataset.from_list([{"text": long, "asked": long, "messages": messages}]), closing_tokenizer, split="train"
        )
        assert max(map(len, rows["input_ids"])) == 40
        assert not caplog.messages
        closing_tokenizer(long)
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
