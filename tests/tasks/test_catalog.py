"""Data sets by name: each entry is a task that can be made, and rows of the hub's form become rows of ours."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from turnrow.errors import UserError
from turnrow.tasks import CATALOG, make_task, task_from_dict
from turnrow.tasks.catalog import Entry


@pytest.mark.parametrize("name", CATALOG)
def test_every_entry_is_a_task(name: str) -> None:
    entry = CATALOG[name]
    task = make_task(name)
    assert (entry.name, task.dataset, task.name) == (name, name, entry.task["name"])
    assert entry.title
    assert entry.source
    assert set(entry.hub) <= {"train", "validation", "test"}
    for source in entry.hub.values():
        owner_and_name, _, split = source.split(":", 2)
        assert owner_and_name.count("/") == 1
        assert split
    assert set(entry.columns.values()) <= set(task.columns())
    assert (entry.convert is None) == (not entry.reads)


def test_a_recipe_may_override_options_of_an_entry() -> None:
    task = make_task("cola", metric="accuracy")
    assert (task.main_metric, make_task("cola").main_metric) == ("accuracy", "matthews_correlation")
    with pytest.raises(UserError, match="task 'classification' has no option 'metrics'"):
        make_task("cola", metrics="accuracy")


def test_a_name_that_is_nearly_a_data_set_is_pointed_out() -> None:
    with pytest.raises(UserError, match="unknown task 'colla'.*`turnrow tasks` lists; did you mean 'cola'"):
        make_task("colla")


def test_hub_columns_take_our_names() -> None:
    theirs = Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": [2], "idx": [7]})
    ours = make_task("mnli").in_our_form(theirs)
    assert ours[0] == {"sentence1": "a", "sentence2": "b", "label": 2, "idx": 7}
    local = Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [2]})
    assert make_task("mnli").in_our_form(local) is local
    assert make_task("classification", text=["premise", "hypothesis"]).in_our_form(theirs) is theirs


def test_a_column_of_our_name_that_holds_something_else_gives_way() -> None:
    entry = Entry(
        name="toy",
        title="Toy",
        task={"name": "classification", "text": "sentence"},
        columns={"text": "sentence", "coarse": "label"},
        source="nobody",
    )
    theirs = Dataset.from_dict({"text": ["who is it ?"], "label": [23], "coarse": [3]})
    assert entry.in_our_form(theirs)[0] == {"sentence": "who is it ?", "label": 3}


def test_classes_that_the_hub_numbers_otherwise_get_our_numbers() -> None:
    theirs = Dataset.from_dict(
        {"text": ["what is it ?"], "label": [23], "label_coarse": [0], "label_coarse_original": ["DESC"]}
    )
    assert make_task("trec").in_our_form(theirs)[0] == {"sentence": "what is it ?", "label": 2}
    assert make_task("subj").in_our_form(Dataset.from_dict({"text": ["a"], "label": [0]}))[0]["label"] == 1


def test_rows_are_rewritten_where_names_do_not_do() -> None:
    entry = Entry(
        name="toy",
        title="Toy",
        task={"name": "classification", "text": "sentence"},
        reads=("words", "good"),
        convert=lambda row: {"sentence": " ".join(row["words"]), "label": int(row["good"])},
        source="nobody",
    )
    theirs = Dataset.from_dict({"words": [["a", "film"]], "good": [True], "id": [1]})
    theirs.info.dataset_name = "toys.jsonl"
    ours = entry.in_our_form(theirs)
    assert (ours[0], ours.info.dataset_name) == ({"sentence": "a film", "label": 1}, "toys.jsonl")
    local = Dataset.from_dict({"sentence": ["a film"], "label": [1]})
    assert entry.in_our_form(local) is local


def test_a_task_keeps_its_data_set_on_disk() -> None:
    task = make_task("rte")
    task.fit(Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["a", "b"], "label": [0, 1]}))
    saved = json.loads(json.dumps(task.to_dict()))
    assert task_from_dict(saved) == task
    # One that only a later turnrow knows.
    assert task_from_dict({**saved, "dataset": "rte3"}).dataset is None


@pytest.mark.parametrize("name", ["cola", "sst2", "rte", "qnli", "qqp", "mnli", "stsb", "mr", "subj", "trec"])
def test_local_files_have_the_form_of_the_entry(name: str, real_data) -> None:
    from turnrow.tasks import read_table

    task = make_task(name)
    table = task.in_our_form(read_table(real_data(name, "test")))
    assert set(task.columns()) <= set(table.column_names)
    task.fit(table)
