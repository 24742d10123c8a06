"""`turnrow.json`, the manifest beside an adapter: what the file must be, which base it was trained on, where it comes from.

    format_version   1; a reader refuses a newer one
    versions         of turnrow, peft, transformers and torch at writing
    files            size in bytes and SHA-256 of adapter_model.safetensors
    base             name, class, dtype, how it is quantized, label names and, module by module, the fingerprint of the
                     original weight
    provenance       whatever the writer adds (recipe, metrics), JSON values; recipe_sha256 is added to a recipe

An adapter without a manifest, from stock peft for instance, is read all the same; it only cannot be checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from turnrow.adapters.fingerprint import WeightPrint, fingerprint
from turnrow.adapters.folder import (
    WEIGHTS_NAME,
    adapter_folder,
    read_config,
    read_json_object,
    read_tensors,
    split_by_module,
)
from turnrow.adapters.quantization import describe_quantization
from turnrow.errors import AdapterError, UserError
from turnrow.files import write_text

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "describe_base",
    "read_manifest",
    "recipe_sha256",
    "store_manifest",
    "verify_weights_file",
    "weight_prints",
    "write_manifest",
]

MANIFEST_NAME = "turnrow.json"
FORMAT_VERSION = 1

_PLACES = (("model",), ("data", "train"), ("data", "validation"), ("data", "test"), ("method", "indices"))
"""Where a recipe names files or folders."""
_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")


def write_manifest(path: str | os.PathLike[str], model: PeftModel, **provenance: Any) -> Path:
    """Write ``turnrow.json`` into the folder of an adapter that was just saved from `model`.

    The fingerprint is that of the original base. A RoCoFT layer holds W0 + delta in the base weight while it is active,
    so the adapters are taken off while the weights are read (which is bit-exact) and put back afterwards.

    Args:
        path: the folder that ``model.save_pretrained`` wrote.
        model: the model with the adapter, not merged.
        provenance: JSON values to keep with the adapter, e.g. ``recipe={...}, metrics={...}``.

    Returns:
        The path of the manifest.

    Raises:
        UserError: `model` is no PeftModel, an adapter is merged into it, it lacks a module of the adapter file, or a
            provenance value cannot be written as JSON.
    """
    folder = adapter_folder(path)
    if not isinstance(model, PeftModel):
        raise UserError(f"write_manifest needs the PeftModel that was saved to {folder}, got {type(model).__name__}")
    tensors = split_by_module(read_config(folder)["peft_type"], read_tensors(folder))
    base = model.get_base_model()
    with _original_weights(model):
        layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
        _check_unmerged_and_complete(folder, layers, tensors.modules)
        prints = {
            name: fingerprint(layer.get_base_layer(), tensors.modules[name])
            for name, layer in layers.items()
            if name in tensors.modules
        }
    described = describe_base(base, has_head=bool(tensors.saved))
    return store_manifest(folder, described, {k: v for k, v in prints.items() if v is not None}, provenance)


def store_manifest(
    folder: Path, base: Mapping[str, Any], prints: Mapping[str, WeightPrint], provenance: Mapping[str, Any]
) -> Path:
    """Write ``turnrow.json`` for the weights file in `folder`; return its path.

    Args:
        base: what is known of the base beside its fingerprints.
        prints: fingerprints of the base by module.
        provenance: JSON values; with a ``recipe`` its `recipe_sha256` is written too.

    Raises:
        UserError: a provenance value cannot be written as JSON.
    """
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "versions": _versions(),
        "files": {WEIGHTS_NAME: _file_record(folder / WEIGHTS_NAME)},
        "base": {**base, "modules": {name: print_.to_dict() for name, print_ in prints.items()}},
        "provenance": dict(provenance),
    }
    try:
        if isinstance(provenance.get("recipe"), Mapping):
            manifest["provenance"]["recipe_sha256"] = recipe_sha256(provenance["recipe"])
        text = json.dumps(manifest, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the provenance {sorted(provenance)} cannot be written as JSON: {error}") from error
    write_text(folder / MANIFEST_NAME, text + "\n")
    return folder / MANIFEST_NAME


def recipe_sha256(recipe: Mapping[str, Any]) -> str:
    """The SHA-256 of a recipe, in hexadecimal: equal for two adapters that were made by the same recipe, wherever that was.

    It is that of the recipe's canonical JSON: keys sorted, no spaces, ASCII, whole numbers without a decimal point. Not part of it are
    fields that are null, as if they were left out (so that a field which a later turnrow adds changes nothing), ``output_dir``, and the
    folders of files: of a path only its last name counts. A Hub id, ``owner/name``, counts whole, and so does a relative folder that
    looks like one. What is in the files is not looked at.

    Raises:
        TypeError, ValueError: it is not made of JSON values.
    """
    values = json.loads(json.dumps(dict(recipe), allow_nan=False))  # texts for keys, lists for tuples
    values.pop("output_dir", None)
    for *sections, name in _PLACES:
        holder = values
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(name), str):
            holder[name] = _without_folder(holder[name])
    text = json.dumps(_canonical(values), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _without_folder(place: str) -> str:
    """The last name of a path, whichever system wrote it; anything else as it is."""
    path = PureWindowsPath(place)  # knows both kinds of slashes
    is_hub_id = place.count("/") < 2 and "\\" not in place and not place.startswith(("/", ".", "~"))
    return place if is_hub_id and not place.endswith(_FILE_ENDINGS) else path.name or place


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read and check the manifest of an adapter folder; None if there is none.

    Raises:
        AdapterError: it is not JSON, lacks a part, or has a newer format version than this turnrow reads.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    manifest = read_json_object(path)
    found = manifest.get("format_version")
    if not isinstance(found, int) or found < 1:
        raise AdapterError(f"{path}: format_version is {found!r}, a whole number from 1 to {FORMAT_VERSION} is needed")
    if found > FORMAT_VERSION:
        writer = manifest.get("versions")
        by = f" by turnrow {writer['turnrow']}" if isinstance(writer, dict) and "turnrow" in writer else ""
        raise AdapterError(
            f"{path} was written in format {found}{by}, this turnrow reads up to {FORMAT_VERSION}: upgrade turnrow"
        )
    for part in ("versions", "files", "base", "provenance"):
        if not isinstance(manifest.get(part), dict):
            raise AdapterError(f"{path} is damaged: {part!r} is missing or no object")
    if not isinstance(manifest["base"].get("modules"), dict):
        raise AdapterError(f"{path} is damaged: 'base.modules' is missing or no object")
    record = manifest["files"].get(WEIGHTS_NAME)
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("sha256"), str)
        or not isinstance(record.get("bytes"), int)
    ):
        raise AdapterError(f"{path} is damaged: 'files' has no size and sha256 of {WEIGHTS_NAME}")
    weight_prints(manifest, path)
    return manifest


def weight_prints(manifest: Mapping[str, Any], path: Path) -> dict[str, WeightPrint]:
    """Return the fingerprints in a manifest by module; `path` is named when one is damaged (AdapterError)."""
    entries = manifest["base"]["modules"].items()
    return {name: WeightPrint.from_dict(value, f"{path}: the fingerprint of {name!r}") for name, value in entries}


def verify_weights_file(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the weights file with size and SHA-256 in the manifest.

    Raises:
        AdapterError: it is shorter (truncated), longer, or its contents were altered. A missing file is left to the reader.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        return
    expected = manifest["files"][WEIGHTS_NAME]
    size = path.stat().st_size
    if size != expected["bytes"]:
        what = "truncated" if size < expected["bytes"] else "altered"
        raise AdapterError(
            f"{path} is {what}: it has {size:,} bytes, {MANIFEST_NAME} recorded {expected['bytes']:,}. Copy the adapter again"
        )
    found = _sha256(path)
    if found != expected["sha256"]:
        raise AdapterError(
            f"{path} was altered: its SHA-256 is {found[:12]}..., {MANIFEST_NAME} recorded {expected['sha256'][:12]}.... "
            f"Copy the adapter again; if you changed the file yourself, delete {MANIFEST_NAME} (and with it the check of the base)"
        )


@contextmanager
def _original_weights(model: PeftModel) -> Iterator[None]:
    """Take the adapters off inside the block. peft puts them back as trainable, also where they were not: undo that."""
    if model.active_peft_config.is_prompt_learning:
        yield  # prompts lie beside the weights, and peft cannot take them off a model that does not generate
        return
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with warnings.catch_warnings():
            # That trained biases stay: what is described are the weights of the adapted layers.
            warnings.filterwarnings(
                "ignore", message="Careful, disabling adapter layers with bias", category=UserWarning
            )
            with model.disable_adapter():
                yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _check_unmerged_and_complete(
    folder: Path, layers: Mapping[str, BaseTunerLayer], modules: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    merged = next((name for name, layer in layers.items() if layer.merged), None)
    if merged is not None:
        raise AdapterError(
            f"module {merged!r} has an adapter merged into it, so its original weight is not at hand: unmerge first"
        )
    missing = next((name for name in modules if name not in layers), None)
    if missing is not None:
        raise AdapterError(
            f"the adapter in {folder} adapts {missing!r}, which this model does not: was it saved from another model?"
        )


def describe_base(base: torch.nn.Module, *, has_head: bool) -> dict[str, Any]:
    """Name, class and dtype of the base, and the label names where the adapter brings its own head."""
    config = getattr(base, "config", None)
    weight = next((parameter for parameter in base.parameters() if parameter.is_floating_point()), None)
    described: dict[str, Any] = {
        "name_or_path": getattr(config, "_name_or_path", None) or None,
        "class": type(base).__name__,
        "dtype": None if weight is None else str(weight.dtype).removeprefix("torch."),
    }
    quantization = describe_quantization(base)
    if quantization is not None:
        described["quantization"] = quantization
    if has_head and config is not None and getattr(config, "id2label", None):
        described["head"] = {"id2label": config.id2label, "problem_type": getattr(config, "problem_type", None)}
    return described


def _versions() -> dict[str, str]:
    found = {}
    for name in ("turnrow", "peft", "transformers", "torch"):
        # a source tree on the path is not installed and has no version on record
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _file_record(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
