"""Modules that an adapter has whole (`modules_to_save`), in a batch of several adapters.

peft can do this for a few kinds of modules, and only while an adapter is active that has the module too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from turnrow.errors import UserError

__all__ = ["own_modules"]


class Batch(Protocol):
    """What is needed of a `MixedBatch`."""

    names: tuple[str, ...]

    def copies_in(self, x: Tensor) -> int:
        """How many rows of x belong to one sample."""


@contextmanager
def own_modules(wrappers: Sequence[ModulesToSaveWrapper], batch: Batch) -> Iterator[None]:
    """Inside, every sample goes through the copy of a module that its adapter has, or through the base's."""
    outer = [wrapper.__dict__.get("forward") for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.__dict__["forward"] = partial(_forward, wrapper, batch)
        yield
    finally:
        for wrapper, forward in zip(wrappers, outer, strict=True):
            if forward is None:
                wrapper.__dict__.pop("forward", None)
            else:
                wrapper.__dict__["forward"] = forward


def _forward(wrapper: ModulesToSaveWrapper, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
    """Once for each different module: these may be anything, so they cannot be stacked."""
    if wrapper.disable_adapters:
        return wrapper.original_module(*args, **kwargs)
    copies = batch.copies_in(args[0]) if args else 0
    rows: dict[nn.Module, list[int]] = {}
    for sample, name in enumerate(batch.names):
        own = name in wrapper.modules_to_save
        module = wrapper.modules_to_save[name] if own else wrapper.original_module
        rows.setdefault(module, []).extend(range(sample * copies, (sample + 1) * copies))
    if len(rows) == 1:
        return next(iter(rows))(*args, **kwargs)
    if len(args) != 1 or any(isinstance(value, Tensor) for value in kwargs.values()):
        raise UserError(
            f"adapter_names cannot be used with a {type(wrapper.original_module).__name__} in modules_to_save: it takes more than "
            "one tensor, which cannot be divided by sample"
        )
    x = args[0]
    index = [torch.tensor(positions, device=x.device) for positions in rows.values()]
    outputs = [module(x.index_select(0, positions), **kwargs) for module, positions in zip(rows, index, strict=True)]
    return torch.cat(outputs).index_select(0, torch.cat(index).argsort())
