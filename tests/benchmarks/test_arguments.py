from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.arguments import add_kept_result, kept_result, need_data


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser()


@pytest.mark.parametrize("given", [None, "data"])
def test_data_that_is_not_there_is_named(
    parser: argparse.ArgumentParser, tmp_path: Path, given: str | None, capsys: pytest.CaptureFixture
) -> None:
    folder = given and tmp_path / given
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    (tmp_path / "data" / "sst2" / "train.jsonl.gz").touch()
    with pytest.raises(SystemExit, match="^2$"):
        need_data(parser, folder, ["trec", "sst2"])
    assert f"--data is {folder}; name the folder that holds trec/train.jsonl.gz" in capsys.readouterr().err
    need_data(parser, tmp_path / "data", ["sst2"])


def test_a_result_that_is_kept_is_shown_where_it_is(
    parser: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    add_kept_result(parser, tmp_path / "kept.json")
    arguments = parser.parse_args(["--show"])
    with pytest.raises(SystemExit, match="^2$"):
        kept_result(parser, arguments.output)
    assert "there is no result" in capsys.readouterr().err
    arguments.output.write_text('{"format": 1}')
    assert kept_result(parser, arguments.output) == {"format": 1}
