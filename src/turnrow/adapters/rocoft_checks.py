"""Do the tensors that a RoCoFT adapter holds for one module fit its configuration and the size of the weight?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from turnrow.errors import AdapterError
from turnrow.ops import entries

__all__ = ["BIAS", "MODES", "check_rocoft", "describe", "parts_in"]

BIAS = "rocoft_bias"

MODES: dict[str, tuple[str, ...]] = {
    "row": ("row",),
    "column": ("column",),
    "row+column": ("row", "column"),
    "entry": ("entry",),
}
"""The parts of a weight that each mode trains."""

_PLURAL = {"row": "rows", "column": "columns", "entry": "entries"}
# the axis of the delta that runs over the chosen rows, columns or entries
_AXIS = {"row": 0, "column": 1, "entry": 0}


@dataclass(frozen=True)
class _Where:
    """The module that is checked, for messages and for the rank that the configuration gives it."""

    text: str
    module: str
    config: Mapping[str, Any]


def check_rocoft(
    where: str, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shape: tuple[int, ...] | None
) -> None:
    """Check the tensors of one module.

    Args:
        where: begins every message.
        module: its name.
        tensors: what the adapter holds for it, by parameter name.
        config: ``adapter_config.json``.
        shape: (out, in) of the weight, or (E, out, in) of fused experts, where it is known.

    Raises:
        AdapterError: names the tensor, what it is and what is needed.
    """
    mode, bias = config.get("mode"), config.get("bias")
    if not isinstance(mode, str) or mode not in MODES:
        allowed = ", ".join(map(repr, MODES))
        raise AdapterError(f"{where}: the configuration's mode is {mode!r}, allowed are {allowed}")
    if (count := _experts(tensors, shape)) is not None:
        _check_experts(where, module, tensors, config, shape, count)
        return
    trained = _parts(mode, module, config)
    needed = [name for part in trained for name in (f"rocoft_{part}", f"rocoft_{part}_index")]
    unknown = sorted(set(tensors) - {*needed, BIAS})
    if unknown:
        raise AdapterError(f"{where}: unexpected tensor {unknown[0]!r} for mode {mode!r}")
    if BIAS in tensors:
        if bias not in ("rocoft_only", "all"):
            raise AdapterError(f"{where}: {BIAS} is in the file, and the configuration says bias={bias!r}")
        if tensors[BIAS].ndim != 1 or not tensors[BIAS].is_floating_point():
            raise AdapterError(f"{where}: {BIAS} must be a vector, got {describe(tensors[BIAS])}")
        if bias == "all" and len(tensors) == 1:
            return  # a module of which only the bias is trained
    missing = next((name for name in needed if name not in tensors), None)
    if missing is not None:
        raise AdapterError(
            f"{where}: the tensor {missing!r} is missing (mode {mode!r}; the file has {', '.join(tensors)})"
        )
    if shape is not None and len(shape) != 2:
        raise AdapterError(f"{where}: its weight has shape {list(shape)}, {_PLURAL[MODES[mode][0]]} are of matrices")
    rows_beside = tensors["rocoft_row_index"].numel() if set(trained) == {"row", "column"} else 0
    for part in trained:
        crossing = rows_beside if part == "column" else 0
        _check_part(_Where(where, module, config), part, tensors, shape, crossing)


def parts_in(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """The parts that the tensors of a module hold, and their indices; none where only a bias is trained."""
    return {part: tensors[f"rocoft_{part}_index"].tolist() for part in _AXIS if f"rocoft_{part}_index" in tensors}


def _parts(mode: str, module: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of a weight that an adapter trains in one module: those of its mode, or what its indices name for the module."""
    indices = config.get("indices")
    given = indices.get(module) if isinstance(indices, dict) else None
    if mode == "row+column" and isinstance(given, dict):
        return tuple(part for part in MODES[mode] if part in given) or MODES[mode]
    return MODES[mode]


def _experts(tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None) -> int | None:
    """How many experts the tensors are for; None if they are for a single matrix."""
    if shape is not None:
        return shape[0] if len(shape) == 3 else None
    counts = [len(t) for name, t in tensors.items() if name.endswith("_index") and t.ndim == 2]
    return counts[0] if counts else None


def _check_experts(
    where: str,
    module: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    shape: tuple[int, ...] | None,
    count: int,
) -> None:
    """All of the first expert, and the indices of every one: the others are as large, being in the same tensors."""
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or len(tensor) != count:
            raise AdapterError(
                f"{where}: {name} is {describe(tensor)}, its first dimension must be that of the {count} experts"
            )
    matrix = None if shape is None else shape[1:]
    check_rocoft(where, module, {name: tensor[0] for name, tensor in tensors.items()}, config, matrix)
    for part in _parts(config["mode"], module, config):
        name = f"rocoft_{part}_index"
        _check_index(where, name, tensors[name], _size(part, matrix))


def _size(part: str, shape: tuple[int, ...] | None) -> int | None:
    """How many rows, columns or entries a matrix has."""
    if shape is None:
        return None
    return shape[0] * shape[1] if part == "entry" else shape[_AXIS[part]]


def describe(tensor: Tensor) -> str:
    """Dtype and shape in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_part(
    where: _Where, part: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None, crossing: int
) -> None:
    name, index_name = f"rocoft_{part}", f"rocoft_{part}_index"
    delta, index, axis = tensors[name], tensors[index_name], _AXIS[part]
    dimensions = 1 if part == "entry" else 2
    if delta.ndim != dimensions or not delta.is_floating_point():
        kind = "vector" if part == "entry" else "matrix"
        raise AdapterError(f"{where.text}: {name} must be a floating-point {kind}, got {describe(delta)}")
    if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
        raise AdapterError(f"{where.text}: {index_name} must be a vector of int64, got {describe(index)}")
    if len(index) != delta.shape[axis]:
        raise AdapterError(
            f"{where.text}: {index_name} has {len(index)} entries for the {delta.shape[axis]} {_PLURAL[part]} of {name}"
        )
    _check_rank(where, len(index), part, shape)
    _check_index(where.text, index_name, index, _size(part, shape))
    if part == "entry" or shape is None:
        return
    if delta.shape[1 - axis] != shape[1 - axis] - crossing:
        beside = f", {crossing} of its rows are trained as rows" if crossing else ""
        raise AdapterError(
            f"{where.text}: {name} is {describe(delta)}, the weight is {shape[0]} x {shape[1]} (out x in){beside}"
        )


def _check_rank(where: _Where, rank: int, part: str, shape: tuple[int, ...] | None) -> None:
    # with explicit indices the rank is as many as were given for the module
    if where.config.get("indices"):
        return
    if part == "entry":
        density = where.config.get("density")
        if not isinstance(density, (int, float)) or not 0 < density <= 1:
            raise AdapterError(
                f"{where.text}: the configuration's density is {density!r}, above 0 and at most 1 is needed"
            )
        expected = None if shape is None else entries.count(shape[0], shape[1], density)
        asked = f"{expected} (density={density})"
    else:
        pattern = where.config.get("rank_pattern") or {}
        if isinstance(pattern, dict) and any(_is_costly(expression) for expression in pattern):
            return
        try:
            expected = pattern.get(get_pattern_key(list(pattern), where.module), where.config.get("r"))
        except (AttributeError, TypeError, re.error) as error:
            raise AdapterError(
                f"{where.text}: the configuration's rank_pattern {pattern!r} is unusable: {error}"
            ) from error
        asked = f"r={expected}"
    if expected is not None and rank != expected:
        raise AdapterError(f"{where.text}: the file holds {rank} {_PLURAL[part]}, the configuration asks for {asked}")


def _is_costly(expression: str) -> bool:
    """Whether a regular expression might take long on a name: it repeats groups, or repeats often."""
    return bool(re.search(r"\)[*+?{]", expression)) or len(re.findall(r"[*+{]", expression)) > 3


def _check_index(where: str, name: str, index: Tensor, size: int | None) -> None:
    outside = (index < 0) if size is None else (index < 0) | (index >= size)
    if outside.any():
        allowed = "0 or more" if size is None else f"0 to {size - 1}"
        raise AdapterError(f"{where}: {name} holds {index[outside][0].item()}, out of range: allowed is {allowed}")
    values = index.sort(-1).values  # of every expert on its own, where there are several
    repeated = values[..., 1:][values.diff() == 0]
    if len(repeated):
        raise AdapterError(
            f"{where}: {name} holds {repeated[0].item()} twice; each row, column or entry may be named once"
        )
    if name == "rocoft_entry_index" and not torch.equal(values, index):
        raise AdapterError(f"{where}: {name} is not in ascending order")
