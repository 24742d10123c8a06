"""The frozen base model: where it lies, that it is what it claims to be, and how it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils.quantization_config import QuantizationConfigMixin

from turnrow.errors import UserError, near_matches
from turnrow.pretrained import plain_errors, resolve_model, without_load_report
from turnrow.tasks import Task, need_pillow, ready_to_pad, resolve_max_length, tokenizer_of
from turnrow.training.loss import use_loss_of
from turnrow.training.quantization import (
    make_quantization,
    plain_conversion_errors,
    prepare_quantized,
    quantized_among,
    spare,
)

__all__ = [
    "Base",
    "checked_config",
    "head_modules",
    "input_limit",
    "keep_float32",
    "load_base",
    "load_model",
    "load_tokenizer",
    "position_limit",
    "prediction_limit",
    "whole_modules",
]

# What transformers calls the heads for sequences, images and questions: trained whole, be they new or not.
_HEADS = ("classifier", "score", "qa_outputs")

# The classes whose heads come with the weights; a new one would have to learn a language from the rows of a task.
_LANGUAGE_MODELS = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
)


@dataclass(frozen=True)
class Base:
    """A loaded base model."""

    model: PreTrainedModel
    tokenizer: Any
    """What `Task.preparer` names: a tokenizer, an image processor, or a processor of both."""
    new_modules: tuple[str, ...]
    """Modules that the pretrained weights did not hold, such as a new classifier."""


def load_tokenizer(location: str, preparer: str = "AutoTokenizer") -> Any:
    """The tokenizer, or processor, in a folder or of a hub id; a tokenizer has a padding token.

    Args:
        location: the folder or hub id.
        preparer: as in `Task.preparer`.
    """
    if preparer == "AutoTokenizer":
        with plain_errors(location), without_load_report():
            return ready_to_pad(AutoTokenizer.from_pretrained(location))
    need_pillow()
    # Not by way of transformers itself, whose 5.6 asks for torchvision there, without which its image processors do as well.
    auto = AutoImageProcessor if preparer == "AutoImageProcessor" else getattr(transformers, preparer)
    with plain_errors(location), without_load_report():
        loaded = auto.from_pretrained(location)
    if (tokenizer := tokenizer_of(loaded)) is not None:
        ready_to_pad(tokenizer)
    return loaded


def load_base(
    name: str,
    task: Task,
    *,
    dtype: str = "float32",
    quantization: str | Mapping[str, Any] | None = None,
    device_map: Any = None,
    model_config: Mapping[str, Any] | None = None,
    adapted: bool = False,
) -> Base:
    """Load a base model for a task; its head, which is trained, is float32 whatever `dtype`.

    Args:
        name: as in `Recipe.model`.
        task: fitted, so that it knows for example the number of labels.
        dtype: of the frozen weights.
        quantization: as in `Recipe.quantization`. Modules that are trained whole are never quantized.
        device_map: as in `Recipe.device_map`.
        model_config: as in `Recipe.model_config`.
        adapted: an adapter is put on it that was trained before, and holds what the weights lack.

    Raises:
        UserError: no such model; its config has no such field; it cannot be quantized so, or not trained on; `device_map` leaves weights on the disk, or
            in the memory of the host while the model runs on a GPU, where no gradient reaches them; or it is no language model
            where the task wants one, or none that reads from left to right.
    """
    location = resolve_model(name)
    tokenizer = load_tokenizer(location, task.preparer)
    config = make_quantization(quantization, getattr(torch, dtype))
    changes = checked_config(name, location, model_config or {})
    settings = {"dtype": dtype, "device_map": device_map, **task.model_kwargs(), **changes}
    model, new_modules = load_model(name, location, task.auto_model, quantization=config, **settings)
    heads = head_modules(model, new_modules)
    if getattr(model, "hf_quantizer", None) is not None:  # by the recipe, or because it was saved like that
        if config is not None and (taken := quantized_among(model, heads)):
            spared = spare(config, model, taken)
            model, new_modules = load_model(name, location, task.auto_model, quantization=spared, **settings)
        prepare_quantized(model)
    _refuse_offloaded(model, device_map)
    if task.auto_model in _LANGUAGE_MODELS and new_modules and not adapted:
        raise UserError(
            f"model {name!r} has no weights for {', '.join(new_modules)}, so that this part of {type(model).__name__} would be new and "
            f"untrained, and the task {task.name!r} is for language models; take a model that was saved as one"
        )
    if task.auto_model == "AutoModelForCausalLM" and _reads_ahead(model):
        remedy = " or set model_config: {is_decoder: true}" if hasattr(model.config, "is_decoder") else ""
        raise UserError(
            f"model {name!r} is no decoder: as {type(model).__name__} it reads the tokens that it is to foresee, so the task "
            f"{task.name!r} would learn and score nothing; take a decoder, such as a Llama{remedy}"
        )
    text = tokenizer_of(tokenizer)
    if text is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = text.pad_token_id
    for module_name in heads:
        keep_float32(model.get_submodule(module_name))
        if task.start is not None and module_name in new_modules:
            _start_at(model.get_submodule(module_name), task.start)
    use_loss_of(task, model)
    return Base(model, tokenizer, new_modules)


def _reads_ahead(model: PreTrainedModel) -> bool:
    """Whether what the model says at the first place depends on the token at the last: d logits(first) / d embedding(last) != 0.

    Of a decoder that is exactly zero in whatever dtype, since its attention there is. No config says it of all models. A model that
    cannot be asked like this, such as one whose weights other processes hold, counts as a decoder.
    """
    embedding = model.get_input_embeddings()
    read: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        read.append(output.detach().requires_grad_())
        return read[-1].clone()  # some models write into it

    hook = embedding.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            tokens = torch.arange(3, device=next(embedding.parameters()).device)[None]
            first = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0, 0]
            (moved,) = torch.autograd.grad(first.float().square().sum(), read[:1])
        return bool((moved[0, -1].isfinite() & (moved[0, -1] != 0)).any())
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return False
    finally:
        hook.remove()


def _start_at(new: torch.nn.Module, value: float) -> None:
    """Let a new head of one output answer about `value`. One without a bias stays as it is, and so does a new module that is no head."""
    for layer in new.modules():
        if isinstance(layer, torch.nn.Linear) and layer.out_features == 1 and layer.bias is not None:
            torch.nn.init.constant_(layer.bias, value)


def checked_config(name: str, location: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `changes`, after a look whether the config of the model `name` in `location` has such fields (UserError)."""
    if changes:
        with plain_errors(name):
            config = AutoConfig.from_pretrained(location)
        known = [field for field in config.to_dict() if not field.startswith("_")]
        for field in changes:
            # Some fields go by more than one name.
            if field not in known and not hasattr(config, field):
                raise UserError(
                    f"model_config: the config of {name!r} has no field {field!r}{near_matches(field, known)}"
                )
    return dict(changes)


def load_model(
    name: str,
    location: str,
    auto_model: str,
    *,
    dtype: str,
    quantization: QuantizationConfigMixin | None = None,
    **how: Any,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model by transformers' class `auto_model`, and the modules that its weights did not hold.

    Args:
        name: of the model, for errors.
        location: as `resolve_model` returned it.
        auto_model: as in `Task.auto_model`.
        dtype: of the weights.
        quantization: as `make_quantization` returned it.
        how: further arguments of `from_pretrained`.

    Raises:
        UserError: it cannot be had, or not be quantized so; or its class has other names for its weights.
    """
    if quantization is not None:
        how["quantization_config"] = quantization
    with plain_errors(name), plain_conversion_errors(name, quantization), without_load_report():
        model, loaded = getattr(transformers, auto_model).from_pretrained(
            location,
            dtype=getattr(torch, dtype),
            # A base that was fine-tuned for another number of labels gets a new head.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **how,
        )
    absent = {*loaded["missing_keys"], *(entry[0] for entry in loaded["mismatched_keys"])}
    if absent.issuperset(parameter for parameter, _ in model.named_parameters()):
        raise UserError(
            f"model {name!r} cannot be loaded as {type(model).__name__}: none of its weights belongs to a layer of that class, so "
            "all would be new and untrained; take a model of another architecture, or one that was saved by this class"
        )
    return model, whole_modules(model, absent)


def _refuse_offloaded(model: PreTrainedModel, device_map: Any) -> None:
    away = next((key for key, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise UserError(
            f"device_map is {device_map!r}, which offloads {away!r} from the device that computes; training needs every "
            "weight there: name devices with enough memory, or take a smaller dtype"
        )


def input_limit(max_length: int | None, base: Base) -> int | None:
    """The longest input in tokens: what the recipe says, else what the tokenizer and the model's positions allow; None of images.

    Raises:
        UserError: `max_length` exceeds the positions that the model has, or there are no tokens to be counted.
    """
    tokenizer = tokenizer_of(base.tokenizer)
    if tokenizer is None:
        if max_length is not None:
            raise UserError(
                f"max_length is {max_length}, but the task reads images alone, which have no tokens; leave it out"
            )
        return None
    positions = position_limit(base.model)
    limit = resolve_max_length(tokenizer, max_length)
    if positions is None or limit <= positions:
        return limit
    if max_length is not None:
        raise UserError(
            f"max_length is {max_length}, but the model has {positions} positions; give at most {positions}"
        )
    return positions


def prediction_limit(task: Task, limit: int | None, model: Any) -> int | None:
    """The `limit` of `input_limit` for what is predicted, which the model may go on with; UserError where that leaves no prompt."""
    return None if limit is None else task.prediction_length(limit, position_limit(model))


def position_limit(model: Any) -> int | None:
    """How many positions the model has; None if its config does not say."""
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
    ]
    if not tables:
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa counts positions from the one after the padding index.
    return min(t.num_embeddings - (0 if t.padding_idx is None else t.padding_idx + 1) for t in tables)


def head_modules(model: PreTrainedModel, new_modules: Iterable[str]) -> list[str]:
    """The names of the modules that are trained whole: the new ones, and the head."""
    wanted = {*new_modules, *_HEADS}
    return [name for name, _ in model.named_modules() if name in wanted]


def whole_modules(model: PreTrainedModel, absent: set[str]) -> tuple[str, ...]:
    """The largest modules all of whose parameters are in `absent`."""
    names = [name for name, _ in model.named_parameters()]

    def largest(name: str) -> str:
        module = name.rpartition(".")[0]
        while (parent := module.rpartition(".")[0]) and all(n in absent for n in names if n.startswith(f"{parent}.")):
            module = parent
        return module

    return tuple(dict.fromkeys(largest(name) for name in names if name in absent))


def keep_float32(module: torch.nn.Module) -> None:
    """Put a module into float32, and what it is handed too."""
    module.float()

    def match_input(module: torch.nn.Module, args: tuple) -> tuple:
        return tuple(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)

    # The base hands over its own dtype. A hook on the module is copied along when peft copies the module.
    module.register_forward_pre_hook(match_input)
