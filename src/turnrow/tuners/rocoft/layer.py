"""What all adapter layers of RoCoFT share: the adapter's tensors, and keeping the base bit-identical.

Two ways to compute the same thing:

*live* - the weight of the base layer itself holds W0 + delta, and the original rows, columns or entries are kept aside. A
forward is the plain base layer. Taken whenever one adapter is active on a dense weight that belongs to this layer alone.

*overlay* - the weight stays W0 and the change is added to the output. Taken for several active adapters, weights that are
quantized, sharded, tied or elsewhere (meta device), under `torch.compile` and under `torch.func`.

The weight goes live with the first forward and stays so until anything needs W0: disabling, switching, merging, deleting,
unloading, saving or loading a state dict, moving or casting the model. Then the kept values are put back, which restores
W0 bit for bit. They are on record before the weight is written, so an exception cannot lose them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from turnrow.ops.delta import adapted
from turnrow.tuners._dense import dense_weight
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.parts import EXPERT_PARTS, PARTS, Part

__all__ = ["Active", "RocoftLayer", "trainable_dtype"]

_NOISE = 0.1
"""Standard deviation of the random differences that `init_weights=False` starts from."""


@dataclass(frozen=True)
class Active:
    """The active adapters as a layer has them, resolved once: looking them up at every forward costs more than a small layer."""

    names: tuple[str, ...]
    parts: tuple[Part, ...]
    """Of all active adapters, in their order."""
    with_bias: tuple[str, ...]


@dataclass
class _Kept:
    """Original values taken out of a weight or bias, so that they can be put back."""

    part: str
    """"row", "column", "entry" or "bias"."""
    index: Tensor | None
    values: Tensor


@dataclass
class _Live:
    """What a live weight holds beside W0."""

    active: Active
    kept: list[_Kept]
    index_stamps: list[tuple[int, int]]
    """State of the index tensors when the originals were taken out."""
    written: list[tuple[int, int]] = field(default_factory=list)
    """State of the parameters and of the weight when the weight was last written."""


class RocoftLayer(BaseTunerLayer, nn.Module):
    """An adapter layer of RoCoFT around a base layer with a weight, a bias, or both."""

    adapter_layer_names: tuple[str, ...] = ("rocoft_row", "rocoft_column", "rocoft_entry", "rocoft_bias")
    other_param_names: tuple[str, ...] = ("rocoft_row_index", "rocoft_column_index", "rocoft_entry_index")
    of_experts: bool = False
    """Whether the weight is a fused one, (E, out, in)."""

    def __init__(self, base_layer: Any, adapter_name: str) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.rocoft_row = nn.ParameterDict()
        self.rocoft_column = nn.ParameterDict()
        self.rocoft_entry = nn.ParameterDict()
        self.rocoft_bias = nn.ParameterDict()
        self.rocoft_row_index = BufferDict(persistent=True)
        self.rocoft_column_index = BufferDict(persistent=True)
        self.rocoft_entry_index = BufferDict(persistent=True)
        self.out_features = self.in_features = 0
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.weight_is_shared = False
        """Set by the model where another module uses the same weight: then it must not change in place."""
        self._active: Active | None = None
        self._live: _Live | None = None
        self._merged: list[_Kept] = []

    # --- the adapter's tensors -------------------------------------------------------------------------------------

    def _add_part(
        self, adapter_name: str, config: RocoftConfig, part: str, shape: tuple[int, ...], index: Tensor
    ) -> None:
        """Give an adapter a difference of zero to what `index` chooses of the weight."""
        weight = self._base.weight
        delta = torch.zeros(shape, dtype=trainable_dtype(weight), device=weight.device)
        if not config.init_weights:
            nn.init.normal_(delta, std=_NOISE)
        getattr(self, f"rocoft_{part}")[adapter_name] = nn.Parameter(delta)
        getattr(self, f"rocoft_{part}_index")[adapter_name] = index.to(weight.device)

    def set_index(self, adapter_name: str, part: str, index: Tensor) -> None:
        """Choose other rows, columns or entries for an adapter whose difference is still zero.

        Args:
            adapter_name: of an adapter that this layer has.
            part: "row", "column" or "entry".
            index: as many as before, int64, for each expert where the weight has several; entries ascending.
        """
        self._adapters_change()
        getattr(self, f"rocoft_{part}_index")[adapter_name].copy_(index)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in peft, but it casts to the dtype of the base as well, in peft 0.20 even the indices."""
        device = device or next(self._base.parameters()).device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            tensors = getattr(self, name)
            if adapter_name in tensors and not tensors[adapter_name].is_meta:
                tensors[adapter_name] = tensors[adapter_name].to(device)

    def _add_bias(self, adapter_name: str) -> None:
        bias = getattr(self._base, "bias", None)
        if bias is not None:
            self.rocoft_bias[adapter_name] = nn.Parameter(torch.zeros_like(bias, dtype=trainable_dtype(bias)))

    @property
    def _available_adapters(self) -> set[str]:
        return self._get_available_adapters()

    def parts(self, adapter_name: str) -> list[Part]:
        """The parts of the weight that an adapter trains here."""
        found = []
        for name in PARTS:
            if adapter_name not in getattr(self, f"rocoft_{name}"):
                continue
            parameter = getattr(self, f"rocoft_{name}")[adapter_name]
            index = getattr(self, f"rocoft_{name}_index")[adapter_name]
            rest = None
            if name == "column" and adapter_name in self.rocoft_row:
                with torch.inference_mode(False):  # looked up once, in whatever mode: training needs it too
                    rest = self._equations["column"].others(self.rocoft_row_index[adapter_name], self.out_features)
            holder = getattr(self, f"rocoft_{name}")
            found.append(Part(name, parameter, index, rest, self.out_features, holder, adapter_name, self.of_experts))
        # The crossing of rows and columns belongs to the rows, so they are written last.
        return sorted(found, key=lambda part: part.name == "row")

    @property
    def _equations(self) -> Mapping[str, ModuleType]:
        return EXPERT_PARTS if self.of_experts else PARTS

    @property
    def active(self) -> Active:
        """The active adapters, looked up anew after any change."""
        active = self._active
        if active is None or not (torch.compiler.is_compiling() or all(part.is_current() for part in active.parts)):
            available = self._available_adapters
            names = tuple(name for name in self.active_adapters if name in available)
            parts = tuple(part for name in names for part in self.parts(name))
            active = self._active = Active(names, parts, tuple(name for name in names if name in self.rocoft_bias))
        return active

    @property
    def _base(self) -> Any:
        """The module with the weight and bias, under whatever layers of other adapters."""
        return self.get_base_layer()

    def _values(self) -> Tensor:
        """The weight as (out, in), to read and to write."""
        return dense_weight(self._base, values=True)

    # --- live ------------------------------------------------------------------------------------------------------

    def _go_live(self, active: Active) -> None:
        """Make the weight hold W0 + delta of the active adapter."""
        live: _Live | None = self._live
        index_stamps = [_stamp(part.index) for part in active.parts]
        if live is None or live.active is not active or live.index_stamps != index_stamps:
            self.restore_base()
            values = self._values()
            originals = [
                _Kept(part.name, part.index.clone(), part.ops.keep(values, part.index)) for part in active.parts
            ]
            live = self._live = _Live(active, originals, index_stamps)
        written = [_stamp(part.parameter) for part in active.parts]
        written.append((self._base.weight.data_ptr(), 0))
        # While it is trained the weight is written at every forward: `parameter.data` can change unseen by its version.
        if live.written != written or any(part.parameter.requires_grad for part in active.parts):
            with torch.no_grad():
                for part, kept in zip(active.parts, live.kept, strict=True):
                    self._write(kept, adapted(kept.values, part.delta()))
            live.written = written

    def restore_base(self) -> None:
        """Put the original values back if the weight is live. Bit-exact; merged adapters stay merged."""
        live = self._live
        if live is not None:
            for kept in live.kept:
                self._write(kept, kept.values)
            self._live = None

    def _write(self, kept: _Kept, values: Tensor) -> None:
        with torch.no_grad():
            if kept.part == "bias":
                self._base.bias.data.copy_(values)
            else:
                self._equations[kept.part].put_(self._values(), kept.index, values)

    # --- whatever needs W0 restores it first -----------------------------------------------------------------------

    def _adapters_change(self) -> None:
        """Called before anything about the adapters or the weight changes."""
        self.restore_base()
        self._active = None

    def enable_adapters(self, enabled: bool) -> None:
        """As in peft; disabling restores the base at once, not at the next forward."""
        if not enabled:
            self.restore_base()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in peft; the base is restored at once."""
        self._adapters_change()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in peft; the base is restored at once."""
        self._adapters_change()
        super().delete_adapter(adapter_name)
        self._active = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RocoftLayer:
        self._adapters_change()
        result = super()._apply(fn, recurse)
        for kept in self._merged:
            kept.values = fn(kept.values)
            kept.index = None if kept.index is None else fn(kept.index)
        return result

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """W0 and delta, never W0 + delta and delta."""
        self.restore_base()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._adapters_change()
        super()._load_from_state_dict(*args, **kwargs)

    # --- merging ---------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave W0 + delta of the adapters in the weight (and bias), until `unmerge`.

        Args:
            safe_merge: refuse an adapter with NaN or infinite values, before anything is written.
            adapter_names: adapters to merge; None merges the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite; names the adapter.
        """
        self.restore_base()
        for name in check_adapters_to_merge(self, adapter_names):
            parts = self.parts(name)
            bias = [self.rocoft_bias[name]] if name in self.rocoft_bias else []
            trained = [part.parameter for part in parts] + bias
            if safe_merge and not all(torch.isfinite(parameter).all() for parameter in trained):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._merge_parts(parts)
            for change in bias:
                self._replace(_Kept("bias", None, self._base.bias.detach().clone()), change)
            if trained:
                self.merged_adapters.append(name)

    def _merge_parts(self, parts: list[Part]) -> None:
        # All originals are taken out before the first part is written: rows and columns cross.
        kept = [_Kept(part.name, part.index.clone(), part.ops.keep(self._values(), part.index)) for part in parts]
        for part, originals in zip(parts, kept, strict=True):
            self._replace(originals, part.delta())

    def _replace(self, kept: _Kept, change: Tensor) -> None:
        self._merged.append(kept)
        self._write(kept, adapted(kept.values, change.detach()))

    def unmerge(self) -> None:
        """Put back what merging replaced, last first: the base is bit-identical to what it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self._merged:
            kept = self._merged[-1]
            self._write(kept, kept.values)
            self._merged.pop()
        self.merged_adapters.clear()

    # --- forward ---------------------------------------------------------------------------------------------------

    def _call_base(self, with_bias: tuple[str, ...], args: tuple, kwargs: dict) -> Any:
        """The base layer, with the biases of the adapters named."""
        if not with_bias:
            return self.base_layer(*args, **kwargs)
        base = self._base
        bias = base.bias
        for name in with_bias:
            bias = bias + self.rocoft_bias[name]
        return functional_call(self.base_layer, {"bias": bias.to(base.bias.dtype)}, args, kwargs)

    def __repr__(self) -> str:
        return "rocoft." + super().__repr__()


def trainable_dtype(like: Tensor) -> torch.dtype:
    """At least float32: half-precision steps would be lost in the weight they are added to."""
    return torch.promote_types(like.dtype, torch.float32)


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies and how often it was written: changes whenever its values do, but for writes through `.data`."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
