"""The adapter layers of RoCoFT for experts whose weights are fused in parameters of three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from turnrow.errors import UserError
from turnrow.ops.experts import FusedWeight, overlay
from turnrow.tuners._dense import is_rehearsal, is_sharded, may_change_in_place, refuse_sharded
from turnrow.tuners._passthrough import AttributesOfBase
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.layer import RocoftLayer
from turnrow.tuners.rocoft.live_weight import live_weight
from turnrow.tuners.rocoft.parts import choose_expert_indices, shape_of_part
from turnrow.tuners.rocoft.tensors import Active

__all__ = ["RocoftExpertWeight", "RocoftExperts"]


class RocoftExpertWeight(RocoftLayer):
    """One fused weight, (E, out, in), of which rows, columns or entries of every expert are trained.

    Stands beside the module that holds the weight, in a `RocoftExperts`, and is not called itself. Under the name of the parameter,
    so that the tensors in the file of an adapter are named as the weight is: ``...experts.down_proj.rocoft_row``.
    """

    of_experts = True

    def __init__(self, weight: FusedWeight, adapter_name: str, config: RocoftConfig, name: str) -> None:
        super().__init__(weight, adapter_name)
        _, self.out_features, self.in_features = weight.shape
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: RocoftConfig, name: str) -> None:
        """Add an adapter: delta = 0 for what the config chooses in each expert of the parameter called `name`."""
        chosen = choose_expert_indices(config, name, self._base.shape)
        for part, index in chosen.items():
            shape = shape_of_part(part, chosen, self.out_features, self.in_features)
            self._add_part(adapter_name, config, part, (len(index), *shape), index)
        self._await_selection(adapter_name, config, name)
        if config.bias != "none":
            self._add_bias(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def substitutes(self) -> dict[str, Tensor]:
        """What the module is to read in the place of its own parameters during one forward; empty if they will do as they are."""
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return {}
        active, base = self.active, self._base
        found: dict[str, Tensor] = {}
        if self._unselected:
            self._refuse_unselected(self.active_adapters, active.parts)
        if self._may_go_live(active):
            if is_rehearsal():
                raise NotImplementedError("how many tokens each expert gets depends on the values of the tokens")
            self._go_live(active)
            trained = tuple(part for part in active.parts if part.parameter.requires_grad)
            if trained and torch.is_grad_enabled():
                found[base.name] = live_weight(base.weight, trained, transposed=base.transposed)
        else:
            self.restore_base()
            if active.parts:
                found[base.name] = self._overlaid(active.parts)
        if active.biases:
            changes = [part.parameter for part in active.biases]
            found[f"{base.name}_bias"] = sum(changes, base.bias).to(base.bias.dtype)
        return found

    def _overlaid(self, parts: tuple[Any, ...]) -> Tensor:
        """A copy of the weight with the changes of all active adapters, differentiable in them."""
        if self._base.weight.is_meta and not parts[0].parameter.is_meta:
            raise UserError(
                f"the weight {self._base.name!r} of a {type(self._base.module).__name__} is offloaded, and RoCoFT trains and runs "
                "experts only on the device they are kept on: load the model with a device_map that keeps them in memory"
            )
        weight = self._base.matrices()
        for part in parts:
            weight = overlay(part.ops, weight, part.delta(), part.index)
        return weight.transpose(1, 2) if self._base.transposed else weight

    def _may_go_live(self, active: Active) -> bool:
        base = self._base
        return (
            active.adapters == 1
            and not self.weight_is_shared
            and not is_sharded(base.module, base.name)
            and may_change_in_place(base.weight, dimensions=3)
        )

    def _values(self) -> Tensor:
        refuse_sharded(self._base.module, self._base.name)
        return self._base.matrices(values=True)


class RocoftExperts(AttributesOfBase, BaseTunerLayer, nn.Module):
    """A module with fused experts, and beside it a `RocoftExpertWeight` for each of its weights that is trained.

    What peft asks of adapter layers those answer. This one takes the module's place in the model, and sees to it that the
    weights are W0 whenever the module's own tensors are moved, saved or loaded, which happens before it reaches the others.
    """

    of_experts = True

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer

    def add(self, weight: FusedWeight, adapter_name: str, config: RocoftConfig, name: str) -> RocoftExpertWeight:
        """Add an adapter to one weight; `name` is that of its parameter in the model."""
        layer = self._modules.get(weight.name)
        if isinstance(layer, RocoftExpertWeight):
            layer.update_layer(adapter_name, config, name)
            return layer
        layer = RocoftExpertWeight(weight, adapter_name, config, name)
        layer.training = self.base_layer.training
        setattr(self, weight.name, layer)  # add_module() refuses a name that is also found on the module beside
        return layer

    def weights(self) -> list[RocoftExpertWeight]:
        """The layers of the weights that any adapter trains."""
        return [module for module in self.children() if isinstance(module, RocoftExpertWeight)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module with the active adapters; which way it goes is decided anew at every call."""
        found: dict[str, Tensor] = {}
        for layer in self.weights():
            found |= layer.substitutes()
        y = functional_call(self.base_layer, found, args, kwargs) if found else self.base_layer(*args, **kwargs)
        self._hold_for_backward(y)
        return y

    def _hold_for_backward(self, y: Any) -> None:
        """Let the backward pass of the module find the weights as they are now (`RocoftLayer._hold`)."""
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return
        held = [(layer, layer._held()) for layer in self.weights()]

        def hold(_: Tensor) -> None:
            for layer, active in held:
                layer._hold(active)

        for output in y if isinstance(y, tuple) else (y,):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(hold)

    # --- what peft asks ------------------------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str | list[str]:
        """That of the layers beside the module."""
        return self.weights()[0].active_adapter

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: peft finds the layers beside the module and merges each."""

    def unmerge(self) -> None:
        """Nothing, as in `merge`."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module itself, with what `merge_and_unload` merges left in its weights."""
        for layer in self.weights():
            layer.restore_base()
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    # --- whatever needs W0 restores it first -----------------------------------------------------------------------------

    def _restore_base(self) -> None:
        for layer in self.weights():
            layer.restore_base()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RocoftExperts:
        self._restore_base()
        return super()._apply(fn, recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """W0 and delta, never W0 + delta and delta."""
        self._restore_base()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore_base()
        super()._load_from_state_dict(*args, **kwargs)

    def __repr__(self) -> str:
        return "rocoft." + super().__repr__()
