"""turnrow merge: put an adapter into its base for good."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from turnrow.cli._base import base_of

if TYPE_CHECKING:
    from turnrow.adapters import AdapterFile, MergeResult

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "merge"
HELP = "Merge an adapter into its base model and save a plain transformers model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--base", metavar="MODEL", help="folder or Hub id of the base (default: the one named in the adapter)"
    )
    parser.add_argument("--adapter", metavar="DIR", required=True, help="the adapter's folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder for the merged model")
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="of a quantized base: merge into a dense copy, which loses nothing and takes the memory of a dense model",
    )
    parser.add_argument(
        "--no-check-base", action="store_true", help="merge even if the base is not the one it was trained on"
    )
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="load the whole model, where its files could be merged one weight at a time",
    )
    undoing = parser.add_mutually_exclusive_group()
    undoing.add_argument(
        "--keep-base",
        action="store_true",
        help="write what the adapter replaces beside the adapter, so that --unmerge can put it back",
    )
    undoing.add_argument(
        "--unmerge",
        action="store_true",
        help="take the adapter out of a model that it was merged into (--base), bit for bit; needs what --keep-base wrote",
    )


def run(args: argparse.Namespace) -> int:
    """Merge, save model and tokenizer, and print how much changed."""
    from turnrow.adapters import (
        MergePlan,
        load_processor,
        merge_files,
        plan_merge,
        read_adapter,
        store_originals,
        unmerge_files,
    )
    from turnrow.adapters.writing import check_new_folder

    # what can be refused is refused before a large model is loaded
    check_new_folder(args.out)
    adapter = read_adapter(args.adapter)
    base = base_of(adapter, args.base)
    if args.unmerge:
        result = unmerge_files(args.adapter, base, args.out)
        print(f"took {args.adapter} out of {len(result.changes)} modules of {base}: wrote {result.path}")
        return 0
    loads = args.in_memory or args.dequantize
    plan = None if loads and not args.keep_base else plan_merge(adapter, base)
    check_base = not args.no_check_base
    if args.keep_base:
        print(f"kept what it replaces in {store_originals(args.adapter, base, check_base=check_base, plan=plan)}")
    # a tokenizer that was saved with the adapter may have been given new tokens
    processor = load_processor(args.adapter)
    if isinstance(plan, MergePlan) and not loads:
        result = merge_files(args.adapter, base, args.out, processor=processor, check_base=check_base, plan=plan)
        print(f"merged {len(result.changes)} modules, one weight at a time, into {result.path}")
        processor = processor or load_processor(base)
    else:
        processor = processor or load_processor(base)
        result = _merge_in_memory(args, adapter, base, processor)
    _print_changes(result)
    if processor is None:
        print("no tokenizer was found beside the adapter or the base, so none was saved")
    return 0


def _merge_in_memory(args: argparse.Namespace, adapter: AdapterFile, base: str, processor: Any | None) -> MergeResult:
    from turnrow.adapters import load_base, merge_adapter
    from turnrow.pretrained import without_load_report

    # a classifier that the base lacks is the adapter's to bring
    with without_load_report():
        model = load_base(adapter, base)
    if args.dequantize:
        from turnrow.tuners import dequantize

        dequantize(model)
    result = merge_adapter(model, args.adapter, args.out, processor=processor, check_base=not args.no_check_base)
    print(f"merged {len(result.changes)} modules of {type(model).__name__} ({model.dtype}) into {result.path}")
    return result


def _print_changes(result: MergeResult) -> None:
    print(f"norm of the change {result.change_norm:.6g}, {result.relative_change:.3%} of the changed weights")
    for name in sorted(result.changes, key=lambda name: result.changes[name][0], reverse=True)[:3]:
        change, before = result.changes[name]
        print(f"  {name}: {change:.6g} of {before:.6g}")
    if result.costs:
        worst = sorted(result.costs, key=lambda name: result.costs[name].relative, reverse=True)[:3]
        print(f"rounded {len(result.costs)} quantized weights anew: {result.cost}; --dequantize loses nothing")
        for name in worst:
            print(f"  {name}: {result.costs[name]}")
    if result.unread:
        print(f"how much {len(result.unread)} quantized weights changed is not known: their method does not read them")
    if result.replaced:
        print(f"taken whole from the adapter: {', '.join(result.replaced)}")
