"""Read a table, from a local file or from the Hugging Face hub, with errors that say where the file is broken.

The parsers are the standard library's and pyarrow's. What is added is the place: the loaders of `datasets` and pandas
report a broken line without its number or, for gzip, without its file.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turnrow.errors import UserError, near_matches

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

__all__ = ["read_table", "split_files"]

# What csv.field_size_limit takes on every platform (a C long): an article in a cell must not be refused.
_LARGEST_FIELD = 2**31 - 1


def read_table(source: str | os.PathLike[str], split: str | None = None) -> Dataset:
    """Read one split of a data set as a table.

    Args:
        source: a local file ending in .jsonl, .json, .csv, .tsv (each also with .gz) or .parquet; or a hub id `name`,
            `name:config` or `name:config:split`, where config may be empty and split is anything
            `datasets.load_dataset` takes, such as `train[:90%]`.
        split: the split of a hub data set, where `source` does not name one. Ignored for a file, which is one split.

    .json is one list of objects, .jsonl one object per line (blank lines are skipped). .csv and .tsv have a header and
    all their values stay text, so that `007` does; tasks turn text into numbers where they need numbers. .csv quotes as
    Excel does; .tsv knows no quoting (a quote is a letter, as in the files of GLUE). Text is UTF-8, with or without BOM.

    Raises:
        UserError: the source does not exist, has an unknown ending, holds no rows or is broken; for a broken text file
            with the number of the line.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.exists() or _is_meant_as_file(name):
        return _read_file(path)
    return _read_hub(name, split)


def split_files(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the files of a folder that are called after splits: ``train.jsonl.gz``, ``validation.csv``, ``test.parquet``, ...

    Raises:
        UserError: there is no such folder, none of the files is there, or several hold one split.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(
            f"data folder {str(folder)!r} does not exist; name a folder with the files train.jsonl, test.jsonl, ..."
        )
    found: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        files = [root / f"{split}{ending}" for ending in _READERS if (root / f"{split}{ending}").is_file()]
        if len(files) > 1:
            raise UserError(
                f"data folder {str(folder)!r} holds the split {split!r} more than once: {', '.join(f.name for f in files)}; "
                "keep one, or name the files of the splits one by one"
            )
        if files:
            found[split] = str(files[0])
    if not found:
        raise UserError(
            f"data folder {str(folder)!r} holds no file named after a split, such as train.jsonl or test.csv.gz; known endings "
            f"are {', '.join(_READERS)}"
        )
    return found


def _is_meant_as_file(name: str) -> bool:
    """Hub ids are `name` or `owner/name`, which no path with a known ending, a leading `.`, `/` or `~` is."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.lower().endswith(tuple(_READERS))


def _read_file(path: Path) -> Dataset:
    from datasets import Dataset

    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data file {str(path)!r} does not exist{near_matches(path.name, siblings)}")
    if path.is_dir():
        raise UserError(f"data source {str(path)!r} is a folder; name one file in it")
    ending = next((ending for ending in _READERS if path.name.lower().endswith(ending)), None)
    if ending is None:
        raise UserError(f"data file {str(path)!r} has an unknown ending; known are {', '.join(_READERS)}")
    try:
        table = _READERS[ending](path)
    except OSError as error:
        raise UserError(f"data file {str(path)!r} cannot be read: {error}") from error
    if table.num_rows == 0:
        raise UserError(f"data file {str(path)!r} is empty: it holds no rows")
    data = Dataset(table)
    # Survives select, shuffle and map, so that later errors can name the file.
    data.info.dataset_name = str(path)
    return data


def _read_hub(source: str, split: str | None) -> Dataset:
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    name, config, named_split = (*source.split(":", 2), "", "")[:3]
    wanted = named_split or split
    try:
        data: Any = load_dataset(name, config or None, split=wanted)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"data source {source!r} is no file here, and reading split {wanted!r} of it as a hub data set failed: "
            f"{error}; give an existing file ({', '.join(_READERS)}) or a hub id NAME, NAME:CONFIG or NAME:CONFIG:SPLIT"
        ) from error
    if isinstance(data, DatasetDict):
        if len(data) != 1:
            raise UserError(
                f"data source {source!r} has the splits {', '.join(map(str, data))}; say which as {name}:{config}:SPLIT"
            )
        (data,) = data.values()
    if len(data) == 0:
        raise UserError(f"data source {source!r} is empty: split {wanted!r} holds no rows")
    return data


def _read_jsonl(path: Path) -> pyarrow.Table:
    rows, lines = [], []
    for number, line in _lines(path):
        if line.strip():
            rows.append(_json_object(line, f"{path}, line {number}"))
            lines.append(number)
    return _table(rows, lambda index: f"{path}, line {lines[index]}")


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: broken JSON, {error.msg} at column {error.colno}: {_excerpt(line)}") from error
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits; brackets nested thousands deep
        raise UserError(f"{place}: broken JSON, {error}: {_excerpt(line)}") from error
    return _checked_object(row, place)


def _checked_object(row: object, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be a JSON object of column names and values, got {_excerpt(repr(row))}")
    return row


def _read_json(path: Path) -> pyarrow.Table:
    text = "".join(line for _, line in _lines(path))
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = (
            "; if every line is an object of its own, let the name end in .jsonl" if error.msg == "Extra data" else ""
        )
        raise UserError(
            f"{path}, line {error.lineno}: broken JSON, {error.msg} at column {error.colno}{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON, {error}") from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: a .json file must hold one list of objects, got {_excerpt(repr(rows))}; "
            "if every line is an object of its own, let the name end in .jsonl"
        )
    return _table(
        [_checked_object(row, f"{path}, item {number}") for number, row in enumerate(rows, start=1)],
        lambda index: f"{path}, item {index + 1}",
    )


def _read_csv(path: Path) -> pyarrow.Table:
    return _read_delimited(path, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> pyarrow.Table:
    return _read_delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(path: Path, *, delimiter: str, quoting: Any) -> pyarrow.Table:
    import pyarrow

    rows = []
    first_line = 1
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, quoting=quoting, strict=True)
    with _long_fields():
        try:
            header = next(reader, [])
            _check_header(header, path)
            first_line = reader.line_num + 1
            for cells in reader:
                if cells:  # none in a blank line
                    rows.append(_delimited_row(header, cells, f"{path}, line {first_line}"))
                first_line = reader.line_num + 1
        except csv.Error as error:
            # An opening quote without its partner swallows all lines to the end: the fault is at the first of them.
            read_to = f" (read to line {reader.line_num})" if reader.line_num > first_line else ""
            raise UserError(f"{path}, line {first_line}: broken row{read_to}, {error}") from error
    return pyarrow.Table.from_pylist(rows)


def _delimited_row(header: list[str], cells: list[str], place: str) -> dict[str, str]:
    if len(cells) != len(header):
        raise UserError(
            f"{place}: ragged row, {len(cells)} cells where the header names {len(header)} columns "
            f"({', '.join(header)}): {_excerpt(repr(cells))}"
        )
    return dict(zip(header, cells, strict=True))


def _check_header(header: list[str], path: Path) -> None:
    for column in header:
        if not column.strip():
            raise UserError(f"{path}, line 1: the header has a column without a name: {_excerpt(repr(header))}")
        if header.count(column) > 1:
            raise UserError(f"{path}, line 1: the header names column {column!r} more than once")


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_LARGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> pyarrow.Table:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"data file {str(path)!r} is no readable parquet file: {error}") from error


# By ending; `.gz` is undone by `_lines`.
_READERS: dict[str, Callable[[Path], pyarrow.Table]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".tsv": _read_tsv,
    ".tsv.gz": _read_tsv,
    ".parquet": _read_parquet,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its end). Lines end at newlines alone: U+2028 and its like are text."""
    number = 0
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as stream:
        try:
            for number, raw in enumerate(stream, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8 text, {error.reason} at byte {error.start}") from error
        except EOFError as error:
            raise UserError(f"{path}: the gzip file is truncated, it breaks off after line {number}") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: broken gzip file after line {number}, {error}") from error


def _table(rows: list[dict[str, Any]], place: Callable[[int], str]) -> pyarrow.Table:
    """Turn rows into columns; a column that a row lacks is null there. `place` tells where a row stands in the file."""
    import pyarrow

    names = list(dict.fromkeys(name for row in rows for name in row))
    return pyarrow.table({name: _column(name, [row.get(name) for row in rows], place) for name in names})


def _column(name: str, values: list[Any], place: Callable[[int], str]) -> pyarrow.Array:
    import pyarrow

    refusals = (pyarrow.ArrowException, OverflowError, UnicodeEncodeError)
    try:
        return pyarrow.array(values)
    except refusals as error:

        def is_refused(length: int) -> bool:
            try:
                pyarrow.array(values[:length])
            except refusals:
                return True
            return False

        # pyarrow does not say which value it refused: it is the last one of the shortest refused beginning.
        index = bisect_left(range(1, len(values)), True, key=is_refused)
        raise UserError(
            f"{place(index)}: column {name!r} cannot hold {_excerpt(repr(values[index]))}: {error}; "
            f"all values of a column must have one type{_types_before(values[:index])}"
        ) from error


def _types_before(values: Iterable[Any]) -> str:
    kinds = sorted({type(value).__name__ for value in values if value is not None})
    return f" (rows before: {', '.join(kinds)})" if kinds else ""


def _excerpt(text: str, width: int = 80) -> str:
    text = text.strip()
    return text if len(text) <= width else text[: width - 3] + "..."
