"""The adapter layer of RoCoFT for linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from turnrow.tuners._dense import features, is_sharded, may_change_in_place
from turnrow.tuners._mixed_batch import MixedBatch
from turnrow.tuners._quantized import Requantizer, refuse_cut_gradient, values_of
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.layer import RocoftLayer
from turnrow.tuners.rocoft.mixed import StackedParts, stack_bias, stack_parts
from turnrow.tuners.rocoft.parts import PARTS, choose_indices, shape_of_part
from turnrow.tuners.rocoft.tensors import Active

__all__ = ["RocoftLinear"]


class RocoftLinear(RocoftLayer):
    """A linear layer (torch.nn.Linear, GPT-2's Conv1D, or a quantized one) of which rows, columns or entries are trained."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RocoftConfig,
        name: str,
        requantize: Requantizer | None = None,
    ) -> None:
        super().__init__(base_layer, adapter_name, requantize)
        self.out_features, self.in_features = features(self._base)
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: RocoftConfig, name: str) -> None:
        """Add an adapter: delta = 0 for what the config chooses in the module called `name`."""
        chosen = choose_indices(config, name, self.out_features, self.in_features)
        for part, index in chosen.items():
            shape = shape_of_part(part, chosen, self.out_features, self.in_features)
            self._add_part(adapter_name, config, part, shape, index)
        self._await_selection(adapter_name, config, name)
        if config.bias != "none":
            self._add_bias(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_settled(self, adapter_name: str, part: str, index: Tensor, delta: Tensor) -> None:
        """Hold a difference without training it, in the place of what was settled before.

        Args:
            adapter_name: of an adapter that this layer has.
            part: "row" or "column".
            index: (m,) int64, none of them trained; m = 0 settles nothing.
            delta: (m, in) for rows, (out, m) for columns.
        """
        self._adapters_change()
        for name, value in ((f"rocoft_{part}_settled", delta), (f"rocoft_{part}_settled_index", index)):
            buffers = getattr(self, name)
            if len(index):
                buffers[adapter_name] = value
            elif adapter_name in buffers:
                del buffers[adapter_name]
        _ = self.active

    def unite_settled(self, adapter_name: str, part: str) -> list[int]:
        """Make one parameter of what is trained and what is settled, in ascending order; return its rows or columns."""
        axis = 0 if part == "row" else 1
        pieces = self.parts(adapter_name)
        index, order = torch.cat([piece.index for piece in pieces]).sort()
        delta = torch.cat([piece.parameter.detach() for piece in pieces], dim=axis).index_select(axis, order)
        trained = pieces[0].parameter.requires_grad
        self.set_settled(adapter_name, part, index[:0], delta.narrow(axis, 0, 0))
        self._adapters_change()
        getattr(self, f"rocoft_{part}")[adapter_name] = nn.Parameter(delta, requires_grad=trained)
        getattr(self, f"rocoft_{part}_index")[adapter_name] = index
        _ = self.active
        return index.tolist()

    def dense_values(self) -> Tensor:
        """The base weight as (out, in), without any adapter that is not merged; of a quantized one a copy in float32."""
        self.restore_base()
        return self._values() if self.quantization_backend is None else values_of(self)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for adapter_name in self._available_adapters:
            self.make_room_for_settled(adapter_name, state_dict, prefix, f".{adapter_name}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def make_room_for_settled(
        self, adapter_name: str, state_dict: Mapping[str, Any], prefix: str, suffix: str = ""
    ) -> None:
        """Settle as much as an adapter that is about to be loaded has settled, so that its tensors find their place.

        Args:
            adapter_name: which adapter will be loaded.
            state_dict: what will be loaded; says nothing of other adapters.
            prefix: of this layer's keys.
            suffix: of the adapter's keys: none in a file, its name in the state dict of a model.
        """
        for part in ("row", "column"):
            if f"{prefix}rocoft_{part}_index{suffix}" not in state_dict:
                continue
            parameter = getattr(self, f"rocoft_{part}")[adapter_name]
            count = len(state_dict.get(f"{prefix}rocoft_{part}_settled_index{suffix}", ()))
            delta = parameter.new_zeros(PARTS[part].shape(self.out_features, self.in_features, count))
            index = torch.zeros(count, dtype=torch.int64, device=parameter.device)
            self.set_settled(adapter_name, part, index, delta)

    # --- forward ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer with the active adapters; which way it goes is decided anew at every call."""
        batch = self._slot.batch
        if batch is not None and not self._disable_adapters:
            return self._mixed_forward(batch, x, args, kwargs)
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return self._held_for_backward(self.base_layer(x, *args, **kwargs), x)
        active = self.active
        if self._unselected:
            self._refuse_unselected(self.active_adapters, active.parts)
        if active.adapters == 1 and self._may_go_live():
            return self._live_forward(active, x, args, kwargs)
        self.restore_base()
        y = self._held_for_backward(self._call_base(active.biases, (x, *args), kwargs), x)
        if self.quantization_backend is not None:
            refuse_cut_gradient(y, x, self.quantization_backend)
        for part in active.parts:
            y = part.ops.overlay(y, x, part.delta(), part.index)
        return y

    def _live_forward(self, active: Active, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        self._go_live(active)
        y = self._call_base(active.biases, (x, *args), kwargs)
        trained = [part for part in active.parts if part.parameter.requires_grad] if torch.is_grad_enabled() else []
        if not trained:
            return self._held_for_backward(y, x)
        before_backward = partial(self._hold, active)
        for part in trained:
            y = part.ops.attach_gradient(y, x, part.delta(), part.index, before_backward)
        return y

    def _mixed_forward(self, batch: MixedBatch, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        self.restore_base()
        y = self._held_for_backward(self.base_layer(x, *args, **kwargs), x)
        stacked = batch.stacked(self, y.dtype)
        if stacked is None:
            batch.copies_in(y)  # as many names as samples, here as elsewhere
            return y
        changed = stacked.add(batch.by_sample(y), batch.by_sample(x))
        return changed if changed.shape == y.shape else changed.reshape(y.shape)

    def stack_adapters(self, names: Sequence[str], dtype: torch.dtype) -> StackedParts | None:
        """The parts and biases of each sample's adapter."""
        parts = {name: self.parts(name) for name in set(names)}
        for name in self._unselected & parts.keys():
            self._refuse_unselected([name], parts[name])
        biases: Any = self.rocoft_bias
        bias = stack_bias(biases, names, dtype)
        return stack_parts([parts[name] for name in names], bias, self.out_features, self.in_features, dtype)

    def _may_go_live(self) -> bool:
        weight: Any = self.base_layer._parameters.get("weight")
        return (
            weight is not None  # no other adapter layer in between
            and not self.weight_is_shared
            and not is_sharded(self.base_layer)
            and may_change_in_place(weight, dimensions=2)
        )
