"""Write what came of an operation: an adapter that knows its base, its sources, and whose classifier it has."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.algebra.agreement import same_tensors
from turnrow.adapters.algebra.road import Rotation, road_adapter
from turnrow.adapters.derived import write_derived_adapter
from turnrow.adapters.fingerprint import WeightPrint
from turnrow.adapters.folder import KEY_PREFIX, WEIGHTS_NAME
from turnrow.errors import UserError
from turnrow.ops.union import Overlap

__all__ = ["Composition", "PathLike", "Saved", "write_result", "write_road"]

PathLike = str | os.PathLike[str]

Saved = tuple[dict[str, Tensor], list[str] | None]
"""Modules trained whole that the result has, and the `modules_to_save` of its configuration."""


@dataclass(frozen=True)
class Composition:
    """What an operation has written."""

    path: Path
    """The folder of the new adapter."""
    method: str
    """``ROCOFT`` or ``ROAD``."""
    modules: int
    """How many modules it adapts."""
    overlaps: dict[str, Overlap]
    """By module: what more than one of the adapters changed, and was combined (RoCoFT). Modules without are left out."""
    saved_modules: list[str]
    """Parameters that it holds whole."""


def write_road(
    adapters: Sequence[AdapterFile],
    out: PathLike,
    record: Mapping[str, Any],
    saved: Saved,
    combined: Mapping[str, Rotation],
) -> Composition:
    """Write rotations of one variant and pairing as an adapter; see `write_result`."""
    config, modules = road_adapter(combined, [tensors for adapter in adapters for tensors in adapter.modules.values()])
    write_result(adapters, out, modules, config, record, saved)
    return Composition(Path(out), "ROAD", len(modules), {}, sorted(saved[0]))


_OF_TRAINING = ("blocks", "train", "within")
"""Settings that say what of every layer one adapter was to train; together they may hold all of it."""


def write_result(
    adapters: Sequence[AdapterFile],
    out: PathLike,
    modules: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    saved: Saved,
) -> None:
    """Write the tensors of `modules` as an adapter made of `adapters`.

    Args:
        adapters: the sources. Their bases are the result's, and the configuration of the first is, but for `config`.
        out: a new or empty folder.
        record: what was done, for the provenance.
        saved: modules trained whole.

    Raises:
        UserError: `out` is not empty; a value is not finite.
    """
    tensors = {f"{KEY_PREFIX}{name}": tensor for name, tensor in saved[0].items()}
    tensors |= {f"{KEY_PREFIX}{name}.{key}": tensor for name, own in modules.items() for key, tensor in own.items()}
    bad = next((key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"the result overflows: {bad} has values that are not finite in {tensors[bad].dtype}")
    first = {name: value for name, value in adapters[0].config.items() if name not in _OF_TRAINING}
    whole = first | dict(config) | {"modules_to_save": saved[1], "inference_mode": True}
    known = next((a for a in adapters if a.manifest is not None), adapters[0])
    base = {k: v for k, v in (known.manifest or {}).get("base", {}).items() if k not in ("modules", "head")}
    base |= _head(adapters, saved)
    write_derived_adapter(
        out,
        whole,
        tensors,
        base=base,
        prints=_prints(adapters, modules),
        provenance={**record, "sources": [_source(adapter) for adapter in adapters]},
        beside=_owner(adapters, saved).path,
    )


def _owner(adapters: Sequence[AdapterFile], saved: Saved) -> AdapterFile:
    """The adapter whose modules trained whole the result has, else the first: its task and tokenizer are the result's too."""
    return next((a for a in adapters if saved[0] and same_tensors(a.saved_modules, saved[0])), adapters[0])


def _head(adapters: Sequence[AdapterFile], saved: Saved) -> dict[str, Any]:
    """The label names that belong to the classifier which the result has, if an adapter recorded them."""
    agreed = len({json.dumps(_recorded_head(adapter)) for adapter in adapters}) == 1
    for adapter in adapters:
        head, own = _recorded_head(adapter), adapter.saved_modules
        fits = same_tensors(own, saved[0]) or (agreed and own.keys() == saved[0].keys())
        if saved[0] and head is not None and fits:
            return {"head": head}
    return {}


def _recorded_head(adapter: AdapterFile) -> Any:
    return (adapter.manifest or {}).get("base", {}).get("head")


def _prints(adapters: Sequence[AdapterFile], modules: Mapping[str, Any]) -> dict[str, WeightPrint]:
    """Of each module the fingerprint from the first adapter that has one, and from where in the weight it was taken."""
    prints: dict[str, WeightPrint] = {}
    for owner in adapters:
        for name, found in owner.base_prints.items():
            if name in prints or name not in modules:
                continue
            own = found.own
            if own is None:
                own = {key: t for key, t in owner.modules.get(name, {}).items() if key.endswith("_index")}
            prints[name] = WeightPrint(found.shape, found.transposed, found.sample, own or None)
    return prints


def _source(adapter: AdapterFile) -> dict[str, Any]:
    manifest = adapter.manifest or {}
    weights = manifest.get("files", {}).get(WEIGHTS_NAME, {})
    return {
        "adapter": adapter.path.name,
        "sha256": weights.get("sha256"),
        "provenance": manifest.get("provenance", {}),
    }
