"""RoCoFT adapters combined module by module: their changes are added, so adapters add up as vectors do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.algebra.combination import Combination
from turnrow.adapters.rocoft_checks import BIAS
from turnrow.errors import UserError
from turnrow.ops import columns, entries
from turnrow.ops.union import Change, Overlap, align, overlap

__all__ = ["Combined", "combine_rocoft", "tensors_of", "unused"]

_PARTS = ("row", "column", "entry")


@dataclass(frozen=True)
class Combined:
    """The modules of a combined adapter."""

    config: dict[str, Any]
    """What the configuration says of them."""
    modules: dict[str, dict[str, Tensor]]
    """``{module: {parameter: tensor}}``"""
    overlaps: dict[str, Overlap]
    """By module (of fused experts ``name[number]``): what more than one adapter changes. Modules without are left out."""


def combine_rocoft(adapters: Sequence[AdapterFile], combination: Combination) -> Combined:
    """Combine what the adapters change, in float64, and round once to the widest dtype among them."""
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    fused = sorted({name for adapter in adapters for name in adapter.fused_weights})
    mode = _mode([str(adapter.config["mode"]) for adapter in adapters])
    modules: dict[str, dict[str, Tensor]] = {}
    overlaps: dict[str, Overlap] = {}
    for name in names:
        held = [adapter.modules.get(name, {}) for adapter in adapters]
        dtype = reduce(
            torch.promote_types, (t.dtype for tensors in held for t in tensors.values() if t.is_floating_point())
        )
        sizes = {adapter.base_prints[name].shape for adapter in adapters if name in adapter.base_prints}
        in_features = next(iter(sizes))[-1] if sizes else None
        if name in fused:
            combined = _combine_experts(name, held, in_features, mode, combination, overlaps)
        else:
            changes = [_thinned(tensors, in_features, mode, combination) for tensors in held]
            combined = tensors_of(_combine(name, changes, combination))
            overlaps[name] = overlap(changes)
        if any(BIAS in tensors for tensors in held):
            combined[BIAS] = _combine_biases(held, combination)
        modules[name] = {
            key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in combined.items()
        }
    density = _fill_entries(adapters, modules) if mode == "entry" else None
    config = _config(adapters, modules, fused, mode) | {"density": density}
    return Combined(config, modules, {k: v for k, v in overlaps.items() if v})


def _mode(modes: Sequence[str]) -> str:
    if "entry" in modes:
        return "entry"
    return modes[0] if len(set(modes)) == 1 else "row+column"


def _thinned(tensors: Mapping[str, Tensor], in_features: int | None, mode: str, combination: Combination) -> Change:
    """The change that an adapter's tensors are, thinned out; entry by entry where the result will be."""
    # Before rows become entries, so that what is thinned out does not depend on the other adapters.
    parts = {
        part: (combination.thin(tensors[f"rocoft_{part}"].double()), tensors[f"rocoft_{part}_index"].long())
        for part in _PARTS
        if f"rocoft_{part}" in tensors
    }
    change = Change(**parts, in_features=in_features)
    if mode != "entry" or "entry" in parts or not parts:
        return change
    if in_features is None and change.row is None:
        return change
    size = in_features if in_features is not None else change.row[0].shape[1]  # type: ignore[index]
    return Change(entry=change.as_entries(size), in_features=size)


def _combine(name: str, changes: Sequence[Change], combination: Combination) -> Change:
    try:
        aligned = align(changes, torch.float64)
    except ValueError as error:
        raise UserError(
            f"module {name!r}: {error}: save one of the adapters with its turnrow.json, which holds the sizes"
        ) from error
    return Change(
        row=None if aligned.row_index is None else (combination.combine(aligned.row), aligned.row_index),
        column=None if aligned.column_index is None else (combination.combine(aligned.column), aligned.column_index),
        entry=None if aligned.entry_index is None else (combination.combine(aligned.entry), aligned.entry_index),
    )


def tensors_of(change: Change) -> dict[str, Tensor]:
    """A change under the names of an adapter file."""
    found = {}
    for part in _PARTS:
        held = getattr(change, part)
        if held is not None:
            found[f"rocoft_{part}"], found[f"rocoft_{part}_index"] = held
    return found


def _combine_biases(held: Sequence[Mapping[str, Tensor]], combination: Combination) -> Tensor:
    biases = [combination.thin(tensors[BIAS].double()) if BIAS in tensors else None for tensors in held]
    like = next(bias for bias in biases if bias is not None)
    return combination.combine([torch.zeros_like(like) if bias is None else bias for bias in biases])


def _combine_experts(
    name: str,
    held: Sequence[Mapping[str, Tensor]],
    in_features: int | None,
    mode: str,
    combination: Combination,
    overlaps: dict[str, Overlap],
) -> dict[str, Tensor]:
    """Expert by expert; those that end with fewer rows or columns than others get further ones, with a change of zero."""
    count = next(len(tensor) for tensors in held for tensor in tensors.values())
    of_experts = []
    for expert in range(count):
        changes = [
            _thinned({key: tensor[expert] for key, tensor in tensors.items()}, in_features, mode, combination)
            for tensors in held
        ]
        of_experts.append(_combine(f"{name}[{expert}]", changes, combination))
        overlaps[f"{name}[{expert}]"] = overlap(changes)
    filled = of_experts
    for part in _PARTS:
        held_parts = [getattr(change, part) for change in filled]
        if any(one is not None for one in held_parts):
            most = max(len(one[1]) for one in held_parts)
            filled = [_fill(change, part, most) for change in filled]
    stacked = [tensors_of(change) for change in filled]
    return {key: torch.stack([tensors[key] for tensors in stacked]) for key in stacked[0]}


def _fill(change: Change, part: str, most: int) -> Change:
    """The change with `most` rows, columns or entries: further ones, the first that it lacks, change by zero."""
    delta, index = getattr(change, part)
    new = unused(index, most)
    if not len(new):
        return change
    parts = {p: getattr(change, p) for p in _PARTS if getattr(change, p) is not None}
    axis = 1 if part == "column" else 0
    shape = list(delta.shape)
    shape[axis] = len(new)
    added = delta.new_zeros(shape)
    index = torch.cat((index, new))
    if part == "row" and change.column is not None:
        # of the columns these rows hold what lies in them
        whole, column_index = change.whole_columns()  # type: ignore[misc]
        added[:, column_index] = whole[new]
        parts["column"] = whole[columns.others(index, len(whole))], column_index
    order = index.argsort()
    parts[part] = torch.cat((delta, added), dim=axis).index_select(axis, order), index[order]
    return Change(**parts)


def unused(index: Tensor, most: int) -> Tensor:
    """The first numbers that `index` lacks, as many as make it `most` long."""
    candidates = torch.arange(most)
    return candidates[~torch.isin(candidates, index)][: most - len(index)]


def _fill_entries(adapters: Sequence[AdapterFile], modules: Mapping[str, dict[str, Tensor]]) -> float:
    """Give every module the same density, with further entries that change by zero; return the density.

    The indices of entries are too many for a configuration, so their number must follow from the density alone.
    """
    shapes = {name: print_.shape for adapter in adapters for name, print_ in adapter.base_prints.items()}
    own = {name: tensors for name, tensors in modules.items() if "rocoft_entry" in tensors}
    unknown = next((name for name in own if name not in shapes), None)
    if unknown is not None:
        raise UserError(
            f"the size of the weight of {unknown!r} is not known, which entries need: none of the adapters that have it has a "
            "turnrow.json beside it"
        )
    held = {name: (tensors["rocoft_entry_index"].shape[-1], shapes[name][-2:]) for name, tensors in own.items()}
    density = max(count / (out * in_) for count, (out, in_) in held.values())
    while any(entries.count(out, in_, density) < count for count, (out, in_) in held.values()):
        density = min(1.0, density * (1 + 1e-9))
    for name, (_, (out, in_)) in held.items():
        most = entries.count(out, in_, density)
        delta, index = own[name]["rocoft_entry"], own[name]["rocoft_entry_index"]
        filled = [
            _fill(Change(entry=one), "entry", most).entry
            for one in zip(delta.view(-1, delta.shape[-1]), index.view(-1, delta.shape[-1]), strict=True)
        ]
        for key, tensors in zip(("rocoft_entry", "rocoft_entry_index"), zip(*filled, strict=True), strict=True):
            modules[name][key] = torch.stack(tensors).view(*delta.shape[:-1], most)
    return density


def _config(
    adapters: Sequence[AdapterFile], modules: Mapping[str, Mapping[str, Tensor]], fused: Sequence[str], mode: str
) -> dict[str, Any]:
    indices: dict[str, Any] = {}
    for name, tensors in modules.items():
        parts = {part: tensors[f"rocoft_{part}_index"].tolist() for part in _PARTS if f"rocoft_{part}" in tensors}
        if parts:
            indices[name] = parts if mode == "row+column" else parts[mode]
    counts = [
        tensor.shape[-1] for tensors in modules.values() for key, tensor in tensors.items() if key.endswith("_index")
    ]
    biases = {str(adapter.config.get("bias", "none")) for adapter in adapters}
    return {
        "mode": mode,
        "indices": None if mode == "entry" else indices,
        "r": 1 if mode == "entry" else max(counts),
        "selection": "first",
        "rank_pattern": {},
        "bias": next((kind for kind in ("all", "rocoft_only") if kind in biases), "none"),
        "target_modules": sorted(name for name in indices if name not in fused),
        "target_parameters": sorted(name for name in indices if name in fused),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
