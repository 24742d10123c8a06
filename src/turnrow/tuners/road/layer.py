"""The adapter layer of RoAd, in the place of peft's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from peft import RoadConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.road.layer import Linear as PeftRoadLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from turnrow.ops import batched, pairs, rotation
from turnrow.ops.rounding import MergeCost
from turnrow.ops.subspace import subspace
from turnrow.tuners._dense import DenseLinear, bare, dense_weight, features, is_plain_tensor, is_sharded, refuse_sharded
from turnrow.tuners._mixed_batch import MixedBatch, MixedBatchLayer
from turnrow.tuners._quantized import (
    Original,
    Requantizer,
    quantization_backend,
    refuse_cut_gradient,
    replace_weight,
    restore_weight,
    values_of,
)
from turnrow.tuners.road.config import settings_of
from turnrow.tuners.road.whole import IDENTITY, keep_whole_in_state_dicts

__all__ = ["RoadLinear"]

Rotation: TypeAlias = tuple[pairs.Variant, int, Tensor, Tensor]
"""Variant, group size, theta and alpha of an adapter."""


class _Held(NamedTuple):
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


class RoadLinear(MixedBatchLayer, PeftRoadLinear):
    """A linear layer (torch.nn.Linear, GPT-2's Conv1D, or a quantized one) whose output features are rotated and scaled in pairs.

    Parameters, their layout and names are peft's. The forward is ours: where there are more tokens than input features
    the rotation is folded into the weight (`ops.rotation.rotated_linear`), otherwise it is applied to the output; for the
    backward pass only the output is kept, which its reader mostly keeps anyway.

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
        self._kept_for_unmerge: dict[str, tuple[Tensor, Tensor | None]] = {}
        """Original weight and bias of merged adapters whose rotation cannot be undone (a scale of zero)."""
        self._active_parameters: tuple[_Held, ...] | None = None
        """Of the active adapters. Looked up when they change, so that to `torch.compile` two adapters of equal shape are
        the same code with other tensors."""
        self._replaced: list[tuple[Original, Tensor | None]] = []
        """Quantized weights, and biases, that merging has replaced."""
        self.merge_cost: MergeCost | None = None
        """What merging into a quantized weight has cost; None where nothing is merged, or the weight is dense."""
        self.training = bare(
            base_layer
        ).training  # as peft leaves it, the layers of a model in evaluation would be in training
        self.update_layer(adapter_name, config=config)

    @property
    def _dense(self) -> DenseLinear:
        base: Any = self.get_base_layer()
        return base

    # --- forward ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, rotated by the active adapters, or in a mixed batch each sample by its own."""
        batch = self._slot.batch
        if batch is not None and not self._disable_adapters:
            return self._mixed_forward(batch, x, args, kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if torch.compiler.is_compiling() and self._active_parameters is not None:
            active_parameters = () if self.disable_adapters or self.merged else self._active_parameters
            return self._plain_forward(x, active_parameters, args, kwargs)
        active = [name for name in self.active_adapters if name in self._available_adapters]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return self._plain_forward(x, tuple(map(self._held, active)), args, kwargs)
        if len(active) == 1 and not args and not kwargs:
            folded = self._folded_forward(x, active[0])
            if folded is not None:
                return folded
        h = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            refuse_cut_gradient(h, x, self.quantization_backend)
        for name in active:
            h = self._rotate(h, name)
        return h

    def _mixed_forward(self, batch: MixedBatch, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        h = self.base_layer(x, *args, **kwargs)
        rotations = batch.stacked(self, h.dtype)
        z = batched.rotate(batch.by_sample(h), rotations)
        return z if z.shape == h.shape else z.reshape(h.shape)

    def stack_adapters(self, names: Sequence[str], dtype: torch.dtype) -> list[batched.Rotations]:
        """R for each sample; in the parameters' own dtype."""
        kinds: dict[tuple[pairs.Variant, int], list[int]] = {}
        for sample, name in enumerate(names):
            if name in self.variant:
                kinds.setdefault((self.variant[name], self.group_size[name]), []).append(sample)
        whole = {name: self._held(name).whole() for name in set(names) & self.variant.keys()}
        angles = [
            batched.Angles(
                *kind,
                samples,
                theta=[whole[names[sample]][2] for sample in samples],
                alpha=[whole[names[sample]][3] for sample in samples],
            )
            for kind, samples in kinds.items()
        ]
        return batched.stack_rotations(angles, len(names), self.out_features)

    def _plain_forward(self, x: Tensor, active: tuple[_Held, ...], args: tuple, kwargs: dict) -> Tensor:
        """Differentiable operations only, for `torch.compile` and the transforms of `torch.func`."""
        h = self.base_layer(x, *args, **kwargs)
        for held in active:
            h = pairs.rotate(h, pairs.coefficients(*held.whole()))
        return h

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoadLinear:
        result = super()._apply(fn, recurse)
        self._look_up_active()  # it may have put new parameters in the place of the old
        for original, _ in self._replaced:
            original.apply(fn)
        return result

    def _folded_forward(self, x: Tensor, name: str) -> Tensor | None:
        """The rotation folded into the weight; None where that is not possible or does not pay."""
        tokens = x.numel() // self.in_features
        if tokens <= self.in_features or self.quantization_backend is not None:
            return None
        if self.base_layer is not self._dense or not _is_plain(self._dense):
            return None
        weight, bias = dense_weight(self._dense), self._dense.bias
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        elif x.dtype != weight.dtype:
            return None
        if not self._blocks(name)[1]:
            return None
        variant, group_size, theta, alpha = self._parameters_of(name)
        watch = self._watch_over(name, x, theta, alpha)
        keep = "output" if watch is None else watch.keep
        return rotation.rotated_linear(
            x, weight, bias, theta, alpha, variant=variant, group_size=group_size, keep=keep, watch=watch
        )

    def _rotate(self, h: Tensor, name: str) -> Tensor:
        blocks, invertible = self._blocks(name)
        variant, group_size, theta, alpha = self._parameters_of(name)
        watch = self._watch_over(name, h, theta, alpha)
        if watch is None:
            return pairs.rotate_values(h, blocks)
        keep = watch.keep if invertible else "input"
        return rotation.rotate_output(h, theta, alpha, variant=variant, group_size=group_size, keep=keep, watch=watch)

    def _watch_over(self, name: str, *inputs: Tensor) -> rotation.OutputWatch | None:
        """The watch over the outputs of this layer; None where no gradient will be asked for."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return self._watch.setdefault(name, rotation.OutputWatch())
        return None

    def _held(self, name: str) -> _Held:
        places: Tensor | None = None
        if name in self.road_places:
            places = self.road_places[name]
        theta, alpha = self.road_theta[name], self.road_alpha[name]
        if places is not None and places.device != theta.device:
            places = places.to(theta.device)  # an offloaded layer is brought in without its buffers
        return _Held(self.variant[name], self.group_size[name], theta, alpha, places, self.size_of(name))

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

    # --- merging ---------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold R into the weight and bias, elementwise, until `unmerge`.

        Args:
            safe_merge: refuse an adapter with NaN or infinite values, before anything is written.
            adapter_names: adapters to merge; None merges the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite; names the adapter.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self._available_adapters]
        for name in names if safe_merge else ():
            if not all(torch.isfinite(entry).all() for entry in self._blocks(name)[0]):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self.quantization_backend is not None:
            self._merge_quantized(names)
            return
        for name in names:
            blocks, invertible = self._blocks(name)
            weight, bias = self._weight_values(), self._bias_values()
            if not invertible:
                self._kept_for_unmerge[name] = (weight.clone(), None if bias is None else bias.clone())
            rotation.rotate_weight_(weight, bias, blocks)
            self.merged_adapters.append(name)

    def _merge_quantized(self, names: list[str]) -> None:
        """All adapters at once: the weight is quantized anew only once."""
        if not names:
            return
        values, bias = values_of(self), self._bias_values()
        rotated_bias = None if bias is None else bias.clone()
        for name in names:
            rotation.rotate_weight_(values, rotated_bias, self._blocks(name)[0])
        original, self.merge_cost = replace_weight(self, values)
        self._replaced.append((original, None if bias is None else bias.clone()))
        self._put_bias(rotated_bias)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Undo `merge`, last adapter first: by the closed-form inverse, exact up to rounding in the weight's dtype.

        A quantized weight is put back as it was, bit for bit.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self._replaced:
            original, kept_bias = self._replaced.pop()
            restore_weight(self, original)
            self._put_bias(kept_bias)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name not in self._available_adapters or self.quantization_backend is not None:
                continue
            weight = self._weight_values()
            if name in self._kept_for_unmerge:
                kept_weight, kept_bias = self._kept_for_unmerge.pop(name)
                weight.copy_(kept_weight)
                self._put_bias(kept_bias)
            else:
                rotation.unrotate_weight_(weight, self._bias_values(), self._blocks(name)[0])
        self.merge_cost = None

    def dense_values(self) -> Tensor:
        """The weight as it is at this moment, (out, in), to read: a dense one itself, of a quantized one a float32 copy."""
        return self._weight_values() if self.quantization_backend is None else values_of(self)

    def _weight_values(self) -> Tensor:
        """Values of the dense weight as (out, in), to read and to write."""
        refuse_sharded(self._dense)
        return dense_weight(self._dense, values=True)

    def _bias_values(self) -> Tensor | None:
        """Values of the bias, to write to."""
        bias: Tensor | None = getattr(self._dense, "bias", None)
        return None if bias is None else bias.data

    def _put_bias(self, kept: Tensor | None) -> None:
        bias = self._bias_values()
        if bias is not None and kept is not None:
            bias.copy_(kept)


def _is_plain(base: DenseLinear) -> bool:
    """Whether calling `base` does nothing but a linear layer with frozen, dense, present weights."""
    bias: Tensor | None = base.bias
    return (
        type(base) in (nn.Linear, Conv1D)
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and not hasattr(base, "_hf_hook")  # accelerate: the weight may be on another device
        and "forward" not in base.__dict__
        and is_plain_tensor(base.weight)
        and not base.weight.requires_grad
        and not (bias is not None and bias.requires_grad)
    )
