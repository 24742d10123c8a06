"""What every result file has in common: where it comes from, how a spread is told, and that it is written whole."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.shapes import Shape
from turnrow.files import write_text

__all__ = ["plus_minus", "provenance", "result_file", "spread", "write"]


def provenance(benchmark: str, format_number: int, device: str = "cpu", shape: Shape | None = None) -> dict[str, Any]:
    """Return the head of a result: benchmark, time, machine, versions, commit, and the sizes of the model if it is one of `SHAPES`."""
    head = {
        "format": format_number,
        "benchmark": benchmark,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": environment.machine(device),
        "versions": environment.versions(),
        "commit": environment.commit(),
    }
    return head if shape is None else {**head, "shape": asdict(shape)}


def spread(samples: list[float]) -> dict[str, Any]:
    """Return median, quartiles and all samples."""
    if len(samples) == 1:
        quartiles = [samples[0], samples[0]]
    else:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        quartiles = [low, high]
    return {"median": statistics.median(samples), "quartiles": quartiles, "samples": samples}


def plus_minus(values: Sequence[float]) -> str:
    """Mean ± standard deviation of a sample, with one decimal; of one value that alone."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def write(result: dict[str, Any], path: Path) -> None:
    """Write `result` as JSON; `path` is never seen half written."""
    write_text(path, json.dumps(result, indent=1) + "\n")


def result_file(text: str) -> Path:
    """The type of an argument that names a result: a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return Path(text)
