"""turnrow inspect: what is in an adapter."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from turnrow.cli.console import table_console
from turnrow.files import finite_or_null

if TYPE_CHECKING:
    from turnrow.adapters import AdapterSummary, ModuleSummary

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "inspect"
HELP = "Show what is in an adapter: method, base, modules, indices, sizes, norms, provenance."

_PARTS = ("blocks", "train", "within")
"""Settings that are shown even where they are lists or mappings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("adapter", metavar="DIR", help="the adapter's folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print what is in the adapter; 1 if it holds values that are not finite, else 0."""
    from turnrow.adapters import inspect_adapter

    summary = inspect_adapter(args.adapter)
    if args.json:
        # NaN is no JSON: a norm that is not finite is printed as null
        print(json.dumps(finite_or_null(summary.to_dict()), indent=2, allow_nan=False))
    else:
        _print_tables(summary)
    return 1 if summary.non_finite else 0


def _print_tables(summary: AdapterSummary) -> None:
    from rich.table import Table

    console = table_console()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(summary).items():
        if value:
            facts.add_row(name, value)
    console.print(facts)
    table = Table("module", "weight", "trained", "values", "norm", "dtype", box=None, padding=(0, 1))
    for entry in (*summary.modules, *summary.saved, *summary.shared):
        table.add_row(*_cells(entry))
    console.print(table)
    for key, count in summary.non_finite.items():
        console.print(f"not finite: {count} values of {key}")


def _facts(summary: AdapterSummary) -> dict[str, str | None]:
    settings = {
        key: value if isinstance(value, str) else _short(value)
        for key, value in summary.settings.items()
        if isinstance(value, (str, int, float)) or key in _PARTS
    }
    trained = f"{summary.parameters:,} in {len(summary.modules)} modules"
    if summary.saved:
        trained += f" and {len(summary.saved)} parameters saved whole"
    if summary.shared:
        trained += f"; not counted: {sum(entry.parameters for entry in summary.shared):,} that all modules share"
    told = {key: value for key, value in summary.provenance.items() if key != "recipe_sha256"}
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in summary.dtypes.items())
    return {
        "adapter": summary.path,
        "method": summary.method,
        "settings": ", ".join(f"{key}={value}" for key, value in settings.items()),
        "base": summary.base,
        "task": summary.task_type,
        "trained values": trained,
        "file": f"{summary.file_bytes:,} bytes; tensors by dtype: {dtypes}",
        "checked on loading": "file and base" if summary.fingerprinted else "sizes only (no turnrow.json)",
        "written with": ", ".join(f"{name} {number}" for name, number in summary.versions.items()),
        "recipe": summary.recipe_sha256 and f"sha256 {summary.recipe_sha256}",
        **{f"provenance: {key}": _short(value) for key, value in told.items()},
    }


def _cells(entry: ModuleSummary) -> tuple[str, ...]:
    single = len(entry.norms) == 1
    norms = (f"{value:.4g}" if single else f"{name} {value:.4g}" for name, value in entry.norms.items())
    return (
        entry.name,
        "" if entry.shape is None else " x ".join(map(str, entry.shape)),
        "; ".join(f"{part} {short_indices(index)}" for part, index in (entry.indices or {}).items()),
        f"{entry.parameters:,}",
        ", ".join(norms),
        ", ".join(entry.dtypes),
    )


def short_indices(indices: list[Any], most: int = 8) -> str:
    """The first of some numbers, and how many there are; of lists for each expert those of the first."""
    if indices and isinstance(indices[0], list):
        same = all(of_expert == indices[0] for of_expert in indices)
        return f"{short_indices(indices[0])} in {'each' if same else 'the first'} of {len(indices)} experts"
    shown = " ".join(map(str, indices[:most]))
    return f"{shown} ... ({len(indices)})" if len(indices) > most else shown


def _short(value: object, most: int = 100) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= most else text[:most] + "... (whole in --json)"
