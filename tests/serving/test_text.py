"""Text of an answer, token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnrow.serving.text import AnswerText


def pieces(tokenizer, text: str, stop=(), prompt: str = "x") -> list[str]:
    answer = AnswerText(tokenizer, tokenizer(prompt)["input_ids"], stop)
    out = []
    for token in tokenizer(text)["input_ids"]:
        out.append(answer.add(token))
        if answer.stopped:
            break
    return [*out, answer.finish()]


@given(text=st.text(min_size=1, max_size=12))
def test_the_pieces_are_the_text_and_none_ends_within_a_character(byte_tokenizer, text):
    text = text.replace("\ufffd", "").encode("utf-8", "ignore").decode()
    found = pieces(byte_tokenizer, text)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_a_character_of_four_tokens_comes_with_its_last(byte_tokenizer):
    assert pieces(byte_tokenizer, "a🙂b") == ["a", "", "", "", "🙂", "b", ""]


def test_an_answer_that_is_cut_within_a_character_drops_it(byte_tokenizer):
    answer = AnswerText(byte_tokenizer, [], ())
    tokens = byte_tokenizer("né🙂")["input_ids"]
    assert "".join([*(answer.add(token) for token in tokens[:-1]), answer.finish()]) == "né"


def test_bytes_that_are_no_text_are_shown_as_such_and_the_text_goes_on(byte_tokenizer):
    (bad,) = (token for token in range(byte_tokenizer.vocab_size) if byte_tokenizer.convert_ids_to_tokens(token) == "ÿ")
    answer = AnswerText(byte_tokenizer, [], ())
    text = "".join([*(answer.add(token) for token in [bad, bad, *byte_tokenizer("ok")["input_ids"]]), answer.finish()])
    assert text == "\ufffd\ufffdok"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "o t"], "one tw"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("no stop", ["stopped"], "no stop"),
        ("é🙂é", ["🙂"], "é"),
    ],
)
def test_an_answer_ends_before_its_first_stop_string(byte_tokenizer, text, stop, expected):
    assert "".join(pieces(byte_tokenizer, text, stop)) == expected


def test_no_piece_holds_the_beginning_of_a_stop_string_that_comes(byte_tokenizer):
    found = pieces(byte_tokenizer, "say STO and STOP now", ["STOP"])
    assert "".join(found) == "say STO and "
    shown = ""
    for piece in found:
        shown += piece
        assert not shown.endswith(("S", "ST")) or shown.endswith("STO "), shown


def test_special_tokens_have_no_text(byte_tokenizer):
    answer = AnswerText(byte_tokenizer, [], ())
    end = byte_tokenizer.convert_tokens_to_ids("<|end|>")
    assert [answer.add(token) for token in [end, *byte_tokenizer("a")["input_ids"]]] == ["", "a"]


def test_a_first_word_keeps_the_space_that_only_its_prompt_tells(byte_tokenizer):
    """As with sentencepiece, whose decoder takes the space off the first word of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert AnswerText(tokenizer, [0]).add(1) == " two"
    assert tokenizer.decode([1]) == "two"
