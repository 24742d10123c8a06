"""The adapter layer of RoAd, in the place of peft's own.

It is built up in steps: the adapters' tensors (`tensors`), merging (`merging`), and here the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from turnrow.ops import batched, pairs, rotation
from turnrow.tuners._dense import DenseLinear, dense_weight, is_plain_tensor
from turnrow.tuners._mixed_batch import MixedBatch
from turnrow.tuners._quantized import refuse_cut_gradient
from turnrow.tuners.road.merging import MergingLayer
from turnrow.tuners.road.tensors import Held

__all__ = ["RoadLinear"]


class RoadLinear(MergingLayer):
    """A linear layer (torch.nn.Linear, GPT-2's Conv1D, or a quantized one) whose output features are rotated and scaled in pairs.

    Parameters, their layout and names are peft's. The forward is ours: where there are more tokens than input features
    the rotation is folded into the weight (`ops.rotation.rotated_linear`), otherwise it is applied to the output; for the
    backward pass only the output is kept, which its reader mostly keeps anyway.

    Of an adapter that turns some pairs alone (`RoadConfig.blocks`), theta and alpha hold what belongs to those; state dicts
    show them whole.
    """

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

    def _plain_forward(self, x: Tensor, active: tuple[Held, ...], args: tuple, kwargs: dict) -> Tensor:
        """Differentiable operations only, for `torch.compile` and the transforms of `torch.func`."""
        h = self.base_layer(x, *args, **kwargs)
        for held in active:
            h = pairs.rotate(h, pairs.coefficients(*held.whole()))
        return h

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
