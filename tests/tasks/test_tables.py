from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnrow.errors import UserError
from turnrow.tasks import read_table

ROWS = [{"sentence": "a dog, “so”\u2028happy", "label": 1}, {"sentence": 'she said "no"', "label": 0}]


def write(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".JSONL"])
def test_jsonl_keeps_rows_and_types(tmp_path: Path, ending: str) -> None:
    assert read_table(write(tmp_path / f"data{ending}", jsonl(ROWS))).to_list() == ROWS


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_json_keeps_rows_and_types(tmp_path: Path, ending: str) -> None:
    assert read_table(write(tmp_path / f"data{ending}", json.dumps(ROWS, indent=1))).to_list() == ROWS


def test_parquet_keeps_rows_and_types(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    assert read_table(tmp_path / "data.parquet").to_list() == ROWS


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_csv_reads_quotes_and_newlines_as_excel_does_and_keeps_numbers_as_text(tmp_path: Path, ending: str) -> None:
    file = write(tmp_path / f"data{ending}", '\ufeffsentence,label\r\n"one, ""two""\r\nthree",007\r\n\r\nfour,1\r\n')
    assert read_table(file).to_list() == [
        {"sentence": 'one, "two"\r\nthree', "label": "007"},
        {"sentence": "four", "label": "1"},
    ]


def test_tsv_knows_no_quotes(tmp_path: Path) -> None:
    file = write(tmp_path / "data.tsv", 'sentence\tlabel\n"half a quotation\t0\nit\'s 5" long\t1\n')
    assert read_table(file)["sentence"][:] == ['"half a quotation', "it's 5\" long"]


def test_blank_jsonl_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    assert len(read_table(write(tmp_path / "data.jsonl", '\n{"a": 1}\n  \n{"a": 2}'))) == 2
    with pytest.raises(UserError, match=r"data\.jsonl, line 3: broken JSON"):
        read_table(write(tmp_path / "data.jsonl", '{"a": 1}\n\n{"a": 2\n'))


def test_a_column_that_a_row_lacks_is_null_there(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", jsonl([{"a": 1}, {"b": "x"}]))
    assert read_table(file).to_list() == [{"a": 1, "b": None}, {"a": None, "b": "x"}]


def test_nested_values_are_kept(tmp_path: Path) -> None:
    rows = [{"answers": {"text": ["a", "b"], "answer_start": [1, 2]}}, {"answers": {"text": [], "answer_start": []}}]
    assert read_table(write(tmp_path / "data.jsonl", jsonl(rows))).to_list() == rows


def test_the_table_remembers_its_file(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", jsonl(ROWS))
    assert read_table(file).shuffle(seed=0).select([0]).info.dataset_name == str(file)


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(texts, min_size=1))
def test_any_text_survives_jsonl_and_csv(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> None:
    folder = tmp_path_factory.mktemp("texts")
    file = write(folder / "data.jsonl", jsonl([{"a": text} for text in sentences]))
    assert read_table(file)["a"][:] == sentences
    # "\r" alone ends a line for csv's writer and reader, which then quote it; NUL is refused by older Pythons.
    sentences = [text.replace("\0", " ") for text in sentences]
    with (folder / "data.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["a"], *([text] for text in sentences)])
    assert read_table(folder / "data.csv")["a"][:] == sentences


BROKEN: dict[str, tuple[str, str | bytes, str]] = {
    "json line": (
        "d.jsonl",
        '{"a": 1}\n{"a": 1,}\n',
        r"d\.jsonl, line 2: broken JSON, .* at column \d+: \{\"a\": 1,\}",
    ),
    "cut json line": ("d.jsonl", '{"a": 1}\n{"a": 2}\n{"a', r"d\.jsonl, line 3: broken JSON"),
    "huge number": ("d.jsonl", '{"a": ' + "9" * 5000 + "}", r"d\.jsonl, line 1: broken JSON, Exceeds the limit"),
    "deep nesting": ("d.jsonl", "[" * 100_000, r"d\.jsonl, line 1: broken JSON"),
    "array row": ("d.jsonl", '{"a": 1}\n[1, 2]\n', r"d\.jsonl, line 2: a row must be a JSON object .*, got \[1, 2\]"),
    "null row": ("d.jsonl.gz", '{"a": 1}\nnull\n', r"d\.jsonl\.gz, line 2: a row must be a JSON object .*, got None"),
    "encoding": ("d.jsonl", b'{"a": "x"}\n{"a": "\xe9t\xe9"}\n', r"d\.jsonl, line 2: not UTF-8 text, .* at byte 7"),
    "csv encoding": ("d.csv", "a,b\n1,2\n3,é\n".encode("latin-1"), r"d\.csv, line 3: not UTF-8 text"),
    "type": (
        "d.jsonl",
        '{"a": 1}\n\n{"a": null}\n{"a": "one"}\n{"a": 2}\n',
        r"d\.jsonl, line 4: column 'a' cannot hold 'one': .*must have one type \(rows before: int\)",
    ),
    "type in a list": ("d.json", '[{"a": "x"}, {"a": 1}]', r"d\.json, item 2: column 'a' cannot hold 1"),
    "type below": ("d.jsonl", '{"a": {"b": 1}}\n{"a": {"b": "x"}}\n', r"d\.jsonl, line 2: column 'a' cannot hold"),
    "integer too large": (
        "d.jsonl",
        '{"a": 1}\n{"a": 99999999999999999999}\n',
        r"d\.jsonl, line 2: column 'a' cannot hold",
    ),
    "lone surrogate": (
        "d.jsonl",
        '{"a": "x"}\n{"a": "\\ud800"}\n',
        r"d\.jsonl, line 2: column 'a' cannot hold .*surrogate",
    ),
    "json syntax": ("d.json", '[\n{"a": 1},\n{"a" 2}\n]', r"d\.json, line 3: broken JSON, Expecting ':' delimiter"),
    "json lines in json": (
        "d.json",
        '{"a": 1}\n{"a": 2}\n',
        r"d\.json, line 2: broken JSON.*let the name end in \.jsonl",
    ),
    "json object": ("d.json", '{"a": [1, 2]}', r"d\.json: a \.json file must hold one list of objects, got \{'a'"),
    "json item": ("d.json", '[{"a": 1}, 5]', r"d\.json, item 2: a row must be a JSON object .*, got 5"),
    "deep json": ("d.json", "[" * 100_000, r"d\.json: broken JSON"),
    "ragged csv": (
        "d.csv",
        'a,b\n"x\ny",1\n"z\nw"\n',
        r"d\.csv, line 4: ragged row, 1 cells where the header names 2 .*\(a, b\)",
    ),
    "long csv row": ("d.csv", "a,b\n1,2\n1,2,3\n", r"d\.csv, line 3: ragged row, 3 cells"),
    "ragged tsv": ("d.tsv.gz", "a\tb\n1\t2\n1 2\n", r"d\.tsv\.gz, line 3: ragged row, 1 cells"),
    "open quote": ("d.csv", 'a,b\n1,2\n"1,2\n3,4\n', r"d\.csv, line 3: broken row \(read to line 4\), unexpected end"),
    "quote in a cell": ("d.csv", 'a,b\n1,2\n"x"y,2\n', r"d\.csv, line 3: broken row, ',' expected after '\"'"),
    "column twice": ("d.csv", "a,b,a\n1,2,3\n", r"d\.csv, line 1: the header names column 'a' more than once"),
    "nameless column": ("d.csv", ",a\n1,2\n", r"d\.csv, line 1: the header has a column without a name"),
    "no parquet": ("d.parquet", b"PAR1 and then nothing of the kind", r"d\.parquet' is no readable parquet file"),
    "empty jsonl": ("d.jsonl", "", r"d\.jsonl' is empty: it holds no rows"),
    "blank jsonl": ("d.jsonl.gz", "\n\n", r"d\.jsonl\.gz' is empty: it holds no rows"),
    "empty json": ("d.json", "[]", r"d\.json' is empty: it holds no rows"),
    "blank json": ("d.json", " ", r"d\.json' is empty: it holds no rows"),
    "empty csv": ("d.csv", "", r"d\.csv' is empty: it holds no rows"),
    "header only": ("d.tsv", "a\tb\n", r"d\.tsv' is empty: it holds no rows"),
    "unknown ending": ("d.xlsx", b"PK", r"d\.xlsx' has an unknown ending; known are \.jsonl, \.jsonl\.gz, .*\.parquet"),
    "packed parquet": ("d.parquet.gz", b"PAR1", r"d\.parquet\.gz' has an unknown ending"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_file_is_refused_with_its_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_table(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.csv.gz"])
def test_truncated_gzip_says_after_which_line(tmp_path: Path, name: str) -> None:
    # Stored, not compressed, so that it is known how much can still be read.
    packed = gzip.compress(b'{"a": 1}\n' * 20_000, compresslevel=0)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(
        UserError, match=rf"{re.escape(name)}: the gzip file is truncated, it breaks off after line \d+"
    ):
        read_table(tmp_path / name)


def test_altered_gzip_is_refused(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(jsonl(ROWS * 50).encode()))
    packed[-6] ^= 0xFF  # the checksum
    (tmp_path / "d.jsonl.gz").write_bytes(packed)
    with pytest.raises(UserError, match=r"d\.jsonl\.gz: broken gzip file after line \d+, CRC check failed"):
        read_table(tmp_path / "d.jsonl.gz")


def test_gzip_by_name_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl.gz").write_text(jsonl(ROWS))
    with pytest.raises(UserError, match=r"d\.jsonl\.gz: broken gzip file after line 0, Not a gzipped file"):
        read_table(tmp_path / "d.jsonl.gz")


def test_missing_file_names_its_near_matches(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl.gz", jsonl(ROWS))
    with pytest.raises(UserError, match=r"trian\.jsonl\.gz' does not exist; did you mean 'train\.jsonl\.gz'\?"):
        read_table(tmp_path / "trian.jsonl.gz")


@pytest.mark.parametrize("name", ["nowhere/at/all.csv", "./glue", "all.jsonl"])
def test_what_looks_like_a_file_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=rf"data file .*{re.escape(name.removeprefix('./'))}' does not exist"):
        read_table(name)


def test_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_table_denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pyarrow.parquet, "read_table", read_table_denied)
    with pytest.raises(UserError, match=r"d\.parquet' cannot be read: .*Permission denied"):
        read_table(write(tmp_path / "d.parquet", "any"))


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name one file in it"):
        read_table(tmp_path)


def test_long_cells_are_read_and_the_limit_of_csv_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit(1000)
    try:
        assert read_table(write(tmp_path / "d.csv", "a\n" + "x" * 200_000)).num_rows == 1
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("glue", "train", ("glue", None, "train")),
        ("owner/set:sst2", "test", ("owner/set", "sst2", "test")),
        ("owner/set:sst2:validation", "test", ("owner/set", "sst2", "validation")),
        ("imdb::train[:10%]", "train", ("imdb", None, "train[:10%]")),
    ],
)
def test_hub_id_names_config_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, split: str, expected: tuple[str, str | None, str]
) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_table(source, split).to_list() == ROWS
    assert asked == [expected]


def test_hub_data_set_of_one_split_needs_no_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"all": datasets.Dataset.from_list(ROWS)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: datasets.DatasetDict(splits))
    assert read_table("owner/set").to_list() == ROWS
    splits["more"] = datasets.Dataset.from_list([])
    with pytest.raises(UserError, match="'owner/set' has the splits all, more; say which as owner/set::SPLIT"):
        read_table("owner/set")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: splits[split])
    with pytest.raises(UserError, match="'owner/set' is empty: split 'more' holds no rows"):
        read_table("owner/set", "more")


def test_unreachable_hub_id_is_an_error_that_says_what_may_be_given() -> None:
    with pytest.raises(
        UserError, match=r"'no/such' is no file here, and reading split 'train' .* hub id NAME, NAME:CONFIG"
    ):
        read_table("no/such", "train")


@pytest.mark.parametrize("error", [ValueError("Unknown split 'x'"), datasets.exceptions.DatasetNotFoundError("gone")])
def test_what_the_hub_refuses_is_passed_on(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=re.escape(str(error))):
        read_table("glue", "x")


Reader = Callable[[str, str], Path]


@pytest.mark.parametrize(
    ("name", "split", "rows", "columns"),
    [
        ("sst2", "train", 6920, ["sentence", "label"]),
        ("rte", "test", 277, ["sentence1", "sentence2", "label"]),
        ("stsb", "validation", 1500, ["sentence1", "sentence2", "label"]),
        ("squad_v2", "test", 1598, ["id", "title", "context", "question", "answers"]),
    ],
)
def test_real_files_are_read_whole(real_data: Reader, name: str, split: str, rows: int, columns: list[str]) -> None:
    file = real_data(name, split)
    data = read_table(file)
    assert (data.num_rows, data.column_names) == (rows, columns)
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        assert data.to_list() == [json.loads(line) for line in stream]
