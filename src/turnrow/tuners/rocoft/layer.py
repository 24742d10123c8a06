"""What all adapter layers of RoCoFT share, towards peft and torch: whatever needs W0 finds it.

Two ways to compute the same thing:

*live* - the weight of the base layer itself holds W0 + delta, and the original rows, columns or entries are kept aside. A
forward is the plain base layer. Taken whenever one adapter is active on a dense weight that belongs to this layer alone.

*overlay* - the weight stays W0 and the change is added to the output. Taken for several active adapters, weights that are
quantized, sharded, tied or elsewhere (meta device), under `torch.compile` and under `torch.func`.

The layer is built up in steps: the adapters' tensors (`tensors`), the live weight (`live`), merging (`merging`), and here the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.func import functional_call

from turnrow.errors import UserError
from turnrow.selection import needs_data
from turnrow.tuners._dense import is_rehearsal
from turnrow.tuners._quantized import Original, Requantizer
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.merging import MergingLayer
from turnrow.tuners.rocoft.parts import PARTS, Part, is_given

__all__ = ["RocoftLayer"]


class RocoftLayer(MergingLayer):
    """An adapter layer of RoCoFT around a base layer with a weight, a bias, or both."""

    def __init__(self, base_layer: Any, adapter_name: str, requantize: Requantizer | None = None) -> None:
        super().__init__(base_layer, adapter_name, requantize)
        self._unselected: set[str] = set()
        """Adapters whose rows, columns or entries are still to be chosen by data."""
        self.register_load_state_dict_post_hook(_look_up_after_loading)

    # --- what is chosen by data --------------------------------------------------------------------------------------

    def set_index(self, adapter_name: str, part: str, index: Tensor) -> None:
        """As in `AdapterTensors`; the adapter may be trained from now on."""
        super().set_index(adapter_name, part, index)
        self._unselected.discard(adapter_name)

    def _await_selection(self, adapter_name: str, config: RocoftConfig, name: str) -> None:
        """Remember that the adapter may not be trained yet, if what it trains in the module called `name` is chosen by data."""
        if needs_data(config.selection) and not is_given(config, name):
            self._unselected.add(adapter_name)

    def _refuse_unselected(self, adapters: Iterable[str], parts: Iterable[Part]) -> None:
        unselected = set() if is_rehearsal() else self._unselected.intersection(adapters)
        if unselected and torch.is_grad_enabled() and any(part.parameter.requires_grad for part in parts):
            raise UserError(
                f"adapter {min(unselected)!r} selects what it trains by data, and has seen none: call "
                "turnrow.select(model, batches) before training, or name the indices in its config"
            )

    # --- whatever needs W0 restores it first -----------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        """As in peft; disabling restores the base at once, not at the next forward."""
        if not enabled:
            self.restore_base()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in peft; the base is restored at once."""
        self._adapters_change()
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        _ = self.active

    def delete_adapter(self, adapter_name: str) -> None:
        """As in peft; the base is restored at once."""
        self._adapters_change()
        super().delete_adapter(adapter_name)
        self._unselected.discard(adapter_name)
        self._active = None
        _ = self.active

    @contextmanager
    def replacing(self, adapter_name: str) -> Iterator[None]:
        """As in every layer; what comes from a file was chosen.

        A backward pass whose forward was before is refused by autograd: it would find another weight.
        """
        self._adapters_change()  # the base is restored by the old indices
        weight = getattr(self._base, "weight", None)
        if isinstance(weight, Tensor):
            increment_version(weight)
        try:
            yield
            self._unselected.discard(adapter_name)
        finally:
            _ = self.active

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RocoftLayer:
        self._adapters_change()
        result = super()._apply(fn, recurse)
        for kept in self._merged:
            if isinstance(kept.values, Original):
                kept.values.apply(fn)
                continue
            kept.values = fn(kept.values)
            kept.index = None if kept.index is None else fn(kept.index)
        _ = self.active
        return result

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """W0 and delta, never W0 + delta and delta."""
        self.restore_base()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._adapters_change()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # A saved adapter brings its indices along.
        self._unselected = {
            name
            for name in self._unselected
            if not any(f"{prefix}rocoft_{part}_index.{name}" in state_dict for part in PARTS)
        }

    # --- forward ---------------------------------------------------------------------------------------------------

    def _call_base(self, biases: tuple[Part, ...], args: tuple, kwargs: dict) -> Any:
        """The base layer, its bias changed by `biases`."""
        if not biases:
            return self.base_layer(*args, **kwargs)
        if self.quantization_backend is not None:
            # bitsandbytes casts the bias that it is given in place, and HQQ's bias is no parameter.
            y = self.base_layer(*args, **kwargs)
            for part in biases:
                y = y + part.parameter.to(y.dtype)
            return y
        base = self._base
        bias = base.bias
        if hasattr(bias, "ds_id"):
            raise UserError(
                "DeepSpeed's ZeRO-3 does not let biases be trained beside frozen ones; use bias='none', or FSDP"
            )
        for part in biases:
            bias = bias + part.parameter
        # under the layers of other adapters, where there are any
        name = next(name for name, module in self.base_layer.named_modules() if module is base)
        name = f"{name}.bias" if name else "bias"
        return functional_call(self.base_layer, {name: bias.to(base.bias.dtype)}, args, kwargs)

    def __repr__(self) -> str:
        return "rocoft." + super().__repr__()


def _look_up_after_loading(layer: RocoftLayer, incompatible_keys: Any) -> None:
    _ = layer.active
