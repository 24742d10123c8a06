"""turnrow export-lora: a RoCoFT adapter in the format that every LoRA server reads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from turnrow.cli._base import base_of

if TYPE_CHECKING:
    from turnrow.adapters import AdapterFile

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "export-lora"
HELP = "Write a RoCoFT adapter as a LoRA adapter, exactly; or the LoRA nearest to a RoAd adapter."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--adapter", metavar="DIR", required=True, help="the adapter's folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder for the LoRA adapter")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="folder or Hub id of the base; of RoCoFT only names and sizes are read, and only for fused experts or if there is no "
        "turnrow.json; RoAd needs its weights (default: the one named in the adapter)",
    )
    parser.add_argument("--rank", type=int, help="of the LoRA, for a RoAd adapter, which none holds exactly")
    parser.add_argument(
        "--no-check-base", action="store_true", help="RoAd: export even if the base is not the one it was trained on"
    )


def run(args: argparse.Namespace) -> int:
    """Export and print the rank, which the server's largest allowed rank must reach, and the rules that the result breaks."""
    from turnrow.adapters import export_lora, read_adapter, skeleton
    from turnrow.pretrained import resolve_model

    adapter = read_adapter(args.adapter)
    if args.rank is not None:
        return _export_road(args, adapter)
    needs_base = not adapter.base_prints or adapter.fused_weights
    base = None if args.base is None or not needs_base else skeleton(adapter, resolve_model(args.base))
    out = export_lora(args.adapter, args.out, base=base)
    written = read_adapter(out)
    print(f"wrote {out}: LoRA of rank {written.config['r']} for {len(written.modules)} modules, scaling 1")
    _print_rules(written)
    return 0


def _export_road(args: argparse.Namespace, adapter: AdapterFile) -> int:
    from turnrow.adapters import export_road_lora, load_base, read_adapter
    from turnrow.errors import UserError
    from turnrow.pretrained import without_load_report

    if adapter.method != "ROAD":
        raise UserError(
            f"--rank is {args.rank}, but {args.adapter} is a {adapter.method} adapter: only RoAd has to be approximated"
        )
    with without_load_report():
        base = load_base(adapter, base_of(adapter, args.base))
    export = export_road_lora(args.adapter, args.out, base=base, rank=args.rank, check=not args.no_check_base)
    print(f"wrote {export.path}: LoRA of rank {export.rank} for {len(export.errors)} modules, scaling 1")
    print(f"it leaves out {export.relative_error:.1%} of the change (by Frobenius norm); most in")
    for name in sorted(export.errors, key=lambda name: export.errors[name][0], reverse=True)[:3]:
        rest, change = export.errors[name]
        print(f"  {name}: {rest:.4g} of {change:.4g}")
    if export.biases:
        print(
            f"and the turns of {len(export.biases)} biases, which no LoRA holds (norms up to {max(export.biases.values()):.4g})"
        )
    _print_rules(read_adapter(export.path))
    return 0


def _print_rules(written: AdapterFile) -> None:
    """Whether a server that keeps to vLLM's rules takes it; peft does in any case."""
    from turnrow.adapters import broken_rules, max_lora_rank

    broken = broken_rules(written)
    for rule in broken:
        print(f"vLLM refuses it: {rule}")
    if not broken:
        print(f"vLLM takes it with max_lora_rank {max_lora_rank(written.config['r'])} or more")
