"""Single tokens, of every sort of tokenizer."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from turnrow.serving import Event, TokenLogprob
from turnrow.serving.http.pieces import AnswerPieces, completion_logprobs
from turnrow.serving.http.tokens import TokenTexts

TEXTS = ["the cat", " caf\u00e9", "\u4e16\u754c \U0001f600!", "a\nb\tc"]


def pieces_tokenizer():
    """In the manner of Llama 2: pieces of words with a mark for spaces, and bytes for what is in none."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_the_bytes_of_all_tokens_are_those_of_the_text(kind, text, byte_tokenizer):
    tokenizer = byte_tokenizer if kind == "bytes" else pieces_tokenizer()
    tokens = TokenTexts(tokenizer)
    data = b"".join(tokens[token].data for token in tokenizer(text)["input_ids"])
    assert data.decode() == (text if kind == "bytes" else f" {text}")


def test_a_part_of_a_character_is_written_as_its_bytes(byte_tokenizer):
    tokens = TokenTexts(byte_tokenizer)
    first, second = byte_tokenizer("\u00e9")["input_ids"]
    assert (tokens[first].text, tokens[first].data) == ("bytes:\\xc3", b"\xc3")
    assert (tokens[second].text, tokens[second].data) == ("bytes:\\xa9", b"\xa9")


def test_special_tokens_and_those_beyond_the_tokenizer_are_known(byte_tokenizer):
    tokens = TokenTexts(byte_tokenizer)
    assert (tokens[0].text, tokens[0].is_special) == ("<|end|>", True)
    assert (tokens[5000].text, tokens[5000].data, tokens[5000].is_special) == ("<5000>", b"", True)


def test_tokens_that_are_words_are_what_they_decode_to(tiny_tokenizer):
    tokens = TokenTexts(tiny_tokenizer)
    assert tokens[tiny_tokenizer.convert_tokens_to_ids("cat")].text == "cat"
    assert tokens[tiny_tokenizer.sep_token_id].is_special


def shown(byte_tokenizer, events, ends=frozenset()):
    pieces = AnswerPieces(TokenTexts(byte_tokenizer), ends)
    return [[one.token.text for one in pieces.add(event)] for event in events]


def event_of(token, text, reason=None):
    return Event(0, text, (token,), (TokenLogprob(token, -1.0),), reason)


def test_tokens_go_out_with_their_text(byte_tokenizer):
    """Of `ab`, held back as it may begin a stop string; then it was none; then the stop string itself."""
    a, b, c, d = byte_tokenizer("abcd")["input_ids"]
    events = [event_of(a, ""), event_of(b, ""), event_of(c, "abc"), event_of(a, ""), event_of(d, "", "stop")]
    assert shown(byte_tokenizer, events) == [[], [], ["a", "b", "c"], [], []]


def test_the_token_that_ends_a_sequence_is_not_shown_and_those_before_are(byte_tokenizer):
    first, second = byte_tokenizer("\u00e9")["input_ids"]
    events = [event_of(first, ""), event_of(0, "", "stop")]
    assert shown(byte_tokenizer, events, frozenset([0])) == [[], ["bytes:\\xc3"]]
    assert shown(byte_tokenizer, [event_of(first, ""), event_of(second, "\u00e9", "length")]) == [
        [],
        ["bytes:\\xc3", "bytes:\\xa9"],
    ]


def test_an_infinite_log_probability_is_a_number_in_json(byte_tokenizer):
    texts = TokenTexts(byte_tokenizer)
    token = byte_tokenizer("a")["input_ids"][0]
    logprob = TokenLogprob(token, float("-inf"), ((token, float("-inf")),))
    found = completion_logprobs(AnswerPieces(texts, frozenset()).add(Event(0, "a", (token,), (logprob,))), texts)
    assert found["token_logprobs"] == [-9999.0]
    assert found["top_logprobs"] == [{"a": -9999.0}]
