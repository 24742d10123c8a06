"""The hidden states of a base model and of its adapted self for the same batch, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turnrow.errors import UserError

__all__ = ["StatePair", "evaluating", "paired_states"]

_OUTPUTS = {
    "hidden_states": ("", "attention_mask", "input_ids"),
    "encoder_hidden_states": ("encoder ", "attention_mask", "input_ids"),
    "decoder_hidden_states": ("decoder ", "decoder_attention_mask", "decoder_input_ids"),
}
"""What a model calls its states: how their layers are named, and the inputs that say what is padding and which tokens they are."""


@dataclass(frozen=True, eq=False)
class StatePair:
    """The states of one layer."""

    layer: str
    """``"embeddings"``, ``"layer 1"``, ...; of an encoder-decoder ``"encoder layer 1"``, ``"decoder layer 1"``, ..."""
    adapted: Tensor
    """x, (B, T, d)."""
    base: Tensor
    """x0, (B, T, d)."""
    mask_name: str
    """The input that says which tokens are padding."""
    ids_name: str
    """The input that holds the tokens."""


@torch.no_grad()
def paired_states(adapted: nn.Module, base: nn.Module | None, batch: Mapping[str, Tensor]) -> Iterator[StatePair]:
    """The states of both models for a batch, of the embeddings and of every layer.

    The last layer's are what the model hands to its head: a final norm is part of them.

    Args:
        adapted: a model of transformers, or a peft model around one.
        base: the model before. None, for a peft model: itself without its adapter.
        batch: inputs, moved to the device of each model.

    Raises:
        UserError: there is no base to compare with; a model returns no hidden states; the two differ in layers or sizes.
    """
    after = _states(adapted, batch)
    if base is None:
        with _without_adapter(adapted):
            before = _states(adapted, batch)
    else:
        before = _states(base, batch)
    if after.keys() != before.keys() or any(len(after[name]) != len(before[name]) for name in after):
        counts = [", ".join(f"{len(states)} {name}" for name, states in own.items()) for own in (after, before)]
        raise UserError(f"the adapted model has {counts[0]}, the base {counts[1]}: give the model that it was made of")
    for name, states in after.items():
        prefix, mask_name, ids_name = _OUTPUTS[name]
        for number, (x, x0) in enumerate(zip(states, before[name], strict=True)):
            layer = f"{prefix}{'embeddings' if number == 0 else f'layer {number}'}"
            if x.shape != x0.shape or x.ndim != 3:
                raise UserError(
                    f"the states of {layer} are {list(x.shape)} in the adapted model and {list(x0.shape)} in the base; "
                    "both must be (texts, tokens, features)"
                )
            yield StatePair(layer, x, x0.to(x.device), mask_name, ids_name)


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """The models without dropout; each of their modules is afterwards as it was."""
    held = [(module, module.training) for model in models if model is not None for module in model.modules()]
    for model in models:
        if model is not None:
            model.eval()
    try:
        yield
    finally:
        for module, training in held:
            module.training = training


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    disable: Any = getattr(model, "disable_adapter", None)
    if disable is None:
        raise UserError(
            f"a {type(model).__name__} has no adapter that could be switched off: give the base model that it is compared with"
        )
    with disable():
        yield


def _states(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    inputs = {name: value.to(device) for name, value in batch.items()}
    output = model(**inputs, output_hidden_states=True)
    found: dict[str, Any] = {
        name: output.get(name)
        for name, (_, _, ids_name) in _OUTPUTS.items()
        # A decoder that shifts the labels by itself does not say which tokens its states are of.
        if output.get(name) is not None and (name != "decoder_hidden_states" or ids_name in batch)
    }
    if not found:
        raise UserError(f"a {type(model).__name__} returns no hidden states, which displacement is measured of")
    return found
