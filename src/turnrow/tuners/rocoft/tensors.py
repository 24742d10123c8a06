"""The tensors of RoCoFT adapters in a layer: what is trained, what of the weight it belongs to, and which adapters are active."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeGuard

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from turnrow.tuners._dense import dense_weight, refuse_sharded
from turnrow.tuners._mixed_batch import MixedBatchLayer
from turnrow.tuners._quantized import Requantizer, quantization_backend
from turnrow.tuners._transition import one_at_a_time
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.parts import EXPERT_PARTS, PARTS, Part

__all__ = ["Active", "AdapterTensors", "trainable_dtype"]

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


class AdapterTensors(MixedBatchLayer, BaseTunerLayer, nn.Module):
    """A layer that holds the tensors of any number of adapters beside its base layer."""

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
        self._active: Active | None = None

    # --- one adapter -----------------------------------------------------------------------------------------------

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

    def _add_bias(self, adapter_name: str) -> None:
        bias = getattr(self._base, "bias", None)
        if bias is not None:
            self.rocoft_bias[adapter_name] = nn.Parameter(torch.zeros_like(bias, dtype=trainable_dtype(bias)))

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
        device = device or self._tensor_of_base().device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            tensors = getattr(self, name)
            if adapter_name in tensors and not tensors[adapter_name].is_meta:
                tensors[adapter_name] = tensors[adapter_name].to(device)

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

    # --- the active ones ---------------------------------------------------------------------------------------------

    @property
    def active(self) -> Active:
        """The active adapters, looked up after any change.

        The change itself looks them up, so that to `torch.compile` two adapters of equal shape are the same code with other
        tensors; a forward does so only where another library put parameters of its own into the layer.
        """
        active = self._active
        if _is_current(active):
            return active
        with one_at_a_time():
            active = self._active
            if not _is_current(active):
                active = self._active = self._look_up()
        return active

    def _look_up(self) -> Active:
        available = self._available_adapters
        names = [name for name in self.active_adapters if name in available]
        parts = tuple(part for name in names for part in self.parts(name))
        biases = tuple(self._bias_part(name) for name in names if name in self.rocoft_bias)
        return Active(len(names), parts, biases)

    def _adapters_change(self) -> None:
        """Called before anything about the adapters or the weight changes."""
        self.forget_batch()
        self._active = None

    # --- the base layer ----------------------------------------------------------------------------------------------

    @property
    def _base(self) -> Any:
        """The module with the weight and bias, under whatever layers of other adapters."""
        return self.get_base_layer()

    def _tensor_of_base(self) -> Tensor:
        """Any tensor of the base layer: a packed weight may go by any name, and be a buffer."""
        base = self._base
        first = next(base.parameters(), None)
        return next(base.buffers()) if first is None else first

    def _values(self) -> Tensor:
        """The dense weight as (out, in), to read and to write."""
        refuse_sharded(self._base)
        return dense_weight(self._base, values=True)

    @property
    def _equations(self) -> Mapping[str, ModuleType]:
        return EXPERT_PARTS if self.of_experts else PARTS


def _is_current(active: Active | None) -> TypeGuard[Active]:
    return active is not None and (torch.compiler.is_compiling() or active.is_current())


def trainable_dtype(like: Tensor) -> torch.dtype:
    """At least float32: half-precision steps would be lost in the weight they are added to."""
    return torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
