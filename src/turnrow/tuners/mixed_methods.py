"""RoCoFT and RoAd beside other methods in one model: peft's mixed models, told about our layers.

The RoAd paper's RoAd + LoRA, z = (R W0 + B A) x, is RoAd put in first and LoRA around it:

    model = get_peft_model(base, RoadConfig(...), adapter_name="turn", mixed=True)
    model.add_adapter("sum", LoraConfig(...))
    model.set_adapter(["turn", "sum"])

A method that is added later wraps the layers of the earlier ones; RoAd around LoRA turns the output of both.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftConfig, RoadConfig
from peft.tuners.mixed.model import MixedModel as PeftMixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from turnrow.errors import UserError
from turnrow.tuners._mixed_batch import MixedBatchModel
from turnrow.tuners._quantized_model import QuantizedModelMixin, warn_of_merge_costs
from turnrow.tuners.road.layer import RoadLinear
from turnrow.tuners.road.model import RoadModel
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.layer import RocoftLayer
from turnrow.tuners.rocoft.model import RocoftModel

__all__ = ["MixedModel"]

_TUNERS: dict[type[PeftConfig], type[BaseTuner]] = {RocoftConfig: RocoftModel, RoadConfig: RoadModel}


class MixedModel(MixedBatchModel, QuantizedModelMixin, PeftMixedModel):
    """peft's model of several methods, with ours among them.

    Where layers lie around each other, merging goes from the inside out and unmerging back: only so does each find the
    weight as it left it.
    """

    # --- running ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The model with the active adapters; `adapter_names` gives each sample one of its own, of whatever method."""
        with self._enable_peft_forward_hooks(*args, adapter_names=adapter_names, **kwargs):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """As the base model's, with the active adapters or those of `adapter_names`."""
        with self._enable_peft_forward_hooks(*args, adapter_names=adapter_names, **kwargs):
            model: Any = self.model
            return model.generate(*args, **kwargs)

    # --- putting the layers in -------------------------------------------------------------------------------------

    def _check_new_adapter_config(self, config: Any) -> None:
        if _tuner(config) is None:
            super()._check_new_adapter_config(config)

    @staticmethod
    def _prepare_adapter_config(peft_config: Any, model_config: dict) -> Any:
        if _tuner(peft_config) is None:
            return PeftMixedModel._prepare_adapter_config(peft_config, model_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        tuner: Any = _tuner(peft_config) or PeftMixedModel
        tuner._prepare_model(self, peft_config, model)
        if isinstance(peft_config, RocoftConfig) and peft_config.target_parameters:
            raise UserError(
                f"a mixed model cannot train fused experts, and target_parameters are {peft_config.target_parameters}: pass "
                "target_parameters=[]"
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in peft, and what RoCoFT does to a model besides replacing its layers."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        if isinstance(config, RocoftConfig):
            RocoftModel.after_injection(self, model, adapter_name, config)

    def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:
        tuner: Any = _tuner(config)
        if tuner is None:
            super()._create_and_replace(config, *args, **kwargs)
        else:
            tuner._create_and_replace(self, config, *args, **kwargs)

    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        tuner: Any = _tuner(config) or PeftMixedModel
        return tuner._create_new_module(config, adapter_name, target, **kwargs)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # peft would make the base's own biases trainable; RoCoFT's are differences of the adapter.
        ours = [config for config in self.peft_config.values() if isinstance(config, RocoftConfig)]
        biases = [config.bias for config in ours]
        try:
            for config in ours:
                config.bias = "none"
            super()._mark_only_adapters_as_trainable(model)
        finally:
            for config, bias in zip(ours, biases, strict=True):
                config.bias = bias

    # --- switching, merging, taking off ----------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in peft, for our layers too."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for layer in self._layers():
            if isinstance(layer, (RocoftLayer, RoadLinear)):
                if layer.merged:
                    warnings.warn(
                        "Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2
                    )
                    layer.unmerge()
                layer.set_adapter(adapter_name, inference_mode=inference_mode)

    def disable_adapter_layers(self) -> None:
        """As in peft, without its warning where the only trained biases are RoCoFT's, which come off too."""
        with warnings.catch_warnings():
            if not any(getattr(c, "bias", "none") != "none" for c in self.peft_config.values() if _tuner(c) is None):
                warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
            super().disable_adapter_layers()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft, the innermost layers first."""
        self._check_merge_allowed()
        self._restore_base()
        for layer in reversed(self._layers()):
            layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)
        warn_of_merge_costs(self._layers_with_weights())

    def unmerge_adapter(self) -> None:
        """As in peft, the outermost layers first."""
        for layer in self._layers():
            layer.unmerge()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._restore_base()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _restore_base(self) -> None:
        """No layer may change a weight that a RoCoFT layer inside it holds live."""
        for layer in self._layers():
            if isinstance(layer, RocoftLayer):
                layer.restore_base()

    def _layers(self) -> list[BaseTunerLayer]:
        """Outermost first, as modules are listed."""
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]


def _tuner(config: PeftConfig) -> type[BaseTuner] | None:
    """Our tuner for a config; None for a method of peft's own."""
    return next((tuner for kind, tuner in _TUNERS.items() if isinstance(config, kind)), None)
