"""turnrow merge: put an adapter into its base for good."""

from __future__ import annotations

import argparse

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


def run(args: argparse.Namespace) -> int:
    """Merge, save model and tokenizer, and print how much changed."""
    from turnrow.adapters import load_base, load_processor, merge_adapter, read_adapter
    from turnrow.adapters.writing import check_new_folder
    from turnrow.errors import UserError
    from turnrow.training.base import resolve_model
    from turnrow.training.quiet import without_load_report

    # what can be refused is refused before a large model is loaded
    check_new_folder(args.out)
    adapter = read_adapter(args.adapter)
    base = args.base or adapter.base_name
    if not base:
        raise UserError(f"{args.adapter} does not name its base model: give --base MODEL")
    base = resolve_model(base)
    # a classifier that the base lacks is the adapter's to bring
    with without_load_report():
        model = load_base(adapter, base)
    if args.dequantize:
        from turnrow.tuners import dequantize

        dequantize(model)
    # a tokenizer that was saved with the adapter may have been given new tokens
    processor = load_processor(args.adapter) or load_processor(base)
    result = merge_adapter(model, args.adapter, args.out, processor=processor, check_base=not args.no_check_base)

    largest = sorted(result.changes, key=lambda name: result.changes[name][0], reverse=True)[:3]
    print(f"merged {len(result.changes)} modules of {type(model).__name__} ({model.dtype}) into {result.path}")
    print(f"norm of the change {result.change_norm:.6g}, {result.relative_change:.3%} of the changed weights")
    for name in largest:
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
    if processor is None:
        print("no tokenizer was found beside the adapter or the base, so none was saved")
    return 0
