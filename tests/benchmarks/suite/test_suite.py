"""Suites as files: every method of every suite binds, and equal runs have one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.suite import suite as suite_module
from benchmarks.suite.suite import load_suite, suite_names
from turnrow.errors import UserError
from turnrow.training import Recipe


@pytest.mark.parametrize("name", suite_names())
def test_every_cell_is_a_recipe_and_no_two_share_a_place(name: str) -> None:
    places: dict[tuple[str, str], dict[str, object]] = {}
    for cell in load_suite(name).cells():
        Recipe.from_dict({**cell.recipe, "data": {"train": "a", "test": "b"}, "output_dir": "out"})
        assert places.setdefault((cell.task, cell.slug), dict(cell.fields)) == dict(cell.fields)
        assert len(cell.slug) < 200, "a file name has 255 bytes"
        assert set(cell.rates.first) <= set(cell.rates.grid)
        assert list(cell.rates.grid) == sorted(cell.rates.grid)


def test_suites_with_the_same_settings_share_runs() -> None:
    ours = {cell.slug for cell in load_suite("ablations").cells(("sst2",))}
    theirs = {cell.slug for cell in load_suite("minilm").cells(("sst2",))}
    assert "head" in ours & theirs
    assert len(ours & theirs) > 5


def test_tasks_and_groups_can_be_chosen_and_unknown_ones_are_refused() -> None:
    suite = load_suite("minilm")
    chosen = list(suite.cells(("rte",), ("RoAd",)))
    assert [(cell.task, cell.recipe["task"]) for cell in chosen] == [("rte", {"name": "rte"})] * 3
    with pytest.raises(UserError, match="suite 'minilm' has no task 'rtee'.*did you mean 'rte'"):
        list(suite.cells(("rtee",)))
    with pytest.raises(UserError, match="suite 'minilm' has no group 'Road'.*did you mean 'RoAd'"):
        list(suite.cells(None, ("Road",)))
    assert [cell.fields["method"]["name"] for cell in suite.cells(("rte",), None, ("RoAd1", "full"))] == [
        "road",
        "full",
    ]
    with pytest.raises(UserError, match="suite 'minilm' has no method 'RoAd3'"):
        list(suite.cells(None, None, ("RoAd3",)))
    with pytest.raises(UserError, match="there is no suite 'minilmm'; there are ablations, .*did you mean 'minilm'"):
        load_suite("minilmm")


def test_a_method_is_found_by_each_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_suite("ablations")
    (cell,) = suite.cells(("sst2",), None, ("rows r=4, everywhere", "rows r=4, first"))
    assert cell.slug == "row-rocoft-r-4"
    monkeypatch.setattr(suite_module, "EXPERIMENTS", tmp_path)
    (tmp_path / "toy.yaml").write_text("title: a\nsettings: b\ngroups: {one: {a: {x: 1}}, two: {a: {x: 2}}}\n")
    with pytest.raises(UserError, match="toy.yaml has two methods of the name 'a', one of them in group 'two'"):
        load_suite("toy")


def test_a_file_with_a_wrong_field_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_module, "EXPERIMENTS", tmp_path)
    (tmp_path / "toy.yaml").write_text("title: a\nsettings: b\ngroup: {}\n")
    with pytest.raises(UserError, match="toy.yaml has an unknown field 'group'.*did you mean 'groups'"):
        load_suite("toy")
    (tmp_path / "toy.yaml").write_text("title: a\nsettings: b\n")
    with pytest.raises(UserError, match="toy.yaml lacks groups"):
        load_suite("toy")


def test_a_task_and_a_method_change_the_recipe_that_all_have_in_common() -> None:
    raw = {
        "settings": "s",
        "recipe": {"model": "m", "training": {"bf16": True, "num_train_epochs": 1}, "method": {"name": "full"}},
        "training_rows": None,
        "seeds": [0],
        "learning_rates": {"grid": [1], "first": [1]},
        "tasks": {"books": {"task": {"name": "language_modelling"}, "training": {"num_train_epochs": 3}}},
    }
    suite = suite_module.Suite("toy", "Toy", ("books",), {}, raw)
    cell = suite.cell("books", {"method": {"name": "road", "variant": "road_1"}})
    assert cell.recipe == {
        "model": "m",
        "training": {"bf16": True, "num_train_epochs": 3},
        "method": {"name": "road", "variant": "road_1"},
        "task": {"name": "language_modelling"},
    }
