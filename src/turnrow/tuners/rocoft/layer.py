"""The adapter layers of RoCoFT.

Two ways to compute the same thing:

*live* - the weight of the base layer itself holds W0 + delta, and the r original rows or columns are kept aside. A
forward is the plain base layer. Taken whenever one adapter is active on a dense weight that belongs to this layer alone.

*overlay* - the weight stays W0 and the change is added to the output. Taken for several active adapters, weights that are
sharded, tied or elsewhere (meta device), and under `torch.func`.

The weight goes live with the first forward and stays so until anything needs W0: disabling, switching, merging, deleting,
unloading, saving or loading a state dict, moving or casting the model. Then the kept rows or columns are put back, which
restores W0 bit for bit. They are on record before the weight is written, so an exception cannot lose them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.func import functional_call

from turnrow.errors import UserError
from turnrow.ops import columns, rows
from turnrow.ops.delta import adapted
from turnrow.selection import check_indices, first
from turnrow.tuners._dense import dense_linear, dense_weight, features, is_plain_tensor
from turnrow.tuners.rocoft.config import RocoftConfig

__all__ = ["RocoftBias", "RocoftLayer", "RocoftLinear"]

_OPS: dict[str, ModuleType] = {"row": rows, "column": columns}

_NOISE = 0.1
"""Standard deviation of the random differences that `init_weights=False` starts from."""


@dataclass
class _Kept:
    """Original values taken out of a weight or bias, so that they can be put back."""

    adapter: str
    part: str
    """"row", "column" or "bias"."""
    index: Tensor | None
    values: Tensor
    index_stamp: tuple | None = None
    """State of the index tensor when the values were taken out."""
    delta_stamp: tuple | None = None
    """State of delta and of the weight when the weight was last written."""


class RocoftLayer(BaseTunerLayer, nn.Module):
    """What all RoCoFT layers share: the adapter's tensors, and keeping the base bit-identical."""

    adapter_layer_names: tuple[str, ...] = ("rocoft_row", "rocoft_column", "rocoft_bias")
    other_param_names: tuple[str, ...] = ("rocoft_row_index", "rocoft_column_index")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.rocoft_row = nn.ParameterDict()
        self.rocoft_column = nn.ParameterDict()
        self.rocoft_bias = nn.ParameterDict()
        self.rocoft_row_index = BufferDict(persistent=True)
        self.rocoft_column_index = BufferDict(persistent=True)
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.weight_is_shared = False
        """Set by the model where another module uses the same weight: then it must not change in place."""
        self._live: _Kept | None = None
        self._merged: list[_Kept] = []

    # --- the adapter's tensors -------------------------------------------------------------------------------------

    def _add_bias(self, adapter_name: str) -> None:
        bias = getattr(self._base, "bias", None)
        if bias is not None:
            self.rocoft_bias[adapter_name] = nn.Parameter(torch.zeros_like(bias, dtype=_trainable_dtype(bias)))

    @property
    def _available_adapters(self) -> set[str]:
        return self._get_available_adapters()

    def _part(self, adapter_name: str) -> str | None:
        """Which part of the weight the adapter trains here: "row", "column", or None."""
        return "row" if adapter_name in self.rocoft_row else "column" if adapter_name in self.rocoft_column else None

    def _delta(self, adapter_name: str, part: str) -> Tensor:
        return getattr(self, f"rocoft_{part}")[adapter_name]

    def _index(self, adapter_name: str, part: str) -> Tensor:
        return getattr(self, f"rocoft_{part}_index")[adapter_name]

    @property
    def _base(self) -> Any:
        """The module with the weight and bias, under whatever layers of other adapters."""
        return self.get_base_layer()

    def _values(self) -> Tensor:
        """The weight as (out, in), to read and to write."""
        return dense_weight(self._base, values=True)

    # --- live ------------------------------------------------------------------------------------------------------

    def _go_live(self, adapter_name: str, part: str) -> None:
        """Make the weight hold W0 + delta of this adapter."""
        delta, index = self._delta(adapter_name, part), self._index(adapter_name, part)
        index_stamp = (index.data_ptr(), _version(index))
        kept = self._live
        if kept is None or (kept.adapter, kept.part, kept.index_stamp) != (adapter_name, part, index_stamp):
            self.restore_base()
            originals = _OPS[part].keep(self._values(), index)
            kept = self._live = _Kept(adapter_name, part, index.clone(), originals, index_stamp)
        delta_stamp = (delta.data_ptr(), _version(delta), self._base.weight.data_ptr())
        # While delta is trained the weight is written at every forward: `delta.data` can change unseen by its version.
        if kept.delta_stamp != delta_stamp or delta.requires_grad:
            self._write(kept, adapted(kept.values, delta.detach()))
            kept.delta_stamp = delta_stamp

    def restore_base(self) -> None:
        """Put the original rows or columns back if the weight is live. Bit-exact; merged adapters stay merged."""
        kept = self._live
        if kept is not None:
            self._write(kept, kept.values)
            self._live = None

    def _write(self, kept: _Kept, values: Tensor) -> None:
        with torch.no_grad():
            if kept.part == "bias":
                self._base.bias.data.copy_(values)
            else:
                _OPS[kept.part].put_(self._values(), kept.index, values)

    def _held(self) -> tuple[str, str] | None:
        """Adapter and part that the weight holds now, or None for W0."""
        return None if self._live is None else (self._live.adapter, self._live.part)

    def _hold(self, held: tuple[str, str] | None) -> None:
        """Make the weight hold what it held in a forward pass, just before the base layer computes dx = dy W with it.

        Autograd cannot tell that it does not: the reference pass of a preference loss, for one, takes the adapter off between
        forward and backward. When the backward pass is through, the adapter is off again.
        """
        if self._held() == held or self.merged:
            return
        self.restore_base()
        if held is not None:
            self._go_live(*held)
            torch.autograd.Variable._execution_engine.queue_callback(self.restore_base)

    # --- whatever needs W0 restores it first -----------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        """As in peft; disabling restores the base at once, not at the next forward."""
        if not enabled:
            self.restore_base()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in peft; the base is restored at once."""
        self.restore_base()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in peft; the base is restored at once."""
        self.restore_base()
        super().delete_adapter(adapter_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RocoftLayer:
        self.restore_base()
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
        self.restore_base()
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
            parts = [part for part in ("row", "column", "bias") if name in getattr(self, f"rocoft_{part}")]
            if safe_merge and not all(torch.isfinite(self._delta(name, part)).all() for part in parts):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            for part in parts:
                self._merge_part(name, part)
            if parts:
                self.merged_adapters.append(name)

    def _merge_part(self, name: str, part: str) -> None:
        if part == "bias":
            index, values = None, self._base.bias.detach().clone()
        else:
            index = self._index(name, part).clone()
            values = _OPS[part].keep(self._values(), index)
        kept = _Kept(name, part, index, values)
        self._merged.append(kept)
        self._write(kept, adapted(values, self._delta(name, part).detach()))

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

    def _call_base(self, active: list[str], args: tuple, kwargs: dict) -> Any:
        """The base layer, with the biases of the active adapters."""
        with_bias = [name for name in active if name in self.rocoft_bias]
        if not with_bias:
            return self.base_layer(*args, **kwargs)
        base = self._base
        bias = base.bias
        for name in with_bias:
            bias = bias + self.rocoft_bias[name]
        return functional_call(self.base_layer, {"bias": bias.to(base.bias.dtype)}, args, kwargs)

    def _active_here(self) -> list[str]:
        available = self._available_adapters
        return [name for name in self.active_adapters if name in available]


class RocoftLinear(RocoftLayer):
    """A linear layer (torch.nn.Linear, or GPT-2's Conv1D) of which r rows or columns are trained."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RocoftConfig, name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.out_features, self.in_features = features(self._base)
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: RocoftConfig, name: str) -> None:
        """Add an adapter: delta = 0 for the rows or columns that the config chooses for the module called `name`."""
        weight = self._base.weight
        index = choose_index(config, name, self.out_features, self.in_features)
        delta_shape = _OPS[config.mode].shape(self.out_features, self.in_features, len(index))
        delta = torch.zeros(delta_shape, dtype=_trainable_dtype(weight), device=weight.device)
        if not config.init_weights:
            nn.init.normal_(delta, std=_NOISE)
        getattr(self, f"rocoft_{config.mode}")[adapter_name] = nn.Parameter(delta)
        getattr(self, f"rocoft_{config.mode}_index")[adapter_name] = index.to(weight.device)
        if config.bias != "none":
            self._add_bias(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer with the rows or columns of the active adapters."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._held_for_backward(self.base_layer(x, *args, **kwargs), x)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = self._active_here()
        if len(active) == 1 and self._may_go_live(active[0]):
            return self._live_forward(x, active[0], args, kwargs)
        self.restore_base()
        y = self._held_for_backward(self._call_base(active, (x, *args), kwargs), x)
        for name in active:
            part = self._part(name)
            if part is not None:
                y = _OPS[part].overlay(y, x, self._delta(name, part), self._index(name, part))
        return y

    def _live_forward(self, x: Tensor, name: str, args: tuple, kwargs: dict) -> Tensor:
        part = self._part(name)
        if part is None:
            return self._call_base([name], (x, *args), kwargs)
        self._go_live(name, part)
        y = self._call_base([name], (x, *args), kwargs)
        delta = self._delta(name, part)
        if torch.is_grad_enabled() and delta.requires_grad:
            before_backward = partial(self._hold, self._held())
            return _OPS[part].attach_gradient(y, x, delta, self._index(name, part), before_backward)
        return self._held_for_backward(y, x)

    def _held_for_backward(self, y: Tensor, x: Tensor) -> Tensor:
        """The base layer's output y, whose backward pass will find the weight as it is now."""
        if x.requires_grad and y.requires_grad and torch._C._functorch.peek_interpreter_stack() is None:
            held = self._held()
            y.register_hook(lambda dy: self._hold(held))
        return y

    def _may_go_live(self, name: str) -> bool:
        weight = self._base.weight
        return (
            not self.weight_is_shared
            and self.base_layer is self._base  # no other adapter layer in between
            and is_plain_tensor(weight)
            and weight.dim() == 2  # FSDP flattens what it shards
            and not weight.requires_grad  # a weight that is trained itself must keep its own gradient
            and not weight.is_inference()
            and torch._C._functorch.peek_interpreter_stack() is None
        )

    def __repr__(self) -> str:
        return "rocoft." + super().__repr__()


class RocoftBias(RocoftLayer):
    """Any module whose bias is trained and whose weight is not, for `bias="all"`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RocoftConfig) -> None:
        super().__init__(base_layer, adapter_name)
        # peft's layers all tell their features; a norm has as many of both as its bias has values.
        size, dense = self._base.bias.numel(), dense_linear(self._base)
        channels = getattr(self._base, "in_channels", size)
        self.out_features, self.in_features = (size, channels) if dense is None else features(dense)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: RocoftConfig) -> None:
        """Add an adapter: a difference of zero to the bias."""
        self._add_bias(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def __getattr__(self, name: str) -> Any:
        """What models read of their layers, such as the epsilon of a norm, is still found here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer with the biases of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self._active_here()
        return self._call_base(active, args, kwargs)

    def __repr__(self) -> str:
        return "rocoft." + super().__repr__()


def choose_index(config: RocoftConfig, name: str, out_features: int, in_features: int) -> Tensor:
    """The rows or columns that `config` chooses for the module called `name`, (r,) int64.

    Raises:
        UserError: more are asked for than there are, or the given ones do not fit; names the module.
    """
    size = out_features if config.mode == "row" else in_features
    given = _given_indices(config, name)
    if given is not None:
        return check_indices(given, size, what=config.mode, module=name)
    r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    if r > size:
        raise UserError(
            f"r is {r}, but module {name!r} has only {size} {config.mode}s (its weight is {out_features} x {in_features}); "
            "lower r, or give this module its own rank in rank_pattern"
        )
    return first(size, r)


def _given_indices(config: RocoftConfig, name: str) -> list[int] | None:
    if config.indices is None or isinstance(config.indices, (list, tuple)):
        return config.indices
    parts = name.split(".")
    # The whole name first, then shorter and shorter endings: the most specific entry wins.
    return next(
        (config.indices[key] for i in range(len(parts)) if (key := ".".join(parts[i:])) in config.indices), None
    )


def _trainable_dtype(like: Tensor) -> torch.dtype:
    """At least float32: half-precision steps would be lost in the weight they are added to."""
    return torch.promote_types(like.dtype, torch.float32)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
