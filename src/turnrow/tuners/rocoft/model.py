"""The peft tuner of RoCoFT: puts the layers into a model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from turnrow.errors import UserError
from turnrow.ops.experts import fused_weights
from turnrow.tuners._dense import bare, features
from turnrow.tuners._experts import resolve_experts
from turnrow.tuners._mixed_batch import MixedBatchModel
from turnrow.tuners._names import check_named
from turnrow.tuners._quantized import is_linear, requantizer
from turnrow.tuners._quantized_model import QuantizedModelMixin
from turnrow.tuners._targets import covers_all_layers, resolve_targets
from turnrow.tuners._walk import find_experts
from turnrow.tuners.rocoft.bias import RocoftBias
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.experts import RocoftExperts
from turnrow.tuners.rocoft.layer import RocoftLayer
from turnrow.tuners.rocoft.linear import RocoftLinear
from turnrow.tuners.rocoft.parts import choose_expert_indices, choose_indices, named_modules

__all__ = ["RocoftModel"]


class RocoftModel(MixedBatchModel, QuantizedModelMixin):
    """A model of which r rows or columns of the target weights are trained (RoCoFT).

    Made by `peft.get_peft_model(model, RocoftConfig(...))`.
    """

    prefix: str = "rocoft_"
    tuner_layer_cls = RocoftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as peft declares it

    # --- before the model is touched -------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: RocoftConfig, model_config: dict) -> RocoftConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: RocoftConfig, model: nn.Module) -> None:
        all_layers = covers_all_layers(peft_config)
        targets = resolve_targets(self, peft_config, model)
        experts = resolve_experts(self, peft_config, model, all_layers=all_layers)
        _check_experts_are_free(experts, model)
        _check_linear(targets, model)
        names = [*targets, *experts]
        check_named("indices", named_modules(peft_config), names)
        if isinstance(peft_config.within, dict):
            check_named("within", peft_config.within, names)
        for name, module in targets.items():
            choose_indices(peft_config, name, *features(module))
        for name, weight in experts.items():
            choose_expert_indices(peft_config, name, weight.shape)
        with_bias: dict[str, Iterable[Any]] = {
            "none": (),
            "rocoft_only": [*targets.values(), *experts.values()],
            "all": [*model.modules(), *experts.values()],
        }
        if peft_config.bias != "none" and all(
            getattr(module, "bias", None) is None for module in with_bias[peft_config.bias]
        ):
            raise UserError(f"bias is {peft_config.bias!r}, but the model has no bias there to train; use bias='none'")

    def _check_new_adapter_config(self, config: RocoftConfig) -> None:
        """Any number of adapters may train biases: they are differences, and each has its own."""

    # --- putting the layers in ---------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in peft; with `bias="all"` the other modules that have a bias get a layer too."""
        config: Any = self.peft_config[adapter_name]
        with warnings.catch_warnings():
            # peft looks for these names among modules alone, not among fused weights
            experts = list(find_experts(model))
            if _match_any(config.rank_pattern, experts):
                warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            if _match_any(config.exclude_modules, experts):
                warnings.filterwarnings("ignore", "You have passed exclude_modules", UserWarning)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        RocoftModel.after_injection(self, model, adapter_name, config)

    @staticmethod
    def after_injection(tuner: BaseTuner, model: nn.Module, adapter_name: str, config: RocoftConfig) -> None:
        """What is done to a model besides replacing the target layers, by this tuner or a mixed one."""
        if config.bias == "all":
            _wrap_other_biases(tuner, model, adapter_name, config)
        _mark_shared_weights(model)

    def _create_and_replace(
        self,
        rocoft_config: RocoftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, RocoftLinear):
            target.update_layer(adapter_name, rocoft_config, current_key)
            return
        layer = RocoftLinear(target, adapter_name, rocoft_config, current_key, requantizer(self.model))
        _insert(self, layer, adapter_name, target, target_name, parent)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Called by peft where the config has `target_parameters`: put layers beside the modules with fused experts."""
        experts = resolve_experts(self, peft_config, model, all_layers=False)
        for name, weight in experts.items():
            module_name = name.rpartition(".")[0]
            holder = model.get_submodule(module_name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                if not isinstance(holder, RocoftExperts):
                    target, holder = holder, RocoftExperts(holder)
                    holder.add(weight, adapter_name, peft_config, name)
                    parent, _, child = module_name.rpartition(".")
                    _insert(self, holder, adapter_name, target, child, model.get_submodule(parent))
                else:
                    layer = holder.add(weight, adapter_name, peft_config, name)
                    layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        # peft 0.21 keeps the names that are returned, peft 0.20 expects them to be kept here.
        self.targeted_parameter_names += [name for name in experts if name not in self.targeted_parameter_names]
        return list(experts)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        ours = {
            id(p) for layer in _layers(model) for n in layer.adapter_layer_names for p in getattr(layer, n).values()
        }
        # modules_to_save decide for themselves.
        others = {id(p) for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper) for p in m.parameters()}
        kept = ours | others
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are made in float32; `autocast_adapter_dtype=False` asks for the dtype of the base instead."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
            return
        for layer in _layers(self.model):
            like = next(layer.get_base_layer().parameters(), None)
            if like is None or not like.is_floating_point():
                continue  # quantized: integers cannot be trained
            for name in layer.adapter_layer_names:
                parameters = getattr(layer, name)
                if adapter_name in parameters:
                    parameters[adapter_name].data = parameters[adapter_name].data.to(like.dtype)

    # --- taking the adapter off --------------------------------------------------------------------------------------

    def disable_adapter_layers(self) -> None:
        """The base model again, bit for bit; biases included, so peft's warning about them does not apply."""
        self._enable_adapter_layers(enabled=False)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        for layer in _layers(self.model):
            layer.restore_base()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    # --- saving ------------------------------------------------------------------------------------------------------

    @classmethod
    def _get_learnable_bias_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Trained biases are adapter tensors of their own (`rocoft_bias`); the base's are not saved."""
        return {}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """peft 0.21 leaves out what the model has no place for yet: make it (`reselection`)."""
        for name, layer in model.named_modules():
            if isinstance(layer, RocoftLinear):
                layer.make_room_for_settled(adapter_name, state_dict, f"{name}." if name else "")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _wrap_other_biases(tuner: BaseTuner, model: nn.Module, adapter_name: str, config: RocoftConfig) -> None:
    """Train the biases of the modules that are no targets."""
    inside = None
    for name, module in list(model.named_modules()):
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if isinstance(module, RocoftBias):
            module.update_layer(adapter_name, config)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = f"{name}."
        # HQQ has its biases as plain attributes; a buffer called bias is something else, such as GPT-2's mask
        elif isinstance(module._parameters.get("bias", vars(module).get("bias")), torch.Tensor) and name:
            parent = model.get_submodule(name.rpartition(".")[0])
            layer = RocoftBias(module, adapter_name, config)
            _insert(tuner, layer, adapter_name, module, name.rpartition(".")[2], parent)
            inside = f"{name}."


def _insert(
    tuner: BaseTuner, layer: nn.Module, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module
) -> None:
    if adapter_name not in tuner.active_adapters:
        layer.requires_grad_(False)  # an additional adapter is not trained until it is activated
    layer.training = bare(target).training  # its own alone: what it lies around is as it was
    tuner._replace_module(parent, target_name, layer, target)


def _match_any(patterns: Iterable[str] | str | None, names: list[str]) -> bool:
    """Whether any of the names or regular expressions is for one of `names`, as peft matches them."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
    return any(get_pattern_key(patterns, name) in patterns for name in names)


def _check_experts_are_free(experts: Iterable[str], model: nn.Module) -> None:
    for name in experts:
        holder: Any = model.get_submodule(name.rpartition(".")[0])
        if isinstance(holder, BaseTunerLayer) and not isinstance(holder, RocoftExperts):
            raise UserError(
                f"the experts of {name!r} have an adapter of another method, a {type(holder).__name__}; RoCoFT cannot train them "
                "beside it: leave them out of one of the two (target_parameters)"
            )


def _layers(model: nn.Module) -> list[RocoftLayer]:
    return [module for module in model.modules() if isinstance(module, RocoftLayer)]


def _check_linear(targets: dict[str, nn.Module], model: nn.Module) -> None:
    """Refuse targets that are no linear layers, or that nothing would ever call (UserError)."""
    wrong = [name for name, module in targets.items() if not is_linear(module)]
    if wrong:
        fused = [f"{wrong[0].rpartition('.')[2]}.{weight}" for weight in fused_weights(targets[wrong[0]])]
        if fused:
            raise UserError(
                f"target module {wrong[0]!r} is a {type(targets[wrong[0]]).__name__}; its fused weights are named one by one, in "
                f"target_parameters={fused}"
            )
        raise UserError(
            f"target module {wrong[0]!r} is a {type(targets[wrong[0]]).__name__}; RoCoFT trains linear layers with a dense "
            "floating-point weight (torch.nn.Linear, Conv1D) or one quantized by a package that peft knows (bitsandbytes, "
            f"torchao, HQQ and others). {len(wrong)} of {len(targets)} targets are of another kind"
        )
    for name in targets:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise UserError(
                f"target module {name!r} belongs to a torch.nn.MultiheadAttention, which reads its weight and never calls "
                "it: an adapter there would do nothing. Leave it out of target_modules"
            )


def _mark_shared_weights(model: nn.Module) -> None:
    """Tell the layers whose weight is used elsewhere in the model too (tied embeddings) not to change it in place."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for layer in _layers(model):
        weight = getattr(layer.get_base_layer(), "weight", None)
        layer.weight_is_shared = weight is not None and uses[id(weight)] > 1
