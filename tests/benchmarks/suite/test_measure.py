"""The runs of a cell: the learning rate is chosen on validation alone, and what was run once is not run again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.suite.measure import data_of, measure
from benchmarks.suite.store import Store
from benchmarks.suite.suite import Cell, Rates
from benchmarks.suite.summary import summarize
from turnrow.errors import UserError

RATES = Rates(grid=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2), first=(1e-3, 3e-3, 1e-2))
METHOD = {"name": "rocoft", "mode": "row", "r": 4}


def cell(**changes: Any) -> Cell:
    recipe = {
        "model": "somewhere",
        "task": {"name": "sst2"},
        "method": METHOD,
        "training": {"num_train_epochs": 4},
    }
    given = {"settings": "toy", "task": "sst2", "fields": {"method": METHOD}, "recipe": recipe, "training_rows": 2}
    return Cell(**{**given, "seeds": (0, 1, 2), "rates": RATES, **changes})


class Trainings:
    """Stands in for training: validation accuracy by learning rate, and a list of what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, validation: dict[float, float | None]) -> None:
        self.validation = validation
        self.greater_is_better = True
        self.one_answer: set[float] = set()
        self.trained: list[tuple[float, int]] = []
        self.tested: list[tuple[float, int]] = []
        self.recipes: list[Any] = []
        self._of_folder: dict[str, tuple[float, int]] = {}
        monkeypatch.setattr("turnrow.training.train", self.train)
        monkeypatch.setattr("turnrow.training.evaluate_adapter", self.evaluate)

    def train(self, recipe: Any, overwrite: bool) -> SimpleNamespace:
        run = (recipe.training["learning_rate"], recipe.seed)
        self.recipes.append(recipe)
        self.trained.append(run)
        self._of_folder[recipe.output_dir] = run
        Path(recipe.output_dir).mkdir(exist_ok=True)
        if self.validation[run[0]] is None:
            raise ValueError("loss is not finite")
        metrics = {
            "main_metric": "accuracy",
            "greater_is_better": self.greater_is_better,
            "after": {
                "accuracy": self.validation[run[0]],
                "matthews_correlation": 0.0 if run[0] in self.one_answer else 0.5,
            },
            "trainable_parameters": 10,
            "total_parameters": 100,
            "steps": 8,
            "seconds_per_step": 1.0 + run[1],
            "peak_memory_bytes": 5 + run[1],
            "peak_memory_kind": "resident",
            "device": "cpu",
            "threads": 1,
            "versions": {},
        }
        return SimpleNamespace(metrics=metrics)

    def evaluate(self, path: Path, data: str, quiet: bool) -> dict[str, float]:
        assert path.parent.exists(), "an adapter that is asked for again must be kept"
        assert Path(data).name == "test.jsonl.gz"
        self.tested.append(self._of_folder[str(path.parent)])
        return {"accuracy": 0.5 + 0.01 * self.tested[-1][1]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        with gzip.open(tmp_path / "data" / "sst2" / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(f'{{"row": {i}}}\n' for i in range(30))
    return tmp_path / "data"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(cell(), tmp_path / "runs")


def test_the_learning_rate_is_the_best_on_validation_and_only_it_sees_the_test_split(
    data: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Trainings(monkeypatch, {1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.6})
    measure(store.cell, data, store)
    assert work.trained == [(1e-3, 0), (3e-3, 0), (1e-2, 0), (3e-3, 1), (3e-3, 2)]
    assert {Path(recipe.data.test).name for recipe in work.recipes} == {"validation.jsonl.gz"}
    assert all(recipe.data.validation is None for recipe in work.recipes)
    assert work.tested == [(3e-3, seed) for seed in (0, 1, 2)]
    found = summarize(store.cell, store.folder.parents[2])
    assert found is not None
    assert (found.learning_rate, found.scores) == (3e-3, (50.0, 51.0, 52.0))
    assert found.trained == 10
    assert found.text() == "51.0 ± 1.0"


def test_a_file_a_run_says_what_was_run(data: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(monkeypatch, {1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.6})
    measure(store.cell, data, store)
    files = sorted(path.name for path in store.folder.iterdir())
    assert files == ["0.001-0.json", "0.003-0.json", "0.003-1.json", "0.003-2.json", "0.01-0.json"]
    run = json.loads((store.folder / "0.003-1.json").read_text())
    assert (run["settings"], run["task"], run["fields"]) == ("toy", "sst2", {"method": METHOD})
    assert run["recipe"]["training"] == {"num_train_epochs": 4}
    assert run["test"] == {"accuracy": 0.51}
    assert "machine" in run
    assert "commit" in run


def test_the_search_goes_on_while_the_best_is_at_the_edge(
    data: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Trainings(monkeypatch, {1e-4: 0.8, 3e-4: 0.9, 1e-3: 0.8, 3e-3: 0.7, 1e-2: 0.6})
    measure(store.cell, data, store)
    assert [rate for rate, seed in work.trained if seed == 0] == [1e-3, 3e-3, 1e-2, 3e-4, 1e-4]
    assert work.tested == [(3e-4, seed) for seed in (0, 1, 2)]


def test_while_nothing_is_learnt_the_search_goes_both_ways(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(cell(rates=Rates((*RATES.grid, 3e-2), RATES.first)), tmp_path / "runs")
    # The middle one happens to name the more frequent class: a best that is no reason to stop.
    work = Trainings(monkeypatch, {1e-4: 0.7, 3e-4: 0.8, 1e-3: 0.49, 3e-3: 0.51, 1e-2: 0.49, 3e-2: 0.49})
    work.one_answer = {1e-3, 3e-3, 1e-2, 3e-2}
    measure(store.cell, data, store)
    assert [rate for rate, seed in work.trained if seed == 0] == [1e-3, 3e-3, 1e-2, 3e-4, 3e-2, 1e-4]
    assert work.tested == [(3e-4, seed) for seed in (0, 1, 2)]


def test_a_search_that_goes_on_later_leaves_no_score_of_the_former_best(
    data: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainings(monkeypatch, {1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.6})
    measure(store.cell, data, store)
    best = store.find(3e-3, 0)
    assert best is not None
    store.add({**best, "learning_rate": 3e-4, "validation": {"accuracy": 0.9}, "test": {"accuracy": 0.4}})
    found = summarize(store.cell, store.folder.parents[2])
    assert found is not None
    assert (found.learning_rate, found.scores) == (3e-4, (40.0,))
    assert (found.score(), found.text()) == ("40.0*", "40.0* (1)"), "1e-4 is left to try"


def test_of_equal_learning_rates_the_lower_wins(data: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Trainings(monkeypatch, {3e-4: 0.1, 1e-3: 0.8, 3e-3: 0.8, 1e-2: 0.8})
    measure(store.cell, data, store)
    assert {rate for rate, _ in work.tested} == {1e-3}


def test_where_less_is_better_the_least_wins(data: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Trainings(monkeypatch, {1e-3: 9.0, 3e-3: 4.0, 1e-2: 6.0})
    work.greater_is_better = False
    measure(store.cell, data, store)
    assert {rate for rate, _ in work.tested} == {3e-3}


def test_what_is_there_is_not_run_again(data: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(monkeypatch, {1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.6})
    measure(store.cell, data, store)
    work = Trainings(monkeypatch, {})
    measure(store.cell, data, store)
    assert work.trained == []


def test_a_killed_search_goes_on_and_trains_the_best_again_for_its_adapter(
    data: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainings(monkeypatch, {1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.6})
    measure(store.cell, data, store)
    for seed in (1, 2):
        store.path(3e-3, seed).unlink()
    run = store.find(3e-3, 0)
    assert run is not None
    store.add({name: value for name, value in run.items() if name != "test"})
    work = Trainings(monkeypatch, {3e-3: 0.8})
    measure(store.cell, data, store)
    assert work.trained == [(3e-3, 0), (3e-3, 1), (3e-3, 2)]


def test_a_run_that_fails_says_so_and_the_others_count(
    data: Path, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Trainings(monkeypatch, {3e-4: 0.1, 1e-3: 0.7, 3e-3: None, 1e-2: None})
    measure(store.cell, data, store)
    assert {rate for rate, _ in work.tested} == {1e-3}
    failed = store.find(3e-3, 0)
    assert failed is not None
    assert failed["failed"] == "ValueError: loss is not finite"


def test_a_last_row_without_a_line_end_is_a_row_of_its_own(data: Path) -> None:
    path = data / "sst2" / "train.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).rstrip()))
    with data_of(data, "sst2", 30) as files:
        rows = [json.loads(line)["row"] for line in Path(files["train"]).read_text().splitlines()]
    assert sorted(rows) == list(range(30))


def test_training_rows_are_the_same_for_every_run(data: Path) -> None:
    drawn = []
    for _ in range(2):
        with data_of(data, "sst2", 7) as files:
            drawn.append(Path(files["train"]).read_text())
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0].splitlines())) == 7
    with data_of(data, "sst2", None) as files:
        assert files["train"] == str(data / "sst2" / "train.jsonl.gz")


def test_a_cell_of_which_every_run_fails_is_an_error(data: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(monkeypatch, dict.fromkeys(RATES.grid))
    for _ in range(2):  # what failed is not run again, and is not taken for done either
        with pytest.raises(
            UserError, match=f"on sst2 came to an end, that at 0.0001 with ValueError: .*; .* delete {store.folder}"
        ):
            measure(store.cell, data, store)
    assert summarize(store.cell, store.folder.parents[2]) is None


def test_what_the_machine_lacks_is_no_result_of_a_method(
    data: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("turnrow.training.train", full_disk)
    with pytest.raises(OSError, match="No space left"):
        measure(store.cell, data, store)
    assert not store.folder.exists()
