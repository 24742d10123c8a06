"""Tasks whose answer the model writes: what it is shown in training, and what it is shown when it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import GenerationTask

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = Dataset.from_dict(
    {
        "question": ["is 2 odd", "what is ö", ""],
        "hint": ["", "a letter", ""],
        "answer": ["no", "an o with dots", "?"],
        "gold": ["NO-GOLD", "O-GOLD", "NONE-GOLD"],
    }
)


@dataclass(kw_only=True)
class Reply(GenerationTask):
    """Scored against another column than the one that is learned."""

    name: ClassVar[str] = "reply"
    metric_names: ClassVar[tuple[str, ...]] = ("exact_match",)

    def gold_columns(self) -> list[str]:
        return ["gold"]

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, encoded: Dataset | None = None) -> dict[str, float]:
        assert encoded is not None
        return {"exact_match": float(np.mean([p == g for p, g in zip(predictions, encoded["gold"], strict=True)]))}

    def decode(self, predictions: np.ndarray, encoded: Dataset | None = None) -> list[dict[str, Any]]:
        return [{"prediction": text} for text in predictions]


def reply(**options: Any) -> Reply:
    return Reply(**{"prompt": ["{question} ({hint}):", "{question}:"], "target": " {answer}", **options})


def test_training_rows_are_prompt_and_answer_of_which_the_answer_is_learned(
    closing_tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoded = reply().encode(ROWS, closing_tokenizer, 64, split="train")
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    row = encoded[1]
    assert closing_tokenizer.decode(row["input_ids"]) == "<s>what is ö (a letter): an o with dots</s>"
    learned = [label for label in row["labels"] if label != -100]
    assert closing_tokenizer.decode(learned) == " an o with dots</s>"
    assert row["labels"][: -len(learned)] == [-100] * (len(row["input_ids"]) - len(learned))
    assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_the_prompt_is_the_same_in_training_and_when_the_model_is_asked(
    closing_tokenizer: PreTrainedTokenizerFast,
) -> None:
    trained = reply().encode(ROWS, closing_tokenizer, 256, split="train")
    asked = reply().encode(ROWS, closing_tokenizer, 256, split="test")
    for taught, prompt in zip(trained, asked, strict=True):
        assert taught["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]
        assert taught["labels"][len(prompt["input_ids"]) - 1] == -100
        assert taught["labels"][len(prompt["input_ids"])] != -100


def test_no_gold_reaches_the_prompt(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    asked = reply().encode(ROWS, closing_tokenizer, 256, split="test")
    assert asked.column_names == ["gold", "input_ids", "attention_mask"]
    other = ROWS.map(lambda row: {"gold": row["gold"][::-1], "answer": "x"})
    assert reply().encode(other, closing_tokenizer, 256, split="test")["input_ids"] == asked["input_ids"]
    assert reply().encode(ROWS, closing_tokenizer, 256, split="predict").column_names == ["input_ids", "attention_mask"]
    assert closing_tokenizer.decode(asked[0]["input_ids"]) == "<s>is 2 odd:"


@pytest.mark.parametrize("column", ["gold", "answer"])
def test_a_prompt_that_names_the_answer_is_refused(column: str) -> None:
    with pytest.raises(UserError, match=f"option 'prompt' names {column}, where the answer stands"):
        reply(prompt=f"{{question}} {{{column}}}")


def test_of_a_long_row_the_longest_text_is_cut(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    long = Dataset.from_dict({"question": ["abcdefghij" * 9], "hint": ["h"], "answer": ["yes"], "gold": ["y"]})
    task = reply(generation={"max_new_tokens": 8})
    (ids,) = task.encode(long, closing_tokenizer, 40, split="test")["input_ids"]
    assert len(ids) == 32
    assert closing_tokenizer.decode(ids) == f"<s>{('abcdefghij' * 3)[:26]} (h):"
    (taught,) = task.encode(long, closing_tokenizer, 40, split="train")["input_ids"]
    assert len(taught) == 40
    assert closing_tokenizer.decode(taught).endswith(" (h): yes</s>")


def test_an_answer_is_cut_only_where_the_prompt_needs_half(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    long = Dataset.from_dict({"question": ["q" * 50], "hint": [""], "answer": ["a" * 50], "gold": ["y"]})
    (row,) = reply().encode(long, closing_tokenizer, 40, split="train")
    assert closing_tokenizer.decode(row["input_ids"]) == "<s>" + "q" * 18 + ": " + "a" * 19


def test_a_prompt_that_never_fits_is_refused(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    task = reply(prompt="a template of some length {question}", generation={"max_new_tokens": 4})
    with pytest.raises(UserError, match=r"split 'test', row 1: the prompt takes more than 16 tokens even without"):
        task.encode(ROWS, closing_tokenizer, 20, split="test")
    with pytest.raises(UserError, match=r"max_length is 4, and the answer may take generation.max_new_tokens = 4"):
        task.encode(ROWS, closing_tokenizer, 4, split="test")


def test_a_blank_answer_is_refused_in_training_alone(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    blank = Dataset.from_dict({"question": ["a", "b"], "answer": ["x", " "], "gold": ["x", ""]})
    with pytest.raises(UserError, match="split 'train', row 2: the answer is blank, so there is nothing to learn"):
        reply().encode(blank, closing_tokenizer, 64, split="train")
    assert len(reply().encode(blank, closing_tokenizer, 200, split="test")) == 2


def test_a_missing_column_is_named(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    bare = ROWS.remove_columns(["gold"])
    with pytest.raises(UserError, match="split 'test' has no column 'gold'"):
        reply().encode(bare, closing_tokenizer, 200, split="test")
    assert len(reply().encode(bare, closing_tokenizer, 200, split="predict")) == 3
    with pytest.raises(UserError, match="split 'train' has no column 'question'"):
        reply().fit(ROWS.remove_columns(["question"]))


def test_a_column_of_lists_is_no_text(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    listed = Dataset.from_dict({"question": [["a"]], "answer": ["x"], "gold": ["x"]})
    with pytest.raises(UserError, match=r"row 1: column 'question' must hold a text or a number, got \['a'\]"):
        reply().encode(listed, closing_tokenizer, 200, split="test")


def test_numbers_stand_in_a_prompt_as_they_are_and_nothing_for_null(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"question": [3, 4], "hint": [None, "h"], "answer": ["x", "x"], "gold": ["x", "x"]})
    ids = reply().encode(rows, closing_tokenizer, 200, split="test")["input_ids"]
    assert [closing_tokenizer.decode(row) for row in ids] == ["<s>3:", "<s>4 (h):"]


def test_a_conversation_is_written_as_the_tokenizer_writes_it(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    closing_tokenizer.chat_template = CHAT
    task = reply(chat=True, system="Be kind.", target="{answer}", generation={"max_new_tokens": 8})
    (ids, *_) = task.encode(ROWS, closing_tokenizer, 128, split="test")["input_ids"]
    assert closing_tokenizer.decode(ids) == "<system>Be kind.</s><user>is 2 odd:</s><assistant>"
    (row, *_) = task.encode(ROWS, closing_tokenizer, 128, split="train")
    learned = [label for label in row["labels"] if label != -100]
    assert closing_tokenizer.decode(learned) == "no</s>"
    assert row["input_ids"][: len(ids)] == ids


def test_a_tokenizer_without_chat_template_is_refused(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="option 'chat' is true, but the tokenizer .* has no chat template"):
        reply(chat=True).encode(ROWS, closing_tokenizer, 128, split="test")


def test_a_chat_template_that_rewrites_the_prompt_is_refused(closing_tokenizer: PreTrainedTokenizerFast) -> None:
    closing_tokenizer.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(UserError, match="writes a turn otherwise once it is answered"):
        reply(chat=True).encode(ROWS, closing_tokenizer, 128, split="train")


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_answer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"question": ["the cat sat on the tree"], "answer": ["a happy cat"], "gold": ["x"]})
    task = reply(prompt="see {question}", target="{answer}", architecture="encoder-decoder")
    assert (task.auto_model, task.peft_task_type) == ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM")
    (row,) = task.encode(rows, tiny_tokenizer, 6, split="train")
    assert tiny_tokenizer.decode(row["input_ids"]) == "[CLS] [UNK] the cat sat [SEP]"
    assert tiny_tokenizer.decode(row["labels"]) == "[CLS] a happy cat [SEP]"
    batch = task.collator(tiny_tokenizer)([row, {**row, "labels": [2, 3]}])
    assert batch["labels"].tolist() == [row["labels"], [2, 3, -100, -100, -100]]


def test_a_decoder_is_padded_before_the_prompt_and_behind_the_answer(
    closing_tokenizer: PreTrainedTokenizerFast,
) -> None:
    task = reply(prompt="{question}", generation={"max_new_tokens": 2})
    rows = ROWS.select([0, 1])
    asked = task.collator(closing_tokenizer)(list(task.encode(rows, closing_tokenizer, 64, split="predict")))
    assert closing_tokenizer.pad_token == "</s>"
    assert asked["attention_mask"][0].tolist() == [0, 0] + [1] * 9  # ö is two bytes
    assert asked["input_ids"][0, :3].tolist() == [1, 1, 0]
    taught = task.collator(closing_tokenizer)(list(task.encode(rows, closing_tokenizer, 64, split="train")))
    assert taught["attention_mask"][0].tolist() == [1] * 13 + [0] * 14
    assert taught["labels"][0, -14:].tolist() == [-100] * 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation": {"max_new_token": 3}}, "generation has no option 'max_new_token'.*'max_new_tokens'"),
        ({"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens must be a whole number from 1, got 0"),
        ({"generation": {"num_beams": 1.5}}, "generation.num_beams must be a whole number from 1, got 1.5"),
        (
            {"generation": {"do_sample": True, "temperature": 0}},
            "generation.temperature must be a number above 0, got 0",
        ),
        ({"generation": {"do_sample": True, "top_k": -1}}, "generation.top_k must be a whole number from 0, got -1"),
        ({"generation": {"repetition_penalty": 0}}, "generation.repetition_penalty must be a number above 0, got 0"),
        (
            {"generation": {"num_beams": 2, "length_penalty": "hot"}},
            "generation.length_penalty must be a number, got 'hot'",
        ),
        (
            {"generation": {"num_beams": 2, "early_stopping": 5}},
            "transformers says: `early_stopping` must be a boolean",
        ),
        ({"generation": {"cache_implementation": "foo"}}, "transformers says: Invalid `cache_implementation`"),
        ({"generation": {"temperature": 0.7}}, "transformers says: .*You should set `do_sample=True` or unset"),
        ({"generation": {"num_return_sequences": 2}}, "generation.num_return_sequences is decided by the run"),
        ({"generation": [3]}, "option 'generation' must be a mapping such as {max_new_tokens: 60}"),
        ({"architecture": "decoders"}, "'decoder' or 'encoder-decoder', got 'decoders'; did you mean"),
        ({"chat": "yes"}, "option 'chat' must be true or false, got 'yes'"),
        ({"system": "Be kind."}, "option 'system' is a text that a conversation begins with"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reply(**options)


def test_generation_options_are_complete() -> None:
    assert reply().generation_options() == {"max_new_tokens": 128}
    assert reply(generation={"num_beams": 4}).generation_options() == {"max_new_tokens": 128, "num_beams": 4}
    assert reply(generation={"top_k": None}).generation_options() == {"max_new_tokens": 128, "top_k": None}
