"""Put a load on `turnrow serve`, check every answer, and watch its memory. Everything stays on this machine.

    python -m benchmarks.serving_load --output benchmarks/results/serving-load.json --plot docs/figures/serving-load.png
    python -m benchmarks.serving_load --leaving 0.2 --spoilt 100                        # harsher
    python -m benchmarks.serving_load --show benchmarks/results/serving-load.json

A thousand adapters of four methods are written for the small Llama, most of them never asked for, a few often (Zipf's law). The server
has slots for fewer than are asked for, and host memory for fewer still, so that they come from disk again and again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import add_result, check_positive
from benchmarks.results import provenance, write
from benchmarks.serving_load.adapters import spoil, write_adapters
from benchmarks.serving_load.answers import judge, references
from benchmarks.serving_load.asking import ask_all, draw
from benchmarks.serving_load.report import markdown, plot, summary
from benchmarks.serving_load.server import Child, figures_of

__all__ = ["main", "run_load"]

FORMAT = 1
_MODEL = Path(__file__).parents[2] / "examples" / "small_llama" / "model"
_SETTLE_S = 1.0
"""Between the last answer and the last look."""


def run_load(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write adapters into `folder`, serve, ask, check; everything that a result file holds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    root = folder / "adapters"
    names = write_adapters(base, root, settings["adapters"], settings["seed"])
    asks = draw(
        names,
        settings["requests"],
        exponent=settings["exponent"],
        seed=settings["seed"],
        leaving=settings["leaving"],
    )
    asked = list(dict.fromkeys(ask.adapter for ask in asks))
    # from the middle of the popularities: neither the one that most ask for nor those that nobody does
    spoilt = frozenset(
        asked[1 :: max(1, len(asked) // settings["spoilt"])][: settings["spoilt"]] if settings["spoilt"] else ()
    )
    for name in spoilt:
        spoil(root / name)
    each = sum(file.stat().st_size for file in root.glob("*/adapter_model.safetensors")) // len(names)
    arguments = {
        "--model": str(settings["model"]),
        "--adapters": str(root),
        "--dtype": "float32",
        "--device": "cpu",
        "--slots": str(settings["slots"]),
        "--max-running": str(settings["at_once"]),
        "--host-memory": str(settings["held"] * each),
    }
    with Child([part for pair in arguments.items() for part in pair], folder / "server.log") as server:
        time.sleep(_SETTLE_S)
        began = server.seconds()
        outcomes = ask_all(server.url, asks, settings["at_once"])
        ended = server.seconds()
        time.sleep(_SETTLE_S)
        figures = figures_of(server.url)
    expected = references(base, tokenizer, root, outcomes)
    verdicts = [
        judge(outcome, expected[outcome.ask.adapter, outcome.ask.prompt])
        if outcome.status == 200 and not outcome.left
        else None
        for outcome in outcomes
    ]
    found = summary(outcomes, verdicts, server.memory, (began, ended), figures, spoilt)
    whole = [outcome for outcome in outcomes if outcome.status == 200 and not outcome.left]
    return {
        "summary": {**found, "adapter_bytes": each, "exit_status": server.status},
        "examples_of_wrong": [
            {"adapter": o.ask.adapter, "got": o.text, "expected": v.expected}
            for o, v in zip(outcomes, verdicts, strict=True)
            if v is not None and not v.is_right
        ][:5],
        "latencies": {
            "first_token": [round(o.first - o.began, 4) for o in outcomes if o.first is not None],
            "whole": [round(o.ended - o.began, 4) for o in whole],
        },
        "load": [began, ended],
        "memory": [[round(at, 2), resident] for at, resident in server.memory],
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=_MODEL, help="a folder; default: the small Llama of the examples")
    parser.add_argument("--adapters", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--slots", type=int, default=64, help="of the server; default: %(default)s")
    parser.add_argument(
        "--held", type=int, default=100, help="adapters in host memory, of average size; default: %(default)s"
    )
    parser.add_argument("--requests", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--at-once", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law; default: %(default)s")
    parser.add_argument("--leaving", type=float, default=0.0, help="the share of clients that go away in the middle")
    parser.add_argument("--spoilt", type=int, default=0, help="adapters with damaged files")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    add_result(parser)
    arguments = parser.parse_args(argv)
    check_positive(parser, arguments, "adapters", "slots", "requests", "at_once")
    if not 0 <= arguments.leaving <= 1:
        parser.error(f"--leaving is {arguments.leaving}, must be from 0 to 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a load, or show one; 1 if something was lost or wrong."""
    arguments = _arguments(argv)
    if arguments.show:
        result = json.loads(arguments.show.read_text())
    else:
        names = ("adapters", "slots", "held", "requests", "at_once", "exponent", "leaving", "spoilt", "seed")
        settings = {"model": arguments.model, **{name: getattr(arguments, name) for name in names}}
        head = provenance("serving_load", FORMAT)
        with tempfile.TemporaryDirectory() as folder:
            found = run_load(settings, Path(folder))
        result = {**head, "settings": {**settings, "model": arguments.model.parent.name}, **found}
    if arguments.output and not arguments.show:
        write(result, arguments.output)
    if arguments.plot:
        plot(result, arguments.plot)
    print(markdown(result))
    for one in result["examples_of_wrong"]:
        print(one, file=sys.stderr)
    found = result["summary"]
    return int(bool(found["lost"] or found["wrong"] or found["exit_status"]))


if __name__ == "__main__":
    sys.exit(main())
