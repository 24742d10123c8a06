"""Packed rows: nothing is lost, bins are full, and no example sees another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from turnrow.errors import UserError
from turnrow.tasks.packing import PackedCollator, best_fit, pack_rows

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
}
ROWS = Dataset.from_dict(
    {
        "input_ids": [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17, 18]],
        "attention_mask": [[1] * 4, [1] * 2, [1] * 3, [1] * 5],
        "labels": [[-100, -100, 7, 8], [9, 10], [-100, 12, 13], [-100, 15, 16, 17, 18]],
    }
)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_everything_is_in_one_bin_and_no_bin_overflows(lengths: list[int], capacity: int) -> None:
    bins = best_fit(lengths, capacity)
    assert sorted(thing for things in bins for thing in things) == list(range(len(lengths)))
    loads = [sum(lengths[thing] for thing in things) for things in bins]
    assert all(load <= capacity for load in loads)
    # At most one bin is half empty, or two would have been one.
    assert sum(2 * load <= capacity for load in loads) <= 1


def test_each_thing_goes_where_it_fits_best() -> None:
    assert best_fit([6, 5, 3, 5, 1], 10) == [[0, 2, 4], [1, 3]]
    assert best_fit([5, 7, 3], 10) == [[1, 2], [0]]
    assert best_fit([], 10) == []


def test_packing_is_as_tight_as_trls() -> None:
    trl = pytest.importorskip("trl", reason="the extra trl is not installed")
    lengths = [(7 * number) % 23 + 1 for number in range(200)]
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    assert len(best_fit(lengths, 32)) == len(trl.pack_dataset(rows, 32, strategy="bfd"))


def test_packed_rows_keep_tokens_labels_and_positions() -> None:
    packed = pack_rows(ROWS, 7)
    assert packed.column_names == ["input_ids", "labels", "position_ids"]
    assert packed.to_list() == [
        {
            "input_ids": [9, 10, 14, 15, 16, 17, 18],
            "labels": [-100, 10, -100, 15, 16, 17, 18],
            "position_ids": [0, 1, 0, 1, 2, 3, 4],
        },
        {
            "input_ids": [5, 6, 7, 8, 11, 12, 13],
            "labels": [-100, -100, 7, 8, -100, 12, 13],
            "position_ids": [0, 1, 2, 3, 0, 1, 2],
        },
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_no_example_sees_another(kind: str, attention: str) -> None:
    torch.manual_seed(0)
    model: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
    }[kind]()
    model.set_attn_implementation(attention)
    # As a model comes: nobody switches its cache off before the rows are calibrated on.
    assert model.config.use_cache
    model.eval()
    batch = PackedCollator()(list(pack_rows(ROWS, 7)))
    assert batch["input_ids"].shape == (1, 14)
    with torch.no_grad():
        together = model(**batch)
        apart = [model(input_ids=torch.tensor([ids])).logits[0] for ids in ROWS["input_ids"]]
        torch.testing.assert_close(together.logits[0], torch.cat([apart[1], apart[3], apart[0], apart[2]]))
        # The loss is that of all tokens that are learned, each after its own example.
        losses = [
            torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="none")
            for logits, labels in zip(apart, ROWS["labels"], strict=True)
        ]
        total, count = sum(loss.sum() for loss in losses), sum(int((loss != 0).sum()) for loss in losses)
    torch.testing.assert_close(together.loss, total / count)


def test_a_model_that_takes_no_positions_is_refused() -> None:
    rows = list(pack_rows(ROWS, 7).remove_columns(["position_ids"]))
    with pytest.raises(UserError, match="takes no position_ids, so packed examples would see each other"):
        PackedCollator()(rows)
