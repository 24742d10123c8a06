"""turnrow export-lora: a RoCoFT adapter in the format that every LoRA server reads."""

from __future__ import annotations

import argparse

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "export-lora"
HELP = "Write a RoCoFT adapter as a LoRA adapter, exactly."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--adapter", metavar="DIR", required=True, help="the adapter's folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder for the LoRA adapter")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="folder or Hub id of the base; only names and sizes are read, and only for fused experts or if there is no turnrow.json",
    )


def run(args: argparse.Namespace) -> int:
    """Export and print the rank, which the server's largest allowed rank must reach."""
    from turnrow.adapters import export_lora, read_adapter, skeleton
    from turnrow.training.base import resolve_model

    adapter = read_adapter(args.adapter)
    needs_base = not adapter.base_prints or adapter.fused_weights
    base = None if args.base is None or not needs_base else skeleton(adapter, resolve_model(args.base))
    out = export_lora(args.adapter, args.out, base=base)
    written = read_adapter(out)
    print(f"wrote {out}: LoRA of rank {written.config['r']} for {len(written.modules)} modules, scaling 1")
    return 0
