import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.experiments import runs
from benchmarks.experiments.ablations import ABLATIONS
from benchmarks.experiments.runs import SEEDS, Method, Results, measure, summarize

DATA = {"train": "train", "validation": "validation", "test": "test"}
ROWS = Method({"name": "rocoft", "mode": "row", "r": 4}, {})


class Trainings:
    """Stands in for training: validation accuracy by learning rate, and a list of what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, validation: dict[float, float]) -> None:
        self.validation = validation
        self.trained: list[tuple[float, int]] = []
        self.tested: list[tuple[float, int]] = []
        self.seen: set[str] = set()
        self._of_folder: dict[str, tuple[float, int]] = {}
        monkeypatch.setattr("turnrow.training.train", self.train)
        monkeypatch.setattr("turnrow.training.evaluate_adapter", self.evaluate)

    def train(self, recipe, overwrite):
        run = (recipe.training["learning_rate"], recipe.seed)
        self.seen.add(recipe.data.test)
        self.trained.append(run)
        self._of_folder[recipe.output_dir] = run
        Path(recipe.output_dir).mkdir(exist_ok=True)
        if self.validation[run[0]] is None:
            raise ValueError("loss is not finite")
        metrics = {
            "main_metric": "accuracy",
            "after": {"accuracy": self.validation[run[0]]},
            "trainable_parameters": 10,
            "total_parameters": 100,
            "seconds_per_step": 1.0,
            "versions": {},
        }
        return SimpleNamespace(metrics=metrics)

    def evaluate(self, path, data, quiet):
        assert path.parent.exists(), "an adapter that is asked for again must be kept"
        self.tested.append(self._of_folder[str(path.parent)])
        return {"accuracy": 0.5 + 0.01 * self.tested[-1][1]}


def test_the_learning_rate_is_the_best_on_validation_and_only_it_sees_the_test_split(tmp_path, monkeypatch) -> None:
    work = Trainings(monkeypatch, {1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.6})
    results = Results(tmp_path, "sst2", ROWS)
    measure(results, DATA)
    assert work.trained == [(1e-3, 0), (3e-3, 0), (1e-2, 0), (3e-3, 1), (3e-3, 2)]
    assert work.seen == {"validation"}, "what training evaluates on"
    assert work.tested == [(3e-3, seed) for seed in SEEDS]
    found = summarize(results)
    assert found is not None
    assert (found.learning_rate, found.scores) == (3e-3, [50.0, 51.0, 52.0])


def test_the_search_goes_on_while_the_best_is_at_the_edge(tmp_path, monkeypatch) -> None:
    work = Trainings(monkeypatch, {1e-4: 0.8, 3e-4: 0.9, 1e-3: 0.8, 3e-3: 0.7, 1e-2: 0.6})
    measure(Results(tmp_path, "sst2", ROWS), DATA)
    assert [rate for rate, seed in work.trained if seed == 0] == [1e-3, 3e-3, 1e-2, 3e-4, 1e-4]
    assert work.tested == [(3e-4, seed) for seed in SEEDS]


def test_of_equal_learning_rates_the_lower_wins(tmp_path, monkeypatch) -> None:
    work = Trainings(monkeypatch, {3e-4: 0.1, 1e-3: 0.8, 3e-3: 0.8, 1e-2: 0.8})
    measure(Results(tmp_path, "sst2", ROWS), DATA)
    assert {rate for rate, _ in work.tested} == {1e-3}


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch) -> None:
    Trainings(monkeypatch, {1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.6})
    measure(Results(tmp_path, "sst2", ROWS), DATA)
    work = Trainings(monkeypatch, {})
    measure(Results(tmp_path, "sst2", ROWS), DATA)
    assert work.trained == []


def test_a_killed_search_goes_on_and_trains_the_best_again_for_its_adapter(tmp_path, monkeypatch) -> None:
    first = Results(tmp_path, "sst2", ROWS)
    Trainings(monkeypatch, {1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.6})
    measure(first, DATA)
    whole = json.loads(first.path.read_text())
    whole["runs"] = [{k: v for k, v in run.items() if k != "test"} for run in whole["runs"] if run["seed"] == 0]
    first.path.write_text(json.dumps(whole))
    work = Trainings(monkeypatch, {3e-3: 0.8})
    measure(Results(tmp_path, "sst2", ROWS), DATA)
    assert work.trained == [(3e-3, 0), (3e-3, 1), (3e-3, 2)]


def test_a_run_that_fails_says_so_and_the_others_count(tmp_path, monkeypatch, capsys) -> None:
    work = Trainings(monkeypatch, {3e-4: 0.1, 1e-3: 0.7, 3e-3: None, 1e-2: None})
    results = Results(tmp_path, "sst2", ROWS)
    measure(results, DATA)
    assert {rate for rate, _ in work.tested} == {1e-3}
    failed = results.find(3e-3, 0)
    assert failed is not None
    assert failed["failed"] == "ValueError: loss is not finite"


def test_training_rows_are_the_same_for_every_run(tmp_path) -> None:
    import gzip

    (tmp_path / "sst2").mkdir()
    with gzip.open(tmp_path / "sst2" / "train.jsonl.gz", "wt") as file:
        file.writelines(f'{{"row": {i}}}\n' for i in range(3_000))
    drawn = []
    for _ in range(2):
        with runs.prepare_data(tmp_path, "sst2") as data:
            drawn.append(Path(data["train"]).read_text())
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0].splitlines())) == runs.TRAINING_ROWS


def test_experiments_that_train_the_same_share_a_file_and_others_do_not() -> None:
    by_slug: dict[str, Method] = {}
    for experiment in ABLATIONS:
        assert by_slug.setdefault(experiment.trains.slug, experiment.trains) == experiment.trains
    assert len(by_slug) < len(ABLATIONS)
