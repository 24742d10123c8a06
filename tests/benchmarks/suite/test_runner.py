"""Cells run in processes of their own: one that dies does not take the others along."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.suite import runner
from benchmarks.suite.suite import Cell, Rates
from turnrow.errors import UserError

RATES = Rates((1e-3,), (1e-3,))


def cells(*names: str) -> list[Cell]:
    return [Cell("toy", "sst2", {"method": {"name": name}}, {}, None, (0,), RATES) for name in names]


def work(cell: Cell, data: Path, threads: int, root: Path) -> None:
    """Stands in for a cell's work; a process of its own can import it by name."""
    if cell.slug == "dies":
        os._exit(9)
    root.mkdir(exist_ok=True)
    (root / cell.slug).write_text(json.dumps([str(data), threads]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / "sst2" / f"{split}.jsonl.gz").touch()
    return tmp_path / "data"


def test_a_cell_whose_process_dies_is_reported_and_the_rest_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "work", work)
    dies, last = cells("dies", "last")
    assert runner.run_cells([dies, last], data, root=tmp_path / "runs") == [dies]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["last"]
    printed = capsys.readouterr().out
    assert "1/2 sst2: dies\n  its process ended with 9; going on with the next\n2/2 sst2: last" in printed


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_data_that_is_not_there_is_named_before_anything_runs(split: str, data: Path, tmp_path: Path) -> None:
    (data / "sst2" / f"{split}.jsonl.gz").unlink()
    with pytest.raises(UserError, match=f"there is no .*{split}.jsonl.gz; name with --data the folder"):
        runner.run_cells(cells("first"), data, root=tmp_path / "runs")


@pytest.mark.parametrize("option", ["workers", "threads"])
def test_no_worker_and_no_thread_are_refused(option: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--{option} is 0; at least 1 is needed"):
        runner.run_cells(cells("first"), data, root=tmp_path / "runs", **{option: 0})


@pytest.mark.parametrize(
    ("raised", "status"), [(KeyboardInterrupt("ended after step 3"), 130), (UserError("no run came to an end"), None)]
)
def test_a_cell_that_ends_early_ends_its_process_without_a_traceback(
    raised: BaseException, status: int | None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> None:
        raise raised

    monkeypatch.setattr(runner, "measure", measure)
    with pytest.raises(SystemExit) as ended:
        runner.work(cells("first")[0], data, 1, tmp_path / "runs")
    assert ended.value.code == (status or f"  {raised}")


@pytest.mark.slow
def test_several_cells_at_once_run_through_ray(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="needs turnrow[ray]")
    monkeypatch.setattr(runner, "work", work)
    first, dies, last = cells("first", "dies", "last")
    assert runner.run_cells([first, dies, last], data, workers=2, root=tmp_path / "runs") == [dies]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["first", "last"]
