"""The precision of a run's forward passes."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from transformers import TrainingArguments

__all__ = ["precision", "precision_name"]


def precision_name(args: TrainingArguments) -> str:
    """``float32``, which is no autocast, or what autocast computes in."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def precision(args: TrainingArguments) -> AbstractContextManager:
    """The context in which Trainer runs a forward."""
    if precision_name(args) == "float32":
        return contextlib.nullcontext()
    return torch.autocast(args.device.type, dtype=getattr(torch, precision_name(args)))
