"""The layers of a model that adapters can be put on while many requests are served at once.

All tokens of a step lie in one packed row. An adapter can only be applied where a layer's input still is that row, token by
token: in the linear layers of attention and MLP, and in the head, but not in an expert (which gets the tokens of all requests
mixed) or in an image encoder. Which layers those are is seen in one forward pass of a few tokens, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from turnrow.adapters.fingerprint import weight_shape
from turnrow.errors import UserError

__all__ = ["ServedLayer", "served_layers"]

_TOKENS = 3
"""In the forward pass that looks; no size of a layer is as small."""


@dataclass(frozen=True, eq=False)
class ServedLayer:
    """A linear layer whose input is the packed row."""

    module: Any
    out_features: int
    in_features: int
    is_head: bool
    """It gives the logits, and sees only the tokens in `logits_to_keep`."""


def served_layers(model: nn.Module) -> Mapping[str, ServedLayer]:
    """The layers of `model` that adapters can be served on, by name. Runs one short forward pass.

    Raises:
        UserError: the model has adapters of its own, or is no language model.
    """
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        raise UserError(
            f"the model to be served has an adapter at {adapted!r}: give the plain base model, and register adapters by their folders"
        )
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    if embeddings is None:
        raise UserError(
            f"{type(model).__name__} has no output embeddings, so it writes no texts: give a causal language model"
        )
    seen: set[nn.Module] = set()

    def look(module: nn.Module, args: tuple, output: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and tuple(args[0].shape[:-1]) == (1, _TOKENS):
            seen.add(module)

    linear = dict(_linear(model))
    handles = [module.register_forward_hook(look) for module in linear.values()]
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, module in linear.items():
        shape = weight_shape(module)
        if module in seen and shape is not None and len(shape) == 2:
            found[name] = ServedLayer(module, shape[0], shape[1], is_head=module is embeddings)
    return found


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module
