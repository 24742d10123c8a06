"""What all adapter layers of RoCoFT share: the adapter's tensors, and keeping the base bit-identical.

Two ways to compute the same thing:

*live* - the weight of the base layer itself holds W0 + delta, and the original rows, columns or entries are kept aside. A
forward is the plain base layer. Taken whenever one adapter is active on a dense weight that belongs to this layer alone.

*overlay* - the weight stays W0 and the change is added to the output. Taken for several active adapters, weights that are
quantized, sharded, tied or elsewhere (meta device), under `torch.compile` and under `torch.func`.

The weight goes live with the first forward and stays so until anything needs W0: disabling, switching, merging, deleting,
unloading, saving or loading a state dict, moving or casting the model. Then the kept values are put back, which restores
W0 bit for bit. They are on record before the weight is written, so an exception cannot lose them.

A quantized weight never goes live. Merging quantizes W0 + delta anew, and `merge_cost` says what was lost by it; unmerging puts
back the quantized weight that was there.
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

from turnrow.errors import UserError
from turnrow.ops.delta import adapted
from turnrow.ops.rounding import MergeCost
from turnrow.tuners._dense import dense_weight, refuse_sharded
from turnrow.tuners._mixed_batch import MixedBatchLayer
from turnrow.tuners._quantized import (
    Original,
    Requantizer,
    quantization_backend,
    replace_weight,
    restore_weight,
    values_of,
)
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.parts import EXPERT_PARTS, PARTS, Part

__all__ = ["Active", "RocoftLayer", "trainable_dtype"]

_NOISE = 0.1
"""Standard deviation of the random differences that `init_weights=False` starts from."""


@dataclass(frozen=True)
class Active:
    """The active adapters as a layer has them, resolved once: looking them up at every forward costs more than a small layer."""

    adapters: int
    """How many are active here."""
    parts: tuple[Part, ...]
    """Of all of them, in their order."""
    biases: tuple[Part, ...]
    """Their differences to the bias."""

    def is_current(self) -> bool:
        """Whether the layer still holds these very parameters."""
        return all(part.is_current() for part in self.parts) and all(part.is_current() for part in self.biases)


@dataclass
class _Kept:
    """Original values taken out of a weight or bias, so that they can be put back."""

    part: str
    """"row", "column", "entry", "bias", or "weight" for a whole weight that is quantized."""
    index: Tensor | None
    values: Any


@dataclass
class _Live:
    """What a live weight holds beside W0."""

    active: Active
    kept: list[_Kept]
    index_stamps: list[tuple[int, int]]
    """State of the index tensors when the originals were taken out."""
    written: list[tuple[int, int]] = field(default_factory=list)
    """State of the parameters when the weight was last written."""
    pointer: int | None = None
    """Where the values of the weight lie; None before they were looked up."""
    values: Any = None
    """The weight as (out, in), to write to."""


class RocoftLayer(MixedBatchLayer, BaseTunerLayer, nn.Module):
    """An adapter layer of RoCoFT around a base layer with a weight, a bias, or both."""

    adapter_layer_names: tuple[str, ...] = ("rocoft_row", "rocoft_column", "rocoft_entry", "rocoft_bias")
    other_param_names: tuple[str, ...] = (
        "rocoft_row_index",
        "rocoft_column_index",
        "rocoft_entry_index",
        "rocoft_row_settled",
        "rocoft_row_settled_index",
        "rocoft_column_settled",
        "rocoft_column_settled_index",
    )
    of_experts: bool = False
    """Whether the weight is a fused one, (E, out, in)."""

    def __init__(self, base_layer: Any, adapter_name: str, requantize: Requantizer | None = None) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.quantization_backend = None if self.of_experts else quantization_backend(base_layer, requantize)
        self.rocoft_row = nn.ParameterDict()
        self.rocoft_column = nn.ParameterDict()
        self.rocoft_entry = nn.ParameterDict()
        self.rocoft_bias = nn.ParameterDict()
        self.rocoft_row_index = BufferDict(persistent=True)
        self.rocoft_column_index = BufferDict(persistent=True)
        self.rocoft_entry_index = BufferDict(persistent=True)
        # what re-selection took out of training, see `reselection`
        self.rocoft_row_settled = BufferDict(persistent=True)
        self.rocoft_row_settled_index = BufferDict(persistent=True)
        self.rocoft_column_settled = BufferDict(persistent=True)
        self.rocoft_column_settled_index = BufferDict(persistent=True)
        self.out_features = self.in_features = 0
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.weight_is_shared = False
        """Set by the model where another module uses the same weight: then it must not change in place."""
        self._active: Active | None = None
        self._live: _Live | None = None
        self._merged: list[_Kept] = []
        self.merge_cost: MergeCost | None = None
        """What merging into a quantized weight has cost; None where nothing is merged, or the weight is dense."""
        self.register_load_state_dict_post_hook(_look_up_after_loading)

    # --- the adapter's tensors -------------------------------------------------------------------------------------

    def _add_part(
        self, adapter_name: str, config: RocoftConfig, part: str, shape: tuple[int, ...], index: Tensor
    ) -> None:
        """Give an adapter a difference of zero to what `index` chooses of the weight."""
        weight = self._tensor_of_base()
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

    def _tensor_of_base(self) -> Tensor:
        """Any tensor of the base layer: a packed weight may go by any name, and be a buffer."""
        base = self._base
        first = next(base.parameters(), None)
        return next(base.buffers()) if first is None else first

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in peft, but it casts to the dtype of the base as well, in peft 0.20 even the indices."""
        device = device or self._tensor_of_base().device
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
            settled: Any = getattr(self, f"rocoft_{name}_settled", {})
            if adapter_name in settled:
                index = getattr(self, f"rocoft_{name}_settled_index")[adapter_name]
                found.append(Part(name, settled[adapter_name], index, holder=settled, adapter=adapter_name))
        # The crossing of rows and columns belongs to the rows, so they are written last.
        return sorted(found, key=lambda part: part.name == "row")

    def _bias_part(self, adapter_name: str) -> Part:
        return Part("bias", self.rocoft_bias[adapter_name], None, holder=self.rocoft_bias, adapter=adapter_name)

    @property
    def _equations(self) -> Mapping[str, ModuleType]:
        return EXPERT_PARTS if self.of_experts else PARTS

    @property
    def active(self) -> Active:
        """The active adapters, looked up after any change.

        The change itself looks them up, so that to `torch.compile` two adapters of equal shape are the same code with other
        tensors; a forward does so only where another library put parameters of its own into the layer.
        """
        active = self._active
        if active is None or not (torch.compiler.is_compiling() or active.is_current()):
            available = self._available_adapters
            names = [name for name in self.active_adapters if name in available]
            parts = tuple(part for name in names for part in self.parts(name))
            biases = tuple(self._bias_part(name) for name in names if name in self.rocoft_bias)
            active = self._active = Active(len(names), parts, biases)
        return active

    @property
    def _base(self) -> Any:
        """The module with the weight and bias, under whatever layers of other adapters."""
        return self.get_base_layer()

    def _values(self) -> Tensor:
        """The dense weight as (out, in), to read and to write."""
        refuse_sharded(self._base)
        return dense_weight(self._base, values=True)

    # --- live ------------------------------------------------------------------------------------------------------

    def _go_live(self, active: Active) -> None:
        """Make the weight hold W0 + delta of the active adapter."""
        live: _Live | None = self._live
        index_stamps = [_stamp(part.index) for part in active.parts]
        if live is None or live.active is not active or live.index_stamps != index_stamps:
            self.restore_base()
            originals = [self._take_out(part) for part in active.parts]
            live = self._live = _Live(active, originals, index_stamps)
        pointer = self._base.weight.data_ptr()
        if live.pointer != pointer:
            live.values, live.pointer, live.written = self._values(), pointer, []
        written = [_stamp(part.parameter) for part in active.parts]
        # While it is trained the weight is written at every forward: `parameter.data` can change unseen by its version.
        if live.written != written or any(part.parameter.requires_grad for part in active.parts):
            with torch.no_grad():
                for part, kept in zip(active.parts, live.kept, strict=True):
                    part.ops.put_(live.values, kept.index, adapted(kept.values, part.delta()))
            live.written = written

    def _take_out(self, part: Part) -> _Kept:
        """A copy of what a part is about to replace."""
        if part.name == "bias":
            return _Kept("bias", None, self._base.bias.detach().clone())
        return _Kept(part.name, part.index.clone(), part.ops.keep(self._values(), part.index))

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

    def _held(self) -> Active | None:
        """The adapters whose sum with W0 the weight holds now, or None for W0."""
        return None if self._live is None else self._live.active

    def _hold(self, held: Active | None) -> None:
        """Make the weight hold what it held in a forward pass, just before the base layer computes dx = dy W with it.

        Autograd cannot tell that it does not: the reference pass of a preference loss, for one, takes the adapter off between
        forward and backward. When the backward pass is through, the adapter is off again.
        """
        if self._held() is held or self.merged_adapters:
            return
        self.restore_base()
        if held is not None:
            self._go_live(held)
            torch.autograd.Variable._execution_engine.queue_callback(self.restore_base)

    def _held_for_backward(self, y: Tensor, x: Tensor) -> Tensor:
        """The base layer's output y, whose backward pass will find the weight as it is now."""
        if (
            y.requires_grad
            and x.requires_grad
            and not torch.compiler.is_compiling()
            and torch._C._functorch.peek_interpreter_stack() is None
        ):
            held = self._held()
            y.register_hook(lambda dy: self._hold(held))
        return y

    # --- whatever needs W0 restores it first -----------------------------------------------------------------------

    def _adapters_change(self) -> None:
        """Called before anything about the adapters or the weight changes."""
        self.forget_batch()
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
        _ = self.active

    def delete_adapter(self, adapter_name: str) -> None:
        """As in peft; the base is restored at once."""
        self._adapters_change()
        super().delete_adapter(adapter_name)
        self._active = None
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
        trained = {
            name: (self.parts(name), [self._bias_part(name)] if name in self.rocoft_bias else [])
            for name in check_adapters_to_merge(self, adapter_names)
        }
        for name, (parts, biases) in trained.items() if safe_merge else ():
            if not all(torch.isfinite(part.parameter).all() for part in parts + biases):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self.quantization_backend is not None:
            self._merge_quantized([part for parts, _ in trained.values() for part in parts])
        for parts, biases in trained.values():
            self._merge_parts(biases if self.quantization_backend is not None else parts + biases)
        self.merged_adapters.extend(name for name, (parts, biases) in trained.items() if parts or biases)

    def _merge_parts(self, parts: list[Part]) -> None:
        originals = [self._take_out(part) for part in parts]  # all before the first is written: rows and columns cross
        for part, kept in zip(parts, originals, strict=True):
            self._merged.append(kept)
            self._write(kept, adapted(kept.values, part.delta().detach()))

    def _merge_quantized(self, parts: list[Part]) -> None:
        """All parts of all adapters at once: the weight is quantized anew only once."""
        if not parts:
            return
        with torch.no_grad():
            values = values_of(self)
            for part in parts:
                part.ops.put_(values, part.index, adapted(part.ops.keep(values, part.index), part.delta()))
            original, self.merge_cost = replace_weight(self, values)
        self._merged.append(_Kept("weight", None, original))

    def unmerge(self) -> None:
        """Put back what merging replaced, last first: the base is bit-identical to what it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self._merged:
            kept = self._merged[-1]
            if isinstance(kept.values, Original):
                restore_weight(self, kept.values)
            else:
                self._write(kept, kept.values)
            self._merged.pop()
        self.merged_adapters.clear()
        self.merge_cost = None

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


def trainable_dtype(like: Tensor) -> torch.dtype:
    """At least float32: half-precision steps would be lost in the weight they are added to."""
    return torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32


def _look_up_after_loading(layer: RocoftLayer, incompatible_keys: Any) -> None:
    _ = layer.active


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies and how often it was written: changes whenever its values do, but for writes through `.data`."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
