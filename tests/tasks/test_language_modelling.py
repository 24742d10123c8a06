"""Language modelling: blocks of running text, and perplexities that can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import make_task
from turnrow.tasks.likelihood import answer_losses, token_losses

TEXTS = Dataset.from_dict({"text": ["abcde", "ö", "", "xyz"]})


def test_texts_follow_each_other_in_blocks(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = make_task("language_modelling").encode(TEXTS, closing_tokenizer, 5, split="train")
    assert [closing_tokenizer.decode(row) for row in encoded["input_ids"]] == ["abcde", "</s>ö</s></s>", "xyz</s>"]
    assert encoded["labels"] == encoded["input_ids"]
    assert encoded["example"] == [[0] * 5, [0, 1, 1, 1, 2], [3] * 4]
    assert encoded["bytes"] == [5, 2, 3]


def test_a_last_block_of_one_token_takes_one_from_the_block_before(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = make_task("language_modelling").encode(
        Dataset.from_dict({"text": ["abcdef"]}), closing_tokenizer, 3, split="test"
    )
    assert [len(row) for row in encoded["input_ids"]] == [3, 2, 2]


def test_losses_are_those_of_the_model(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    ids = torch.randint(0, 258, (3, 7))
    labels = ids.clone()
    labels[1, 4:] = -100
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    losses = token_losses(output.logits, labels)
    assert losses.shape == (3, 7)
    assert losses[:, 0].eq(0).all()
    assert losses[1, 4:].eq(0).all()
    torch.testing.assert_close(losses.sum() / (labels[:, 1:] != -100).sum(), output.loss)


@pytest.mark.parametrize("virtual", [0, 1, 3])
def test_outputs_of_virtual_tokens_before_the_text_foresee_nothing(virtual: int) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :2] = -100
    expected = torch.zeros(2, 5)
    for row, place in [(0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4)]:
        expected[row, place] = -logits[row, place - 1].log_softmax(dim=0)[labels[row, place]]
    given = torch.cat([torch.randn(2, virtual, 7), logits], dim=1)
    torch.testing.assert_close(token_losses(given, labels), expected)
    torch.testing.assert_close(answer_losses((given, torch.empty(0)), labels), expected.sum(dim=1))


def test_perplexity_is_over_tokens_and_bits_are_over_bytes(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task("language_modelling")
    encoded = task.encode(TEXTS, closing_tokenizer, 5, split="test")
    labels = np.full((3, 5), -100)
    for row, block in enumerate(encoded["labels"]):
        labels[row, : len(block)] = block
    # The first token of a block and the padding behind the last block do not count, whatever stands there.
    losses = np.where(labels == -100, 99.0, 2.0)
    losses[:, 0] = 77.0
    scores = task.metrics(losses, labels, encoded)
    assert scores == pytest.approx({"perplexity": math.e**2, "loss": 2.0, "bits_per_byte": 11 * 2 / math.log(2) / 10})
    assert [row["tokens"] for row in task.decode(losses, encoded)] == [4, 3, 1, 3]
    assert task.decode(losses, encoded)[3]["perplexity"] == pytest.approx(math.e**2)
    assert not task.greater_is_better


def test_a_text_without_a_counted_token_has_no_perplexity(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task("language_modelling")
    rows = Dataset.from_dict({"text": ["ab", "", "cd"]})
    encoded = task.encode(rows, closing_tokenizer, 3, split="test")
    assert task.decode(np.ones((3, 3)), encoded)[1] == {"perplexity": None, "tokens": 0}


def test_an_endless_loss_is_an_endless_perplexity(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task("language_modelling")
    assert task.metrics(np.full((1, 3), 1e4), np.ones((1, 3), dtype=int))["perplexity"] == math.inf
    with pytest.raises(UserError, match="1 of 2 blocks have a loss that is not finite"):
        task.metrics(np.array([[0.0, np.nan], [0.0, 1.0]]), np.ones((2, 2), dtype=int))


def test_texts_without_an_end_token_are_taken_as_they_are(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    closing_tokenizer.eos_token = None
    encoded = make_task("language_modelling").encode(
        Dataset.from_dict({"text": ["abc", "de"]}), closing_tokenizer, 10, split="test"
    )
    assert closing_tokenizer.decode(encoded["input_ids"][0]) == "abcde"
    with pytest.raises(UserError, match="split 'test', row 3: the text is empty, and this tokenizer has no end-of-seq"):
        make_task("language_modelling").encode(TEXTS, closing_tokenizer, 10, split="test")


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [
        ({"text": [""]}, 8, "split 'train' holds no text of two tokens"),
        ({"text": ["abc"]}, 2, "blocks of at least 3 tokens"),
        ({"text": ["abc", None]}, 8, "row 2: column 'text' has no value"),
        ({"text": [3]}, 8, "row 1: column 'text' must hold text, got 3"),
        ({"body": ["abc"]}, 8, "no column 'text'"),
    ],
)
def test_what_holds_no_text_is_refused(
    rows: dict[str, list[object]], length: int, message: str, closing_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=message):
        make_task("language_modelling").encode(Dataset.from_dict(rows), closing_tokenizer, length, split="train")
    with pytest.raises(UserError, match="option 'text' must be the name of a column, got \\['a'\\]"):
        make_task("language_modelling", text=["a"])
