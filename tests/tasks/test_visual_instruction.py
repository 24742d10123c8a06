from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from turnrow.errors import UserError
from turnrow.tasks import VisualInstructionTask, make_task, task_from_dict

from .pictures import picture, png
from .seeing import llava_processor

IGNORED = -100


def talk(question: str, answer: str, image: bool = True) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\n" * image + question}, {"from": "gpt", "value": answer}]


DATA = Dataset.from_list(
    [
        {"image": png("red"), "conversations": talk("Which colour?", "red")},
        {"image": None, "conversations": talk("Hi", "Ho", image=False)},
        {"image": png("blue"), "conversations": talk("And this?", "The blue one, é")},
    ]
)


def fitted(**options: Any) -> VisualInstructionTask:
    task = VisualInstructionTask(**options)
    task.fit(DATA)
    return task


def test_answers_are_labelled_and_images_kept_as_files() -> None:
    processor = llava_processor()
    encoded = fitted().encode(DATA, processor, split="train")
    assert encoded.column_names == ["input_ids", "attention_mask", "labels", "pixel_values"]
    texts = [processor.tokenizer.decode([label for label in row["labels"] if label != IGNORED]) for row in encoded]
    assert texts == [" red</s>", " Ho</s>", " The blue one, é</s>"]
    assert [cell and cell["bytes"] for cell in encoded["pixel_values"]] == [png("red"), None, png("blue")]


def test_a_batch_has_the_images_that_its_rows_have() -> None:
    processor, task = llava_processor(), fitted()
    rows = list(task.encode(DATA, processor, split="train"))
    batch = task.collator(processor)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    expected = processor.image_processor(images=[picture("red"), picture("blue")], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(dim=1).tolist() == [4, 0, 4]
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row["input_ids"]) for row in rows]
    assert batch["labels"][1, -1] == IGNORED
    assert "pixel_values" not in task.collator(processor)(rows[1:2])


def test_what_is_predicted_is_a_question_padded_at_the_beginning() -> None:
    """The tokenizer has no pad token."""
    processor, task = llava_processor(), fitted()
    open_ended = Dataset.from_list([{**row, "conversations": row["conversations"][:1]} for row in DATA])
    encoded = task.encode(DATA, processor, 200, split="predict")
    assert encoded["input_ids"][:] == task.encode(open_ended, processor, 200, split="predict")["input_ids"][:]
    assert encoded.column_names == ["input_ids", "attention_mask", "gold", "pixel_values"]
    batch = task.collator(processor)(list(encoded))
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert processor.tokenizer.decode(batch["input_ids"][1]).endswith("USER: Hi ASSISTANT:")


def test_likelihood_is_scored_over_the_answers() -> None:
    processor, task = llava_processor(), fitted()
    encoded = task.encode(DATA, processor, split="test")
    batch = task.collator(processor)(list(encoded))
    size = len(processor.tokenizer)
    uniform = task.reduce_logits(torch.zeros(*batch["labels"].shape, size), batch["labels"])
    assert uniform.shape == (3,)
    scores = task.metrics(uniform.numpy(), batch["labels"].numpy(), encoded)
    assert scores == pytest.approx({"perplexity": size, "loss": np.log(size)})
    rows = task.decode(uniform.numpy(), encoded)
    assert [row["tokens"] for row in rows] == [5, 4, len(" The blue one, é".encode()) + 1]
    assert [row["perplexity"] for row in rows] == pytest.approx([size] * 3)


def test_answers_are_scored_by_their_words_where_asked() -> None:
    task = fitted(answers=True)
    assert (task.main_metric, task.greater_is_better) == ("exact_match", True)
    assert [task.generates(split) for split in ("train", "validation", "test", "predict")] == [False, True, True, True]
    encoded = task.encode(DATA, llava_processor(), 400, split="test")
    assert encoded["gold"][:] == ["red", "Ho", "The blue one, é"]
    said = np.array(["Red.", "no", "blue"], dtype=object)
    assert task.metrics(said, np.empty(0), encoded) == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 0 + 0.5) / 3})
    assert task.decode(said, encoded) == [{"prediction": text} for text in said]


def test_by_default_only_predictions_are_written() -> None:
    task = fitted()
    assert (task.main_metric, task.greater_is_better) == ("perplexity", False)
    assert [task.generates(split) for split in ("train", "validation", "test", "predict")] == [
        False,
        False,
        False,
        True,
    ]
    assert task.generation_options() == {"max_new_tokens": 128}


def test_a_conversation_without_an_answer_cannot_be_scored() -> None:
    unanswered, blank = (
        Dataset.from_list([{"image": png(), "conversations": turns}])
        for turns in (talk("What?", "x")[:1], talk("What?", " "))
    )
    for data in (unanswered, blank):
        with pytest.raises(
            UserError, match="split 'test', row 1: the conversation ends with a question or with a blank answer"
        ):
            fitted(answers=True).encode(data, llava_processor(), 400, split="test")
    with pytest.raises(UserError, match="split 'test', row 1: nothing is answered in this conversation"):
        fitted().encode(unanswered, llava_processor(), 400, split="test")
    with pytest.raises(UserError, match="split 'test', row 1: an answer of the assistant is blank"):
        fitted().encode(blank, llava_processor(), 400, split="test")


def test_an_answer_must_leave_room_for_its_question() -> None:
    with pytest.raises(
        UserError, match="max_length is 100, and the answer may take generation.max_new_tokens = 128 of them"
    ):
        fitted().encode(DATA, llava_processor(), 100, split="predict")


def test_a_task_survives_json() -> None:
    task = fitted(answers=True, folder="pictures", generation={"max_new_tokens": 5})
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "conversations"}, "'image' and 'conversations' must name different columns"),
        ({"conversations": ""}, "option 'conversations' must be the name of a column"),
        ({"folder": 1}, "option 'folder' must be the path of a folder"),
        ({"answers": "yes"}, "option 'answers' must be true or false, got 'yes'"),
        ({"metric": "f1"}, "metric 'f1' is for answers: true; choose perplexity or loss"),
        ({"metric": "loss", "answers": True}, "metric 'loss' is for answers: false; choose exact_match or f1"),
        ({"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens must be a whole number from 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task("visual_instruction", **options)
