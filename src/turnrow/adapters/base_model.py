"""Load the base model that an adapter needs: the right class of transformers, in its own dtype, with the right labels.

A base that was quantized while it was loaded for training is quantized the same way again.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.quantization import quantization_config
from turnrow.errors import UserError, near_matches

__all__ = ["load_base", "load_for_task", "load_processor", "skeleton"]

_CLASS_OF_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# last layers of transformers' heads for classification
_LABEL_LAYERS = (
    "score.weight",
    "classifier.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


def load_base(adapter: AdapterFile, base: str) -> PreTrainedModel:
    """Load the model at `base` (a folder or a Hub id) as the class that `adapter` was trained on, in the checkpoint's dtype.

    Where the adapter was trained on a base that was quantized while loading, it is quantized so here too, from the same dtype.

    The class comes from the adapter's `task_type`, else from peft's `auto_mapping`, else from the base's `architectures`.
    Where the adapter brings a classifier, the number and names of the labels come from the adapter.

    Raises:
        UserError: the base cannot be read, names no class that transformers has, or the package that quantizes it is missing.
    """
    config = _base_config(adapter, base)
    how: dict[str, Any] = {"dtype": "auto", **_quantization(adapter, config)}
    # a classifier of another size than the base's own is replaced by the adapter's
    try:
        return _model_class(adapter, config).from_pretrained(
            base, config=config, ignore_mismatched_sizes=bool(adapter.saved_modules), **how
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the base model {base!r} cannot be loaded: {error}") from error


def load_for_task(location: str, task_type: str) -> PreTrainedModel:
    """Load the model at `location` (a folder or a Hub id) as the class for peft's `task_type`, in the checkpoint's dtype.

    Raises:
        UserError: the task type is unknown, or the model cannot be read.
    """
    if task_type not in _CLASS_OF_TASK:
        hint = near_matches(task_type, _CLASS_OF_TASK)
        raise UserError(f"the task type is {task_type!r}; it must be one of {', '.join(_CLASS_OF_TASK)}{hint}")
    try:
        return getattr(transformers, _CLASS_OF_TASK[task_type]).from_pretrained(location, dtype="auto")
    except (OSError, ValueError) as error:
        raise UserError(f"the model {location!r} cannot be loaded: {error}") from error


def skeleton(adapter: AdapterFile, base: str) -> PreTrainedModel:
    """Build the model at `base` without weights, on the meta device: names and shapes only.

    Raises:
        UserError: as `load_base`.
    """
    config = _base_config(adapter, base)
    model_class = _model_class(adapter, config)
    with torch.device("meta"):
        return model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)


def load_processor(source: str) -> Any | None:
    """Load the tokenizer or processor that lies with a model; None if it has none."""
    # asked first, because for a model without tokenizer files transformers makes up one with an empty vocabulary
    if not any(cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in _PROCESSOR_FILES):
        return None
    try:
        return transformers.AutoProcessor.from_pretrained(source)
    except ImportError:
        # transformers 5.6 asks for torchvision here, without which its image processors do as well.
        return AutoImageProcessor.from_pretrained(source)


def _base_config(adapter: AdapterFile, base: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(base, **_labels(adapter))
    except (OSError, ValueError) as error:
        raise UserError(f"the base model {base!r} cannot be read: {error}") from error


def _quantization(adapter: AdapterFile, config: PretrainedConfig) -> dict[str, Any]:
    """How the base was quantized, by the manifest; nothing for a checkpoint that is stored as it is quantized."""
    held = adapter.manifest["base"] if adapter.manifest else {}
    if not isinstance(held.get("quantization"), dict) or getattr(config, "quantization_config", None) is not None:
        return {}
    dtype = getattr(torch, str(held.get("dtype")), None)
    return {
        "quantization_config": quantization_config(held["quantization"]),
        "dtype": dtype if isinstance(dtype, torch.dtype) else "auto",
    }


def _labels(adapter: AdapterFile) -> dict[str, Any]:
    """Settings of the head, from the manifest or from the size of the saved classifier."""
    head = adapter.manifest["base"].get("head") if adapter.manifest else None
    if isinstance(head, dict) and isinstance(head.get("id2label"), dict):
        names = {int(number): name for number, name in head["id2label"].items()}
        return {
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "problem_type": head.get("problem_type"),
        }
    sizes = [
        len(tensor)
        for name, tensor in adapter.saved_modules.items()
        if name.endswith(_LABEL_LAYERS) and tensor.ndim == 2
    ]
    return {"num_labels": sizes[0]} if sizes else {}


def _model_class(adapter: AdapterFile, config: PretrainedConfig) -> Any:
    task = adapter.config.get("task_type")
    if task == "CAUSAL_LM" and _reads_images(config):
        return transformers.AutoModelForImageTextToText
    if task in _CLASS_OF_TASK:
        return getattr(transformers, _CLASS_OF_TASK[task])
    mapping = adapter.config.get("auto_mapping") or {}
    names = [mapping.get("base_model_class"), *(config.architectures or [])]
    for name in names:
        found = getattr(transformers, str(name), None)
        # a name out of a file may choose among transformers' models, nothing else
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise UserError(
        f"{adapter.path} says no task_type, and the base names no model class of transformers (found {names}): "
        f"set task_type in its adapter_config.json to one of {', '.join(_CLASS_OF_TASK)}"
    )


def _reads_images(config: PretrainedConfig) -> bool:
    """Whether it is a model of images and texts, which is a causal language model to peft and not to transformers."""
    return (
        type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    )
