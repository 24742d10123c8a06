"""Gather the statistics of many linear layers in one pass over calibration data, by hooks on the real forward.

The model computes as it will in use: in evaluation mode, without dropout, each layer on what the layers below it give.
(The RoCoFT authors' code hands the inputs from one linear layer straight to the next, without attention, norms and
residuals in between.) The gradient of a weight is formed when the backward pass reaches the layer, summed up and dropped
before the next one is; no parameter keeps a `.grad`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from turnrow.errors import UserError
from turnrow.ops.delta import unviewed
from turnrow.ops.experts import FusedWeight, Reader, Routing, read_weight
from turnrow.ops.frozen import frozen
from turnrow.selection.statistics import ExpertInputNorms, GradientSums, InputNorms, real_tokens, weight_gradient
from turnrow.selection.strategies import Part

__all__ = ["Batch", "gather"]

Batch = Mapping[str, Any]
"""Keyword arguments of a forward: input_ids, attention_mask, labels, ..."""


def gather(
    model: nn.Module,
    layers: Mapping[str, nn.Module | FusedWeight],
    batches: Iterable[Batch],
    strategy: str,
    parts: Sequence[Part | str] = ("row",),
) -> dict[str, InputNorms | ExpertInputNorms] | dict[str, GradientSums]:
    """Run `model` over `batches` once and return what `strategy` scores `layers` by.

    Memory is that of one batch and of the statistics, which do not grow with the data. "gradient" and "fisher" keep the
    inputs of the layers until the backward pass of the batch has reached them, as training every weight would.

    Args:
        model: called as ``model(**batch)``. Its training mode and `requires_grad` flags are as before afterwards, also
            after an exception, and all hooks are gone.
        layers: the linear layers by name: modules that the model calls with an input (..., in) and that return (..., out),
            quantized or not. Or fused weights of experts, whose scores have a leading dimension for the experts.
        batches: tensors are moved to the device of the model. `attention_mask` and `decoder_attention_mask` (or, where that
            is missing, labels of -100) say which tokens are padding: they do not count towards the norms of the inputs. A
            padded token that changes no loss has no gradient. Every batch weighs the same in sums of gradients.
        strategy: one that needs data.
        parts: which sums of gradients to keep.

    Raises:
        UserError: there are no batches, one is no mapping, or the model gives no loss and the strategy needs it; the inputs of
            experts are wanted and do not go into a product that is known.
    """
    by_gradient = not strategy.startswith("wanda")
    with ExitStack() as undo:
        undo.enter_context(frozen(model))
        undo.enter_context(_deterministic())
        if by_gradient:
            sums = {name: GradientSums(parts, squared=strategy == "fisher") for name in layers}
            gradients = _Gradients(sums)
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.enable_grad())
            for name, layer in layers.items():
                if isinstance(layer, FusedWeight):
                    undo.enter_context(gradients.watching_weight(name, layer))
                else:
                    undo.callback(layer.register_forward_hook(partial(gradients.watch, name)).remove)
            _each_batch(model, batches, strategy, gradients.backward)
            return sums
        norms: dict[str, InputNorms | ExpertInputNorms] = {}
        masks: dict[str, Tensor] = {}
        for name, layer in layers.items():
            if isinstance(layer, FusedWeight):
                norms[name] = of_experts = ExpertInputNorms(layer.shape[0])
                undo.enter_context(_reading(layer, _ExpertInputs(of_experts, name)))
            else:
                norms[name] = of_layer = InputNorms()
                undo.callback(layer.register_forward_hook(partial(_add_inputs, of_layer, name, masks)).remove)
        with torch.no_grad():
            _each_batch(model, batches, strategy, lambda output: None, masks)
        return norms


def _each_batch(
    model: nn.Module,
    batches: Iterable[Batch],
    strategy: str,
    after: Callable[[Any], None],
    masks: dict[str, Tensor] | None = None,
) -> None:
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    count = 0
    for count, batch in enumerate(batches, start=1):
        if not isinstance(batch, Mapping):
            raise UserError(
                f"calibration batch {count} is a {type(batch).__name__}; it must be a mapping of the model's arguments, such "
                "as {'input_ids': ..., 'attention_mask': ..., 'labels': ...}"
            )
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        if masks is not None:
            masks.clear()
            masks.update(_padding_masks(model, moved))
        after(model(**moved))
    if count == 0:
        raise UserError(f"selection {strategy!r} needs data, but there is no calibration batch: give at least one")


# --- Wanda -----------------------------------------------------------------------------------------------------------


def _add_inputs(
    norms: InputNorms, name: str, masks: Mapping[str, Tensor], layer: nn.Module, args: tuple, output: Tensor
) -> None:
    order = ("decoder", "encoder") if "decoder" in name.split(".") else ("encoder", "decoder")
    norms.add(real_tokens(args[0].detach(), [masks[side] for side in order if side in masks]))


class _ExpertInputs:
    """Adds what goes into the products of a fused weight, expert by expert; which of the tokens are padding is not known there."""

    def __init__(self, norms: ExpertInputNorms, name: str) -> None:
        self._norms, self._name = norms, name

    def routed(self, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
        tokens = routing.sort(x.reshape(-1, x.shape[-1]))
        for norms, (first, last) in zip(self._norms.of_each, routing.segments(), strict=True):
            if first < last:
                norms.add(tokens[first:last])
        return y

    def of_expert(self, y: Tensor, x: Tensor, expert: int) -> Tensor:
        self._norms.of_each[expert].add(x.reshape(-1, x.shape[-1]))
        return y

    def otherwise(self, function: Any, result: Any) -> None:
        if isinstance(result, Tensor) and result.is_floating_point():
            raise UserError(
                f"the model uses the experts of {self._name!r} in a way ({getattr(function, '__name__', function)}) in which their inputs "
                "are not seen: select by 'gradient' or 'fisher', or leave them out of target_parameters"
            )


@contextmanager
def _reading(fused: FusedWeight, reader: Reader) -> Iterator[None]:
    """In this block the module with a fused weight finds one in its place that tells `reader` of its uses."""
    held, weight = fused.module._parameters, fused.weight
    held[fused.name] = read_weight(weight.detach(), reader, transposed=fused.transposed)  # type: ignore[assignment]
    try:
        yield
    finally:
        held[fused.name] = weight  # type: ignore[assignment]


def _padding_masks(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Which tokens are real, (batch, length), of the encoder or only stack and of the decoder beside an encoder.

    Where both sides are of one length, a layer inside a module called "decoder" gets the decoder's mask, the projections
    that read the encoder's output there too.
    """
    masks = {"encoder": batch.get("attention_mask"), "decoder": batch.get("decoder_attention_mask")}
    labels = batch.get("labels")
    two_sides = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if two_sides and masks["decoder"] is None and isinstance(labels, Tensor):
        masks["decoder"] = labels != -100
    return {side: mask for side, mask in masks.items() if isinstance(mask, Tensor) and mask.dim() == 2}


# --- gradients -------------------------------------------------------------------------------------------------------


class _Gradients:
    """Forms dY^T X of every layer as the backward pass comes by."""

    def __init__(self, sums: Mapping[str, GradientSums]) -> None:
        self._sums = sums
        self._calls: Counter[str] = Counter()
        self._unfinished: dict[str, Tensor] = {}
        # All that a frozen model computes from here on has a gradient. A number without dimensions goes with any tensor.
        self._start = torch.zeros((), requires_grad=True)

    def watch(self, name: str, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook: keep the input, and ask for the gradient of the output."""
        if not torch.is_grad_enabled():
            return output
        x = args[0].detach()
        if not output.requires_grad:
            output = output + self._start
        self._calls[name] += 1
        # Where the model overwrites a view, a hook on the view itself would never be called. What bitsandbytes returns may
        # be a view of something that autograd does not know.
        whole = unviewed(output)
        watched = whole if whole.requires_grad else output
        watched.register_hook(partial(self._arrived, name, x, x._version))
        return output

    @contextmanager
    def watching_weight(self, name: str, fused: FusedWeight) -> Iterator[None]:
        """Leave the gradient of a fused weight to autograd, which knows the tokens of each expert; one weight's is held at a time."""
        weight = fused.weight
        before, weight.grad = weight.grad, None
        weight.requires_grad_(True)
        handle = weight.register_post_accumulate_grad_hook(partial(self._arrived_at_weight, name, fused.transposed))
        try:
            yield
        finally:
            handle.remove()
            weight.requires_grad_(False)
            weight.grad = before

    def _arrived_at_weight(self, name: str, transposed: bool, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        self._sums[name].add(gradient.transpose(1, 2) if transposed else gradient)

    def _arrived(self, name: str, x: Tensor, version: int, dy: Tensor) -> None:
        if x._version != version:
            raise UserError(
                f"the model overwrites the input of module {name!r} after use, so its gradient cannot be formed; leave it "
                "out of target_modules, or select by 'wanda_max'"
            )
        gradient = weight_gradient(x, dy)
        self._calls[name] -= 1
        if name in self._unfinished:
            gradient += self._unfinished.pop(name)
        # A layer that is called several times in one forward has one gradient, the sum over its calls.
        if self._calls[name]:
            self._unfinished[name] = gradient
        else:
            self._sums[name].add(gradient)

    def backward(self, output: Any) -> None:
        """Run the backward pass of a batch."""
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise UserError(
                "the model gives no loss on the calibration batches, which a selection by gradient needs: add 'labels' to "
                "them, or select by 'wanda_max', which needs none"
            )
        if loss.requires_grad:
            loss.backward()
        # What is left are calls whose output the loss does not depend on.
        for name, gradient in self._unfinished.items():
            self._sums[name].add(gradient)
        self._unfinished.clear()
        self._calls.clear()
        self._start.grad = None


# --- as it was -------------------------------------------------------------------------------------------------------


@contextmanager
def _deterministic() -> Iterator[None]:
    """Ask torch for deterministic algorithms in this block, as a run of `turnrow train` does."""
    if torch.are_deterministic_algorithms_enabled():
        yield
        return
    # cuBLAS reads this when it starts; without it its results may vary from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
