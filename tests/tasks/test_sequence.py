"""What classification and regression share: columns, encoding and padding."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from turnrow.errors import UserError
from turnrow.tasks import make_task, read_table

ROWS: dict[str, list[Any]] = {
    "sentence": ["The cat sat .", "a dog ran to the red house"],
    "hypothesis": ["the cat slept", "it ran"],
    "label": [0, 1],
}
TRAIN = Dataset.from_dict(ROWS)
NAMES = ["classification", "regression"]


def fitted(name: str = "classification", **options: Any) -> Any:
    task = make_task(name, **{"text": "sentence", **options})
    task.fit(TRAIN)
    return task


def changed(**columns: Any) -> Dataset:
    return Dataset.from_dict({**ROWS, **columns})


@pytest.mark.parametrize("text", ["sentence", ["sentence"], ["sentence", "hypothesis"]])
def test_columns_are_those_of_the_texts_and_the_label(text: str | list[str]) -> None:
    expected = [text] if isinstance(text, str) else text
    assert make_task("regression", text=text, label="score").columns() == [*expected, "score"]


@pytest.mark.parametrize("text", [[], ["a", "b", "c"], "", [""], [1], None, {"a": 1}])
def test_text_must_name_one_or_two_columns(text: Any) -> None:
    with pytest.raises(UserError, match="'text' must be the name of a column or a list of one or two, got"):
        make_task("classification", text=text)


@pytest.mark.parametrize("label", ["", None, ["label"]])
def test_label_must_name_a_column(label: Any) -> None:
    with pytest.raises(UserError, match="option 'label' must be the name of a column, got"):
        make_task("regression", text="sentence", label=label)


@pytest.mark.parametrize("text", ["label", ["sentence", "label"], ["sentence", "sentence"]])
def test_text_and_label_must_differ(text: Any) -> None:
    with pytest.raises(UserError, match="'text' and 'label' must name different columns"):
        make_task("classification", text=text)


def test_encoded_texts_are_the_tokenizers(tiny_tokenizer: Any) -> None:
    encoded = fitted().encode(TRAIN, tiny_tokenizer, None, split="train")
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    assert encoded["input_ids"][:] == tiny_tokenizer(ROWS["sentence"])["input_ids"]
    assert encoded["labels"][:] == [0, 1]


def test_encoded_pairs_are_the_tokenizers(tiny_tokenizer: Any) -> None:
    task = fitted(text=["sentence", "hypothesis"])
    encoded = task.encode(TRAIN, tiny_tokenizer, split="train")
    assert encoded["input_ids"][:] == tiny_tokenizer(ROWS["sentence"], ROWS["hypothesis"])["input_ids"]


def test_columns_named_as_the_results_do_no_harm(tiny_tokenizer: Any) -> None:
    data = Dataset.from_dict({"input_ids": ["the cat", "a dog"], "labels": ["x", "y"]})
    task = make_task("classification", text="input_ids", label="labels")
    task.fit(data)
    encoded = task.encode(data, tiny_tokenizer, split="train")
    assert encoded["input_ids"][:] == tiny_tokenizer(["the cat", "a dog"])["input_ids"]
    assert encoded["labels"][:] == [0, 1]


def test_rows_are_cut_to_max_length(tiny_tokenizer: Any) -> None:
    encoded = fitted().encode(TRAIN, tiny_tokenizer, 5, split="train")
    assert [len(ids) for ids in encoded["input_ids"]] == [5, 5]


def test_length_of_a_pair_must_leave_room_for_text(tiny_tokenizer: Any) -> None:
    task = fitted(text=["sentence", "hypothesis"])
    with pytest.raises(UserError, match=r"larger than the 3 special tokens .* got 3"):
        task.encode(TRAIN, tiny_tokenizer, 3, split="train")


def test_many_batches_keep_order_and_labels(tiny_tokenizer: Any) -> None:
    lengths = [1 + number % 7 for number in range(2500)]
    data = Dataset.from_dict({"sentence": ["cat " * length for length in lengths], "label": [n % 2 for n in lengths]})
    encoded = fitted().encode(data, tiny_tokenizer, split="test")
    assert [len(ids) - 2 for ids in encoded["input_ids"]] == lengths
    assert encoded["labels"][:] == [n % 2 for n in lengths]


def test_selected_and_formatted_rows_are_encoded_as_they_are_seen(tiny_tokenizer: Any) -> None:
    data = TRAIN.select([1]).with_format("torch")
    encoded = fitted().encode(data, tiny_tokenizer, split="test")
    assert encoded["input_ids"][:] == tiny_tokenizer([ROWS["sentence"][1]])["input_ids"]
    assert encoded["labels"][:] == [1]


@pytest.mark.parametrize("name", NAMES)
def test_prediction_reads_no_label(tiny_tokenizer: Any, name: str) -> None:
    task = fitted(name)
    for data in (TRAIN.remove_columns("label"), changed(label=[None, None]), changed(label=["?", "?"])):
        assert task.encode(data, tiny_tokenizer, split="predict").column_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_padded_to_their_longest_row(tiny_tokenizer: Any, name: str) -> None:
    task = fitted(name)
    batch = task.collator(tiny_tokenizer)(list(task.encode(TRAIN, tiny_tokenizer, split="train")))
    assert batch["input_ids"].shape == (2, 9)
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 9]
    assert batch["input_ids"][0, 6:].tolist() == [tiny_tokenizer.pad_token_id] * 3
    assert batch["labels"].is_floating_point() == (name == "regression")


def test_decoder_batches_are_padded(tiny_decoder_tokenizer: Any) -> None:
    task = fitted(text=["sentence", "hypothesis"])
    batch = task.collator(tiny_decoder_tokenizer)(list(task.encode(TRAIN, tiny_decoder_tokenizer, split="train")))
    assert batch["input_ids"][0, -1] == tiny_decoder_tokenizer.eos_token_id
    assert batch["attention_mask"][0, -1] == 0


@pytest.mark.parametrize("name", NAMES)
def test_missing_column_lists_those_there(name: str) -> None:
    task = make_task(name, text="sentense")
    with pytest.raises(
        UserError,
        match="split 'train' has no column 'sentense'; its columns are 'sentence', 'hypothesis', 'label'; "
        "did you mean 'sentence'",
    ):
        task.fit(TRAIN)


@pytest.mark.parametrize("name", NAMES)
def test_missing_label_column_is_named_with_split_and_file(tiny_tokenizer: Any, tmp_path: Any, name: str) -> None:
    (tmp_path / "test.csv").write_text("sentence,lable\na cat,1\n")
    with pytest.raises(UserError, match=r"split 'test' \(.*test\.csv\) has no column 'label'.*did you mean 'lable'"):
        fitted(name).encode(read_table(tmp_path / "test.csv"), tiny_tokenizer, split="test")


@pytest.mark.parametrize("name", NAMES)
def test_empty_split_is_refused(tiny_tokenizer: Any, name: str) -> None:
    empty = TRAIN.select([])
    with pytest.raises(UserError, match="split 'train' is empty: it holds no rows"):
        make_task(name, text="sentence").fit(empty)
    for split in ("validation", "predict"):
        with pytest.raises(UserError, match=f"split '{split}' is empty: it holds no rows"):
            fitted(name).encode(empty, tiny_tokenizer, split=split)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["test", "predict"])
def test_null_text_is_refused_with_its_row(tiny_tokenizer: Any, name: str, split: str) -> None:
    with pytest.raises(UserError, match=f"split '{split}', row 2: column 'sentence' has no value"):
        fitted(name).encode(changed(sentence=["a", None]), tiny_tokenizer, split=split)


@pytest.mark.parametrize("name", NAMES)
def test_null_label_is_refused_with_its_row(tiny_tokenizer: Any, name: str) -> None:
    with pytest.raises(UserError, match="split 'test', row 2: column 'label' has no value"):
        fitted(name).encode(changed(label=[1, None]), tiny_tokenizer, split="test")
    with pytest.raises(UserError, match="split 'train', row 1: column 'label' has no value"):
        make_task(name, text="sentence").fit(changed(label=[None, None]))


@pytest.mark.parametrize(("values", "shown"), [([1, 2], "1 (int)"), ([["a"], []], "['a'] (list)")])
def test_text_that_is_no_text_is_refused_with_its_row(tiny_tokenizer: Any, values: list[Any], shown: str) -> None:
    with pytest.raises(
        UserError, match=f"split 'test', row 1: column 'sentence' must hold text, got {re.escape(shown)}"
    ):
        fitted().encode(changed(sentence=values), tiny_tokenizer, split="test")


def test_empty_text_is_encoded_where_the_tokenizer_adds_tokens(tiny_tokenizer: Any) -> None:
    encoded = fitted().encode(changed(sentence=["a cat", ""]), tiny_tokenizer, split="test")
    assert encoded["input_ids"][1] == [tiny_tokenizer.cls_token_id, tiny_tokenizer.sep_token_id]


def test_empty_text_is_refused_where_nothing_is_left_to_read(tiny_decoder_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="split 'test', row 2: the text is empty, and this tokenizer adds no token"):
        fitted().encode(changed(sentence=["a cat", ""]), tiny_decoder_tokenizer, split="test")


def test_letters_outside_the_vocabulary_are_encoded(tiny_tokenizer: Any, tiny_decoder_tokenizer: Any) -> None:
    data = changed(sentence=["猫が座った 🐈", "ŕóżä\u0000"])
    assert tiny_tokenizer.unk_token_id in fitted().encode(data, tiny_tokenizer, split="test")["input_ids"][0]
    ids = fitted().encode(data, tiny_decoder_tokenizer, split="test")["input_ids"]
    assert [tiny_decoder_tokenizer.decode(row) for row in ids] == data["sentence"][:]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_of_a_diverged_model_are_refused(name: str, value: float) -> None:
    task = fitted(name)
    predictions = np.zeros((3, task.model_kwargs()["num_labels"]), dtype=np.float32)
    predictions[1, 0] = value
    for use in (task.decode, lambda logits: task.metrics(logits, np.zeros(3))):
        with pytest.raises(
            UserError, match=r"prediction for row 2 is .* 1 of 3 rows are not finite: the model has diverged"
        ):
            use(predictions)


@pytest.mark.parametrize("name", NAMES)
def test_predictions_of_another_head_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"predictions must have the shape \(rows, [12]\), got \(4, 3\): the head"):
        fitted(name).decode(np.zeros((4, 3)))
