from __future__ import annotations

from typing import Any

import pytest
import torch

from turnrow.errors import UserError
from turnrow.tasks import label_word_ids, label_word_logits
from turnrow.tasks.label_words import label_classes

from .prompting import bpe_tokenizer

IGNORED = -100


def test_the_logits_are_those_of_the_words_at_the_marked_places() -> None:
    logits = torch.arange(2 * 4 * 10.0).reshape(2, 4, 10)
    labels = torch.full((2, 4), IGNORED)
    labels[0, 2], labels[1, 0] = 7, 3
    assert label_word_logits(logits, labels, [7, 3]).tolist() == [[27.0, 23.0], [47.0, 43.0]]
    assert label_classes(labels, [7, 3]).tolist() == [0, 1]


def test_tokens_that_a_method_puts_before_a_row_are_passed_over() -> None:
    logits = torch.randn(2, 4, 10)
    labels = torch.tensor([[IGNORED, IGNORED, 7, IGNORED], [3, IGNORED, IGNORED, IGNORED]])
    longer = torch.cat([torch.full((2, 5, 10), torch.nan), logits], dim=1)
    assert torch.equal(label_word_logits(longer, labels, [7, 3]), label_word_logits(logits, labels, [7, 3]))


def test_token_0_can_be_a_word() -> None:
    labels = torch.tensor([[IGNORED, 0], [5, IGNORED]])
    assert label_classes(labels, [5, 0]).tolist() == [1, 0]


@pytest.mark.parametrize(("lead", "piece"), [(" It was ", "Ġgreat"), ("", "Ġgreat"), ("\n", "Ġgreat"), ("(", "great")])
def test_a_word_has_the_blank_that_it_has_in_the_text(lead: str, piece: str) -> None:
    tokenizer = bpe_tokenizer()
    (token,) = label_word_ids(tokenizer, {"1": "great"}, lead)
    assert tokenizer.convert_ids_to_tokens(token) == piece


def test_words_of_a_word_list_are_found_whatever_precedes_them(tiny_tokenizer: Any) -> None:
    for lead in ("", "it was ", "("):
        ids = label_word_ids(tiny_tokenizer, {"0": "Bad", "1": "good"}, lead)
        assert tiny_tokenizer.convert_ids_to_tokens(ids) == ["bad", "good"]


def test_a_word_of_several_tokens_is_refused_with_its_pieces() -> None:
    with pytest.raises(
        UserError,
        match=r"label word 'grz' of class '1' becomes 'Ġg', 'r', 'z' in the vocabulary of .* must be a single",
    ):
        label_word_ids(bpe_tokenizer(), {"0": "bad", "1": "grz"}, " ")


def test_a_word_outside_the_vocabulary_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="label word 'terrible' of class '0' is not in the vocabulary"):
        label_word_ids(tiny_tokenizer, {"0": "terrible", "1": "great"})


def test_two_classes_with_one_token_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="label words of classes '0' and '1' are the same token, 'good'"):
        label_word_ids(tiny_tokenizer, {"0": "Good", "1": "good"})
