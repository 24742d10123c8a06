"""Tokens a second with many adapters in one batch: our engine, method by method, and peft's batches of ``adapter_names``.

    python -m benchmarks.serving --shape llama-1024 --output benchmarks/results/serving-llama-1024-cpu.json
    python -m benchmarks.serving --shape llama-3.2-3b --device cuda --output benchmarks/results/serving-llama-3.2-3b-cuda.json
    python -m benchmarks.serving --show benchmarks/results/serving-llama-1024-cpu.json

Two loads: short prompts with long answers (decoding), and long prompts with short answers. A batch of requests shares 1, 8 or 32 different
adapters. All methods share the storage of one set of base weights, adapt the same layers, see the same prompts and generate greedily as
many tokens. Before a method is timed, its answers are held against those of the merged models. All methods answer at once and take turns, a forward pass each.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import add_result, add_shape, add_threads, check_positive
from benchmarks.results import provenance, write
from benchmarks.serving.methods import BASE, METHODS, enliven
from benchmarks.serving.table import markdown
from benchmarks.serving.timing import TOLERANCE, measure_load
from benchmarks.serving.turns import CLOCKS
from benchmarks.shapes import SHAPES, build_model, target_names

__all__ = ["main"]

FORMAT = 1
_SEED = 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    decoders = [name for name, shape in SHAPES.items() if shape.family == "llama"]
    add_shape(parser, decoders, TOLERANCE, default="llama-1024")
    parser.add_argument("--requests", type=int, default=32, help="in a batch; default: %(default)s")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32], help="in a batch; default: 1 8 32")
    parser.add_argument(
        "--decode", type=int, nargs=2, default=[16, 64], metavar=("PROMPT", "NEW"), help="default: 16 64"
    )
    parser.add_argument(
        "--prefill", type=int, nargs=2, default=[192, 8], metavar=("PROMPT", "NEW"), help="default: 192 8"
    )
    parser.add_argument(
        "--loads", nargs="+", choices=("decode", "prefill"), default=["decode", "prefill"], help="default: both"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument(
        "--peer-rounds", type=int, default=3, help="rounds in which peft runs, too; default: %(default)s"
    )
    parser.add_argument("--batch-tokens", type=int, default=512, help="in a step of the engine; default: %(default)s")
    add_threads(parser, 1)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        help="processor time of the thread that runs the model, or the time of day; default: the first on one thread of a CPU",
    )
    add_result(parser)
    arguments = parser.parse_args(argv)
    check_positive(parser, arguments, "requests", "rounds", "peer_rounds", "batch_tokens", "threads")
    if not all(1 <= count <= arguments.requests for count in arguments.adapters):
        parser.error(f"--adapters is {arguments.adapters}, must be from 1 to the {arguments.requests} requests")
    return arguments


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[arguments.shape]
    on_one_core = arguments.device == "cpu" and arguments.threads == 1
    settings: dict[str, Any] = {
        "shape": arguments.shape,
        "device": arguments.device,
        "dtype": arguments.dtype or shape.dtype,
        "requests": arguments.requests,
        "adapters": sorted(set(arguments.adapters)),
        "loads": {load: getattr(arguments, load) for load in arguments.loads},
        "rounds": arguments.rounds,
        "peer_rounds": min(arguments.peer_rounds, arguments.rounds),
        "batch_tokens": arguments.batch_tokens,
        "clock": arguments.clock or CLOCKS[0 if on_one_core else 1],
        "seed": _SEED,
    }
    names = [name for name in METHODS if name in arguments.methods or name == BASE]
    head = provenance("serving", FORMAT, arguments.device, shape)
    base = build_model(shape, device=arguments.device, dtype=getattr(torch, settings["dtype"]), seed=_SEED).eval()
    targets = target_names(base)
    enliven(base, targets)
    methods: dict[str, dict[str, Any]] = {}
    of_engine = ("requests", "adapters", "rounds", "peer_rounds", "batch_tokens", "clock", "seed")
    with tempfile.TemporaryDirectory() as folder:
        for load, lengths in settings["loads"].items():
            found = measure_load(
                base, names, targets, Path(folder), tuple(lengths), **{name: settings[name] for name in of_engine}
            )
            for name, entry in found.items():
                method = methods.setdefault(
                    name,
                    {"title": METHODS[name].title, "where": METHODS[name].where, "parameters": entry["parameters"]},
                )
                method[load] = {"gap": entry["gap"], "adapters": entry["adapters"]}
    return {**head, "settings": settings, "methods": methods}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or show a result."""
    arguments = _arguments(argv)
    if arguments.show:
        print(markdown(json.loads(arguments.show.read_text())))
        return 0
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    result = _measure(arguments)
    if arguments.output:
        write(result, arguments.output)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
