"""turnrow import-road: a RoAd adapter out of another program's angles and scales."""

from __future__ import annotations

import argparse

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "import-road"
HELP = "Make a RoAd adapter of a safetensors file with theta and alpha of each module, in the paper's order or another."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="safetensors with MODULE.theta (rad) and MODULE.alpha, or peft's road_theta and road_alpha",
    )
    parser.add_argument("--base", metavar="MODEL", required=True, help="folder or Hub id of the model they belong to")
    parser.add_argument(
        "--task",
        required=True,
        help="peft's task type, such as SEQ_CLS or CAUSAL_LM, which chooses the class of the base",
    )
    parser.add_argument(
        "--pairs",
        metavar="PAIRS",
        required=True,
        help="neighbours (0 and 1, 2 and 3, ...: the paper's), halves (j and j + half the module's outputs: LLaMA's), or a number G "
        "(j and j + G/2 in each group of G: peft's group_size)",
    )
    parser.add_argument(
        "--rename",
        metavar="OLD=NEW",
        nargs="+",
        default=[],
        help="parts of the file's names and what they are called in the base, such as wq=q_proj; nothing after = takes them out",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder for the adapter")


def run(args: argparse.Namespace) -> int:
    """Import and print what was written."""
    from turnrow.adapters import import_road, load_for_task
    from turnrow.adapters.writing import check_new_folder
    from turnrow.errors import UserError
    from turnrow.pretrained import resolve_model, without_load_report

    # what can be refused is refused before a large model is loaded
    check_new_folder(args.out)
    rename = dict(word.partition("=")[::2] for word in args.rename)
    bad = next((word for word in args.rename if not word.partition("=")[0] or "=" not in word), None)
    if bad is not None:
        raise UserError(f"--rename is {bad!r}; it must be OLD=NEW, such as wq=q_proj")
    with without_load_report():
        base = load_for_task(resolve_model(args.base), args.task)
    written = import_road(
        args.file,
        base,
        args.out,
        pairs=int(args.pairs) if args.pairs.isdecimal() else args.pairs,
        rename=rename,
        task_type=args.task,
        base_name=args.base,
    )
    print(
        f"wrote {written.path}: ROAD adapter ({written.variant}, group_size {written.group_size}) of {written.modules} modules"
    )
    return 0
