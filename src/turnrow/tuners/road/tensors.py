"""The tensors of RoAd's adapters in a layer: theta and alpha, which pairs they are of, and the blocks of R that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from peft import RoadConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.road.layer import Linear as PeftRoadLinear
from torch import Tensor, nn

from turnrow.ops import pairs, rotation
from turnrow.ops.subspace import subspace
from turnrow.tuners._dense import DenseLinear, bare, features, is_sharded
from turnrow.tuners._mixed_batch import MixedBatchLayer
from turnrow.tuners._quantized import Requantizer, quantization_backend
from turnrow.tuners.road.config import settings_of
from turnrow.tuners.road.whole import IDENTITY, keep_whole_in_state_dicts

__all__ = ["Held", "Rotation", "TensorLayer"]

Rotation: TypeAlias = tuple[pairs.Variant, int, Tensor, Tensor]
"""Variant, group size, theta and alpha of an adapter."""


class Held(NamedTuple):
    """An adapter as the layer holds it."""

    variant: pairs.Variant
    group_size: int
    theta: Tensor
    alpha: Tensor
    places: Tensor | None
    """Where in theta and alpha these lie; None where they are whole."""
    size: int
    """Of theta and alpha when whole."""

    def whole(self) -> Rotation:
        """With theta and alpha of every pair, differentiable in what is held."""
        return (
            self.variant,
            self.group_size,
            pairs.spread(self.theta, self.places, self.size, IDENTITY["road_theta"]),
            pairs.spread(self.alpha, self.places, self.size, IDENTITY["road_alpha"]),
        )


class TensorLayer(MixedBatchLayer, PeftRoadLinear):
    """A layer that holds adapters; parameters, their layout and names are peft's.

    Of an adapter that turns some pairs alone (`RoadConfig.blocks`), theta and alpha hold what belongs to those; state dicts
    show them whole.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: RoadConfig, requantize: Requantizer | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend(base_layer, requantize)
        self.variant: dict[str, pairs.Variant] = {}
        self.group_size: dict[str, int] = {}
        self.road_theta = nn.ParameterDict()
        self.road_alpha = nn.ParameterDict()
        self.road_places = BufferDict(persistent=False)
        """By adapter that turns some pairs alone: where in the whole theta and alpha its own lie, int64."""
        self._trained: dict[str, Sequence[str]] = {}
        """By adapter: "angle", "scale" or both."""
        keep_whole_in_state_dicts(self)
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.out_features, self.in_features = features(self._dense)
        self._watch: dict[str, rotation.OutputWatch] = {}
        self._known: dict[str, tuple[tuple, pairs.Blocks, bool]] = {}
        """By adapter: the state of its parameters, their blocks, and whether those can be undone."""
        self._active_parameters: tuple[Held, ...] | None = None
        """Of the active adapters. Looked up when they change, so that to `torch.compile` two adapters of equal shape are
        the same code with other tensors."""
        self.training = bare(
            base_layer
        ).training  # as peft leaves it, the layers of a model in evaluation would be in training
        self.update_layer(adapter_name, config=config)

    @property
    def _dense(self) -> DenseLinear:
        base: Any = self.get_base_layer()
        return base

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in peft; of an adapter that learns one of angles and scales, the other is never trained."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_untrained()
        self._look_up_active()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As in peft, with the same exception."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_untrained()

    def _freeze_untrained(self) -> None:
        for name, trained in self._trained.items():
            for kind, parameters in (("angle", self.road_theta), ("scale", self.road_alpha)):
                if kind not in trained and name in parameters:
                    parameters[name].requires_grad_(False)

    def _look_up_active(self) -> None:
        for name in self.road_places:
            device = self.road_theta[name].device
            if device.type != "meta":  # as they are before values are loaded into them
                self.road_places[name] = self.road_places[name].to(device)
        self._active_parameters = tuple(
            self._held(name) for name in self.active_adapters if name in self._available_adapters
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorLayer:
        result = super()._apply(fn, recurse)
        self._look_up_active()  # it may have put new parameters in the place of the old
        return result

    def _held(self, name: str) -> Held:
        places: Tensor | None = None
        if name in self.road_places:
            places = self.road_places[name]
        theta, alpha = self.road_theta[name], self.road_alpha[name]
        if places is not None and places.device != theta.device:
            places = places.to(theta.device)  # an offloaded layer is brought in without its buffers
        return Held(self.variant[name], self.group_size[name], theta, alpha, places, self.size_of(name))

    def _parameters_of(self, name: str) -> Rotation:
        return self._held(name).whole()

    def size_of(self, adapter_name: str) -> int:
        """Length of an adapter's theta, and of its alpha, when they are whole."""
        return pairs.parameter_size(self.variant[adapter_name], self.out_features)

    def _blocks(self, name: str) -> tuple[pairs.Blocks, bool]:
        """The blocks of R and whether they can be undone, made anew only when the parameters have changed."""
        held = self._held(name)
        theta, alpha = held.theta, held.alpha
        stamp = tuple((p.data_ptr(), -1 if p.is_inference() else p._version, p.requires_grad) for p in (theta, alpha))
        known = self._known.get(name)
        # What FSDP gathers anew for each forward shows no change: neither its place nor its version differs.
        unchanged = known is not None and known[0] == stamp and not is_sharded(self._dense)
        # `p.data` can be changed unseen by its version: the blocks of parameters in training are always made anew. Whether
        # they can be undone is asked once for each state, because the answer has to come back from the device.
        if known is None or not unchanged or theta.requires_grad or alpha.requires_grad:
            with torch.no_grad():
                blocks = pairs.coefficients(*held.whole())
            invertible = known[2] if known is not None and unchanged else pairs.is_invertible(blocks)
            known = self._known[name] = (stamp, blocks, invertible)
        return known[1], known[2]

    def update_layer(self, adapter_name: str, config: RoadConfig, inference_mode: bool = False) -> None:
        """As in peft, for the pairs that the config names; nothing known of a former adapter of the same name stays."""
        self._forget(adapter_name)
        blocks, trained = settings_of(config)
        places = None
        if blocks is not None:
            numbers = subspace(blocks, self.out_features // 2, where="blocks", what="pairs")
            variant: Any = config.variant
            places = pairs.places(variant, config.group_size, numbers)
        self._forget_part(adapter_name)
        self._trained[adapter_name] = trained
        super().update_layer(adapter_name, config, inference_mode=inference_mode)
        if places is None:
            return
        for parameters in (self.road_theta, self.road_alpha):
            whole = parameters[adapter_name]
            parameters[adapter_name] = nn.Parameter(whole.detach()[places.to(whole.device)], whole.requires_grad)
        self.road_places[adapter_name] = places
        self._look_up_active()

    def delete_adapter(self, adapter_name: str) -> None:
        """As in peft."""
        self._forget(adapter_name)
        self._forget_part(adapter_name)
        super().delete_adapter(adapter_name)
        self._look_up_active()

    @contextmanager
    def replacing(self, adapter_name: str) -> Iterator[None]:
        """As in every layer."""
        self._forget(adapter_name)
        try:
            yield
        finally:
            self._look_up_active()

    def _forget_part(self, adapter_name: str) -> None:
        self._trained.pop(adapter_name, None)
        if adapter_name in self.road_places:
            del self.road_places[adapter_name]

    def _forget(self, adapter_name: str) -> None:
        self.forget_batch()
        self._known.pop(adapter_name, None)
        self._watch.pop(adapter_name, None)
