"""Methods by name: RoCoFT and RoAd, any other method that peft knows, the whole model, its biases, or only its new head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from turnrow.errors import UserError, near_matches
from turnrow.training.base import Base, head_modules
from turnrow.training.options import check_names, check_options
from turnrow.training.skeleton import Skeleton

__all__ = ["apply_method", "check_method", "has_biases", "method_config", "method_names", "method_title"]

_RESERVED = {
    "peft_type": "the method's name decides it",
    "task_type": "the task decides it",
    "base_model_name_or_path": "the recipe's model decides it",
    "inference_mode": "a run trains",
    "auto_mapping": "peft fills it in",
    "peft_version": "peft fills it in",
    "revision": "the recipe's model decides it",
}


# Trained without a config of peft's own: they have no options.
_PLAIN = ("full", "head", "bitfit")

_UNFIT = {
    "adaption_prompt": "what it saves cannot be told from what is trained whole, so it could not be checked on loading",
    "cpt": "it begins with the tokens of chosen training rows and the kind of each, which a recipe does not hold",
    "multitask_prompt_tuning": "every row would have to say which task it belongs to",
    "poly": "every row would have to say which task it belongs to",
    "xlora": "it mixes adapters that were trained before",
}
"""Methods of peft that a run cannot train, save and load, and why."""


def method_names() -> list[str]:
    """Names for ``method.name``: ours first, then every other method of the installed peft."""
    ours = ["rocoft", "road", *_PLAIN, "lora_fa"]
    return ours + sorted(set(_config_classes()) - {*ours, *_UNFIT})


def check_method(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return `method` with its values converted to the types of the method's config.

    Raises:
        UserError: no or unknown name, a field that the method does not have, or a value that its config refuses.
    """
    if "name" not in method:
        raise UserError("method has no name; say for example method: {name: rocoft, mode: row, r: 3}")
    name, options = method["name"], {key: value for key, value in method.items() if key != "name"}
    if name in _PLAIN:
        if options:
            check_names(options, ["name"], f"method {name}")
        return {"name": name}
    if name in _UNFIT:
        raise UserError(f"method {name} cannot be trained by a recipe: {_UNFIT[name]}; choose another method of peft")
    if name not in (*_config_classes(), "lora_fa"):
        hint = near_matches(str(name), method_names()) or f"; allowed: {', '.join(method_names())}"
        raise UserError(f"there is no method {name!r}{hint}")
    options = check_options(options, _config_class(name), f"method {name}", reserved=_RESERVED)
    _config(name, options)
    return {"name": name, **options}


def apply_method(
    base: Base | Skeleton, method: Mapping[str, Any], peft_task_type: str | None
) -> PreTrainedModel | PeftModel:
    """Make a base trainable by `method`; trained parameters are float32.

    The head and modules that the pretrained weights did not hold are trained and saved whatever the method, since the
    adapter could not be used without them.

    Args:
        base: its model is changed in place.
        method: as returned by `check_method`.
        peft_task_type: such as ``"SEQ_CLS"``; None where peft has no name for it.

    Returns:
        A `peft.PeftModel`, or the base's own model for the method ``full``.
    """
    name, options = method["name"], {key: value for key, value in method.items() if key != "name"}
    if name == "full":
        return base.model.float().requires_grad_(True)
    if name in ("head", "bitfit"):
        # peft's own form of an adapter that has no target: only modules_to_save, and biases, are trained and saved.
        biases: Literal["all", "none"] = "none"
        if name == "bitfit":
            if not has_biases(base.model, but=head_modules(base.model, base.new_modules)):
                raise UserError(
                    f"method bitfit: this {type(base.model).__name__} has no biases outside its head; choose another method, such as rocoft"
                )
            biases = "all"
        config: PeftConfig = LoraConfig(target_modules=DUMMY_TARGET_MODULES, bias=biases)
    else:
        config = _config(name, options)
    if peft_task_type is None and config.is_prompt_learning:
        raise UserError(
            f"method {name}: peft has no such model for the task of this recipe, as it puts virtual tokens into models that it knows; "
            "choose a method that changes layers, such as rocoft or lora"
        )
    if peft_task_type == "QUESTION_ANS" and name in ("prompt_tuning", "p_tuning"):
        raise UserError(
            f"method {name}: peft puts its virtual tokens before the text and leaves the places of the answers where they were, so a "
            "run would learn to point beside them; choose prefix_tuning, or a method that changes layers, such as rocoft or lora"
        )
    config.task_type = peft_task_type
    if hasattr(config, "modules_to_save"):
        # For SEQ_CLS peft adds the head by itself and keeps it out of 'all-linear'; for other tasks only what is named
        # here stays out.
        _check_saved(name, config.modules_to_save or [], base.model)
        added = ("classifier", "score") if peft_task_type == "SEQ_CLS" else ()
        whole = [name for name in head_modules(base.model, base.new_modules) if name not in added]
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *whole])) or None
    elif not config.is_prompt_learning and base.new_modules:
        raise UserError(
            f"method {name}: peft's {type(config).__name__} saves no whole module, and {base.new_modules[0]!r} is new to this base: the "
            "adapter could not be used without it; choose a base that has it, or another method"
        )
    try:
        adapted = get_peft_model(base.model, config)
    except UserError:
        raise
    except (
        ValueError,
        TypeError,
        AttributeError,
        re.error,
    ) as error:  # how peft says that a method does not fit the model
        raise UserError(f"method {name}: {error}") from error
    if hasattr(config, "modules_to_save") and config.modules_to_save:
        # peft adds the head for questions once more.
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    for key, parameter in adapted.named_parameters():
        if name == "lora_fa" and ".lora_A." in key:
            parameter.requires_grad_(False)  # Zhang et al. 2023, LoRA-FA: A stays as it was drawn
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return adapted


def has_biases(model: nn.Module, *, but: Iterable[str] = ()) -> bool:
    """Whether a model has parameters that BitFit trains outside of some modules: what peft takes for biases."""
    heads = tuple(f"{name}." for name in but)
    return any("bias" in name and not name.startswith(heads) for name, _ in model.named_parameters())


def _check_saved(method: str, wanted: Iterable[str], model: PreTrainedModel) -> None:
    """Refuse names of modules to save that fit no module; peft would leave them in the adapter without a word."""
    modules = [name for name, _ in model.named_modules()]
    for name in wanted:
        if not any(module.endswith(name) for module in modules):
            last = dict.fromkeys(module.rpartition(".")[2] for module in modules)
            raise UserError(
                f"method {method}: modules_to_save names {name!r}, and no module of this {type(model).__name__} ends like that"
                f"{near_matches(name, last)}"
            )


def method_config(method: Mapping[str, Any]) -> PeftConfig | None:
    """The config that peft would get for `method`; None for ``full``, ``head`` and ``bitfit``, which are no methods of peft."""
    options = {key: value for key, value in method.items() if key != "name"}
    return None if method["name"] in _PLAIN else _config(method["name"], options)


def method_title(method: Mapping[str, Any]) -> str:
    """A short name of a `method` section, such as ``"rocoft row r=3"`` or ``"rocoft column r=1, wanda_max, biases"``."""
    config: Any = method_config(method)
    name = str(method["name"])
    if name == "rocoft":
        biases = "" if config.bias == "none" else ", biases"
        if config.indices is not None:
            return f"rocoft {config.mode} of given indices{biases}"
        size = f"density={config.density}" if config.mode == "entry" else f"r={config.r}"
        return f"rocoft {config.mode} {size}{'' if config.selection == 'first' else f', {config.selection}'}{biases}"
    if name == "road":
        return f"road {config.variant}"
    rank = getattr(config, "r", None)
    return f"{name} r={rank}" if rank else name


def _config_classes() -> dict[str, type[PeftConfig]]:
    # Keys are members of a str enum, or plain strings for methods registered from outside, as ours is.
    return {str(getattr(kind, "value", kind)).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _config_class(name: str) -> type[PeftConfig]:
    return LoraConfig if name == "lora_fa" else _config_classes()[name]


def _config(name: str, options: Mapping[str, Any]) -> PeftConfig:
    try:
        return _config_class(name)(**options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"method {name}: {error}") from error
