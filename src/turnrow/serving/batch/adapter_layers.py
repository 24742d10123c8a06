"""Adapters on the layers of a model, many at once: forward hooks that apply to every token what its own adapter brings.

The base weights are never touched and no layer is replaced. A layer that no adapter in the slots adapts has no hook to run, and
in a step without adapters a hook returns at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from turnrow.serving.batch.packing import PackedStep
from turnrow.serving.batch.patches import Patch, patch_for
from turnrow.serving.layers import ServedLayer
from turnrow.serving.store.parts import Parts

__all__ = ["AdapterLayers"]


class AdapterLayers:
    """The patches of all layers. Belongs to the thread that runs the model."""

    def __init__(self, layers: Mapping[str, ServedLayer], device: torch.device) -> None:
        self._layers, self.device = layers, device
        self._patches: dict[str, dict[str, Patch]] = {}
        self._in_slot: dict[int, list[Patch]] = {}
        self._handles: list[RemovableHandle] = []
        self.step: PackedStep | None = None
        """What the hooks work with; None applies nothing."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tables on the device."""
        every = (patch for of_layer in self._patches.values() for patch in of_layer.values())
        return sum(table.nbytes for patch in every for table in patch.tables)

    @torch.no_grad()
    def put(self, slot: int, parts: Parts) -> None:
        """Put an adapter into a slot, in the place of what was there."""
        self.drop(slot)
        for name, own in parts.items():
            for part in own:
                patch = self._patch(name, part.kind)
                patch.put(slot, part)
                self._in_slot.setdefault(slot, []).append(patch)

    def drop(self, slot: int) -> None:
        """Empty a slot."""
        for patch in self._in_slot.pop(slot, ()):
            patch.drop(slot)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._patches.clear()
        self._in_slot.clear()

    def _patch(self, name: str, kind: str) -> Patch:
        of_layer = self._patches.get(name)
        layer = self._layers[name]
        if of_layer is None:
            of_layer = self._patches[name] = {}
            self._handles.append(layer.module.register_forward_hook(self._hook(name, layer, of_layer)))
        if kind not in of_layer:
            of_layer[kind] = patch_for(kind, self.device, layer.out_features, layer.in_features)
        return of_layer[kind]

    def _hook(self, name: str, layer: ServedLayer, patches: Mapping[str, Patch]) -> Any:
        def apply(module: object, args: tuple[Tensor, ...], output: Tensor) -> None:
            step = self.step
            if step is None or not step.has_adapters:
                return
            groupings = step.head if layer.is_head else step.row
            y = output.view(-1, layer.out_features)
            if len(y) != groupings.tokens:
                raise RuntimeError(f"layer {name!r} was given {len(y)} tokens in a step of {groupings.tokens}")
            x = None
            for patch in patches.values():
                grouping = groupings.of(patch.slots)
                if grouping is not None:
                    if x is None:
                        x = args[0].reshape(-1, layer.in_features)
                    patch.apply_(y, x, grouping)

        return apply
