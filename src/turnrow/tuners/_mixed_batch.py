"""Batches in which every sample has an adapter of its own: peft's `adapter_names`, for RoCoFT and RoAd alike.

The names are resolved once for a forward of the model, or for a whole `generate`, and not in every layer. The layers of a
model share one `Slot`. While it holds a batch, each of them runs its base layer and then applies what all adapters of the
batch trained, at once (`ops.batched`). That was stacked along the samples at the layer's first call, and serves until the
names or the values of the adapters change; only the stacks of the latest batch are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from turnrow.errors import UserError, near_matches
from turnrow.tuners._mixed_modules import own_modules
from turnrow.tuners._watch import ParameterWatch
from turnrow.tuners.gate import SwapGate

__all__ = ["BASE_MODEL", "MixedBatch", "MixedBatchLayer", "MixedBatchModel"]

BASE_MODEL = "__base__"
"""peft's name for a sample that no adapter touches."""


class MixedBatch:
    """The adapter of every sample, and what the layers stacked for it."""

    def __init__(self, names: tuple[str, ...], tuner: BaseTuner) -> None:
        self.names = names
        self.copies = 1
        """How often generation repeats every sample, one after the other: beams, or returned sequences."""
        self.layers: list[MixedBatchLayer] = []
        self.peft_layers: list[Any] = []
        """Layers of peft's own: of another method in a mixed model, or RoAd's over a weight that ours does not know."""
        self.whole_modules: list[ModulesToSaveWrapper] = []
        for name, module in tuner.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                _refuse_experts(name, module)
            if isinstance(module, MixedBatchLayer):
                self.layers.append(module)
            elif isinstance(module, BaseTunerLayer):
                _refuse_without_names(name, module)
                self.peft_layers.append(module)
            elif isinstance(module, ModulesToSaveWrapper):
                self.whole_modules.append(module)
        self._stacked: dict[MixedBatchLayer, tuple[torch.dtype, Any]] = {}
        self.watch = ParameterWatch([place for layer in self.layers for place in layer.places(set(names))])
        self.trained = self.watch.trained
        """Whether a gradient may be asked for, so that nothing can be stacked beforehand."""

    def stacked(self, layer: MixedBatchLayer, dtype: torch.dtype) -> Any:
        """What `layer.stack_adapters` makes of the adapters of this batch; None where it has none of them."""
        if self.trained and torch.is_grad_enabled():
            return layer.stack_adapters(self.names, dtype)
        known = self._stacked.get(layer)
        if known is None or known[0] is not dtype:
            with torch.inference_mode(False), torch.no_grad():  # it may serve in another mode than the present one
                known = self._stacked[layer] = dtype, layer.stack_adapters(self.names, dtype)
        return known[1]

    def copies_in(self, x: Tensor) -> int:
        """How many rows of x belong to one sample.

        Raises:
            UserError: the batch has another size than there are names.
        """
        samples, rows = len(self.names), x.shape[0]
        if rows == samples:
            return 1
        if rows == samples * self.copies:
            return self.copies
        expanded = f", or {samples * self.copies} with all beams or returned sequences" if self.copies > 1 else ""
        raise UserError(
            f"adapter_names has {samples} names, but a layer was given a batch of {rows} (expected {samples}{expanded}): give "
            "one name for each sample. A model that flattens samples and tokens into one dimension cannot take adapter_names"
        )

    def by_sample(self, x: Tensor) -> Tensor:
        """x (rows, ..., features) as (samples, tokens, features), a view where x allows it."""
        shape = x.shape
        if len(shape) == 3 and shape[0] == len(self.names):
            return x
        self.copies_in(x)
        return x.reshape(len(self.names), -1, shape[-1])


class Slot:
    """What the layers of one model share: the batch that they are to serve now, and the last one there was."""

    def __init__(self) -> None:
        self.batch: MixedBatch | None = None
        self.last: MixedBatch | None = None

    def __reduce__(self) -> tuple[type[Slot], tuple]:
        return Slot, ()  # a copy of a model stacks anew


class MixedBatchLayer:
    """An adapter layer that serves a batch of several adapters while its slot holds one."""

    _slot = Slot()  # of no model, never filled
    adapter_layer_names: tuple[str, ...]
    merged_adapters: list[str]

    def stack_adapters(self, names: Sequence[str], dtype: torch.dtype) -> Any:
        """What the adapters named trained here, one for each sample, for an output in `dtype`; None if there is nothing."""
        raise NotImplementedError

    def places(self, names: set[str]) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Where the parameters of the adapters named are kept: dictionaries and keys."""
        for attribute in self.adapter_layer_names:
            holder = getattr(self, attribute)._parameters
            present = sorted(names & holder.keys())
            if present:
                yield holder, present

    def forget_batch(self) -> None:
        """Called when anything about the adapters but the values of their parameters changes: a batch is stacked anew."""
        self._slot.last = None

    @contextmanager
    def replacing(self, adapter_name: str) -> Iterator[None]:
        """In this block the tensors of an adapter are overwritten, in their places; nothing made of the old values outlives it."""
        self.forget_batch()
        yield

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.forget_batch()  # moving and casting write through `.data`
        return super()._apply(fn, recurse)  # type: ignore[misc]


class MixedBatchModel(BaseTuner):
    """A tuner whose layers serve batches of several adapters."""

    _slot: Slot | None = None
    swap_gate: SwapGate | None = None
    """Held by every forward and `generate` of the model, if there is one."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Inside, every sample goes through the adapter that `adapter_names` gives it, if the caller passed any.

        Raises:
            UserError: a name is not loaded, adapters are merged, or gradients are to be checkpointed.
        """
        with nullcontext() if torch.compiler.is_compiling() or self.swap_gate is None else self.swap_gate.running():
            names = kwargs.get("adapter_names")
            if names is None:
                yield
            else:
                with self._serving(names, kwargs):
                    yield

    @contextmanager
    def _serving(self, names: Any, kwargs: dict[str, Any]) -> Iterator[None]:
        if self._slot is None:
            self._slot = Slot()
        slot = self._slot
        batch = self._batch_of(names, slot)
        batch.copies = _copies(self.model, kwargs)
        with ExitStack() as hooks:
            for layer in batch.peft_layers:
                handle = layer.register_forward_pre_hook(_names_for(batch), with_kwargs=True)
                hooks.callback(handle.remove)
            if batch.whole_modules:
                hooks.enter_context(own_modules(batch.whole_modules, batch))
            outer, slot.batch = slot.batch, batch
            try:
                yield
            finally:
                slot.batch = outer

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in peft; what was stacked for a batch is given up."""
        self.forget_batch()
        super().inject_adapter(*args, **kwargs)

    def delete_adapter(self, adapter_name: Any) -> None:
        """As in peft; what was stacked for a batch is given up."""
        self.forget_batch()
        super().delete_adapter(adapter_name)

    def forget_batch(self) -> None:
        """As in the layers."""
        if self._slot is not None:
            self._slot.last = None

    def _batch_of(self, names: Any, slot: Slot) -> MixedBatch:
        """The batch of these names: the last one, if it had the same and nothing changed since."""
        batch = slot.last
        if batch is None or batch.names != tuple(names) or not batch.watch.unchanged():
            _check_names(names, self.peft_config)
            batch = slot.last = MixedBatch(tuple(names), self)
            for layer in batch.layers:
                layer._slot = slot
        merged = sorted({name for layer in batch.layers for name in layer.merged_adapters})
        if merged:
            raise UserError(
                f"adapter_names cannot be used while adapters are merged into the weights ({', '.join(map(repr, merged))}): "
                "call unmerge_adapter() first"
            )
        if self.training and torch.is_grad_enabled() and _checkpoints_gradients(self.model):
            raise UserError(
                "adapter_names cannot be used with gradient checkpointing, which runs the layers again in the backward pass, "
                "when the names are no longer known: switch it off on the base model"
            )
        return batch


def _check_names(names: Any, loaded: Any) -> None:
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"adapter_names is {names!r}; it must be a list with the name of an adapter for each sample")
    allowed = [*loaded, BASE_MODEL]
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        raise UserError(
            f"adapter_names has {', '.join(f'{name!r}{near_matches(name, allowed)}' for name in unknown)}, but the model has no "
            f"such adapter. Loaded are {', '.join(map(repr, loaded))}; {BASE_MODEL!r} stands for the base model alone"
        )


def _refuse_experts(name: str, layer: object) -> None:
    if "experts" in name.split(".") or getattr(layer, "of_experts", False):
        raise UserError(
            f"adapter_names cannot be used with an adapter on {name!r}: an expert gets the tokens of all samples mixed. "
            "Activate one adapter by set_adapter(), or leave the experts out of target_modules and target_parameters"
        )


def _refuse_without_names(name: str, layer: BaseTunerLayer) -> None:
    if not hasattr(layer, "_mixed_batch_forward"):
        raise UserError(
            f"adapter_names cannot be used with {name!r}, a layer of {type(layer).__module__}: in peft that method serves one "
            "adapter at a time"
        )


def _copies(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How often `generate` will repeat every sample, by its arguments and, where they say nothing, the model's defaults."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    wanted = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(wanted)


def _checkpoints_gradients(model: nn.Module) -> bool:
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _names_for(batch: MixedBatch) -> Callable[..., tuple[tuple, dict]]:
    """A hook that tells a layer of peft's own the name for each row of its input."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        copies = batch.copies_in(args[0])
        return args, {**kwargs, "adapter_names": [name for name in batch.names for _ in range(copies)]}

    return hook
