"""Instruction tuning: what is learned and scored of instructions and conversations, and what is written for AlpacaEval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import InstructionTask, make_task, read_table, task_from_dict

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = Dataset.from_list(
    [
        {"instruction": "Name a colour.", "input": "", "output": "Blå."},
        {"instruction": "Repeat.", "input": "so", "output": "so so"},
        {"instruction": "Be brief.", "input": "", "output": "ok"},
    ]
)
TALKS = Dataset.from_list(
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hey"}]},
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ]
        },
    ]
)


def task(**options: Any) -> InstructionTask:
    made = make_task("instruction", **options)
    assert isinstance(made, InstructionTask)
    return made


def learned(row: dict[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != -100]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_only_the_answer_is_learned_and_scored(split: str, closing_tokenizer: PreTrainedTokenizerFast) -> None:
    assert not task().generates(split)
    first, second, _ = task().encode(ROWS, closing_tokenizer, 400, split=split)
    assert closing_tokenizer.decode(learned(first)) == "Blå.</s>"
    assert closing_tokenizer.decode(second["input_ids"]).endswith("### Input:\nso\n\n### Response:\nso so</s>")
    assert "### Input" not in closing_tokenizer.decode(first["input_ids"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_of_conversations_all_answers_are_learned_and_scored(
    split: str, closing_tokenizer: PreTrainedTokenizerFast
) -> None:
    closing_tokenizer.chat_template = CHAT
    made = task(messages="messages")
    made.fit(TALKS)
    first, second = made.encode(TALKS, closing_tokenizer, 200, split=split)
    assert closing_tokenizer.decode(first["input_ids"]) == "<user>hi</s><assistant>hey</s>"
    assert closing_tokenizer.decode(learned(second)) == "b</s>d</s>"
    assert made.columns() == made.input_columns() == ["messages"]


def test_ultrafeedbacks_form_is_that_of_messages(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    closing_tokenizer.chat_template = CHAT
    data = TALKS.rename_column("messages", "chosen").add_column("prompt", ["hi", "a"])
    assert len(task(messages="chosen").encode(data, closing_tokenizer, 200, split="train")) == 2


def test_perplexity_is_that_of_the_models_own_loss(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, bos_token_id=0, eos_token_id=1, **sizes)).eval()
    encoded = task().encode(ROWS, closing_tokenizer, 400, split="test")
    batch = task().collator(closing_tokenizer)(list(encoded))
    with torch.no_grad():
        output = model(**batch)
        sums = task().reduce_logits(output.logits, batch["labels"])
    scores = task().metrics(sums.numpy(), batch["labels"].numpy(), encoded)
    assert scores == {
        "perplexity": pytest.approx(math.exp(output.loss.item())),
        "loss": pytest.approx(output.loss.item()),
    }
    rows = task().decode(sums.numpy(), encoded)
    assert [row["tokens"] for row in rows] == [6, 6, 3]  # of bytes and the end; å is two
    assert sum(math.log(row["perplexity"]) * row["tokens"] for row in rows) == pytest.approx(float(sums.sum()))
    assert (task().main_metric, task().greater_is_better) == ("perplexity", False)


def test_a_perplexity_that_is_no_number_is_infinite_and_a_diverged_model_is_reported() -> None:
    assert task().metrics(np.array([5000.0]), np.array([[-100, 3]]))["perplexity"] == math.inf
    with pytest.raises(UserError, match="1 of 1 rows have a loss that is not finite"):
        task().metrics(np.array([np.nan]), np.array([[-100, 3]]))


def test_what_is_written_has_the_form_that_alpaca_eval_reads(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    made = task(generator="tiny-rocoft", generation={"max_new_tokens": 8})
    encoded = made.encode(ROWS, closing_tokenizer, 400, split="predict")
    assert set(encoded.column_names) == {"input_ids", "attention_mask", "instruction"}
    rows = made.decode(np.array(["Red", "so", "yes"], dtype=object), encoded)
    assert rows[0] == {"instruction": "Name a colour.", "output": "Red", "generator": "tiny-rocoft"}
    # Who judges must see the input too.
    assert rows[1]["instruction"] == "Repeat.\n\nso"


def test_of_a_conversation_the_last_question_is_written_down(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    closing_tokenizer.chat_template = CHAT
    made = task(messages="messages", generation={"max_new_tokens": 8})
    encoded = made.encode(TALKS, closing_tokenizer, 200, split="predict")
    assert encoded["instruction"] == ["hi", "c"]
    assert closing_tokenizer.decode(encoded[1]["input_ids"]).endswith("<assistant>b</s><user>c</s><assistant>")
    # AlpacaEval's own questions come without answers.
    alone = Dataset.from_list([{"messages": [{"role": "user", "content": "hi"}]}])
    assert made.encode(alone, closing_tokenizer, 200, split="predict")[0]["input_ids"] == encoded[0]["input_ids"]


def test_training_rows_are_packed_and_others_are_not(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    made = task(packing=True, prompt="{instruction}\n")
    packed = made.encode(ROWS, closing_tokenizer, 64, split="train")
    plain = made.encode(ROWS, closing_tokenizer, 64, split="validation")
    assert len(packed) == 1
    assert sorted(packed["input_ids"][0]) == sorted(token for row in plain["input_ids"] for token in row)
    collate = made.collator(closing_tokenizer)
    assert set(collate(list(packed))) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert set(collate(list(plain))) == {"input_ids", "labels", "attention_mask"}


def test_a_long_instruction_is_cut_before_its_answer(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_list([{"instruction": "why?" * 100, "input": "", "output": "because"}])
    (row,) = task().encode(data, closing_tokenizer, 300, split="test")
    assert len(row["input_ids"]) == 300
    assert closing_tokenizer.decode(learned(row)) == "because</s>"


@pytest.mark.parametrize("bad", [None, "", " "])
def test_a_missing_answer_is_refused_with_its_row(bad: str | None, closing_tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_dict({"instruction": ["a", "b"], "output": ["x", bad]})
    for split in ("train", "test"):
        with pytest.raises(UserError, match=f"split '{split}', row 2: the answer is blank"):
            task().encode(data, closing_tokenizer, 400, split=split)


def test_a_tokenizer_without_chat_template_is_refused(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        UserError, match="column 'messages' holds conversations, but the tokenizer .* has no chat template"
    ):
        task(messages="messages").encode(TALKS, closing_tokenizer, 200, split="train")
    with pytest.raises(UserError, match="option 'chat' is true, but the tokenizer .* has no chat template"):
        task(chat=True).encode(ROWS, closing_tokenizer, 400, split="train")


def test_a_missing_column_is_named(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    closing_tokenizer.chat_template = CHAT
    with pytest.raises(UserError, match="split 'train' has no column 'messages'"):
        task(messages="messages").fit(ROWS)
    with pytest.raises(UserError, match="split 'test' has no column 'messages'"):
        task(messages="messages").encode(ROWS, closing_tokenizer, 200, split="test")
    with pytest.raises(UserError, match="split 'train' has no column 'output'"):
        task().fit(ROWS.remove_columns(["output"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": 3}, "option 'messages' must be the name of a column, got 3"),
        ({"packing": "yes"}, "option 'packing' must be true or false, got 'yes'"),
        ({"generator": ""}, "option 'generator' must be the name of the model, got ''"),
        ({"messages": "m", "chat": True}, "options 'chat' and 'system' are for prompts"),
        (
            {"messages": "m", "architecture": "encoder-decoder"},
            "'messages' and 'packing' are for architecture 'decoder'",
        ),
        (
            {"packing": True, "architecture": "encoder-decoder"},
            "'messages' and 'packing' are for architecture 'decoder'",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(**options)


def test_a_task_is_the_same_after_it_was_saved() -> None:
    made = task(messages="chosen", packing=True, generator="me")
    assert task_from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_alpaca_is_read_as_it_is(
    closing_tokenizer: PreTrainedTokenizerFast, real_data: Callable[[str, str], Path]
) -> None:
    rows = read_table(real_data("alpaca_2k", "test"))
    encoded = task().encode(rows, closing_tokenizer, 4096, split="test")
    for row, read in zip(rows, encoded, strict=True):
        assert closing_tokenizer.decode(learned(read)) == row["output"] + "</s>"
