"""What an adapter trains in one weight: rows, columns, both, or single entries, each by the equations of its module in `ops`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from turnrow.errors import UserError
from turnrow.ops import columns, entries, experts, rows
from turnrow.ops.subspace import most_specific, of_module, subspace
from turnrow.selection import check_indices, choose, needs_data, plural
from turnrow.tuners.rocoft.config import RocoftConfig

__all__ = [
    "EXPERT_PARTS",
    "PARTS",
    "Part",
    "choosable",
    "choose_expert_indices",
    "choose_indices",
    "is_given",
    "named_modules",
    "parts_of_mode",
    "shape_of_part",
]

PARTS: dict[str, ModuleType] = {"row": rows, "column": columns, "entry": entries}
"""The equations of each part."""

EXPERT_PARTS: dict[str, ModuleType] = {"row": experts.rows, "column": experts.columns, "entry": experts.entries}
"""The equations of each part of a fused weight of experts."""


def parts_of_mode(mode: str) -> tuple[str, ...]:
    """The parts of a weight that a mode trains: ``"row+column"`` has two, the others are their own."""
    return tuple(mode.split("+"))


@dataclass(frozen=True, eq=False)
class Part:
    """One part of one adapter in one layer, at hand for a forward."""

    name: str
    """``"row"``, ``"column"``, ``"entry"`` or ``"bias"``."""

    parameter: Any
    """The trained difference, a parameter; or one that is settled, a buffer."""

    index: Any
    """What of the weight it belongs to, (r,) int64; None for a bias."""

    rest: Tensor | None = None
    """For columns beside trained rows: the rows that the columns cover."""

    out_features: int = 0

    holder: nn.Module | None = None
    """Where the layer holds the parameter, under `adapter`."""
    adapter: str = ""

    of_experts: bool = False
    """Of a fused weight, for every expert in it."""

    def is_current(self) -> bool:
        """Whether the layer still holds this very parameter; sharding, for example, puts another in its place."""
        if self.holder is None:
            return True
        held = self.holder._parameters.get(self.adapter)
        return (self.holder._buffers.get(self.adapter) if held is None else held) is self.parameter

    @property
    def ops(self) -> ModuleType:
        """The equations of this part, such as ``keep`` and ``put_``."""
        return (EXPERT_PARTS if self.of_experts else PARTS)[self.name]

    def delta(self) -> Tensor:
        """The difference in the shape that the equations take, differentiable in the parameter."""
        if self.rest is None:
            return self.parameter
        return self.ops.spread(self.parameter, self.rest, self.out_features)


def choose_indices(config: RocoftConfig, name: str, out_features: int, in_features: int) -> dict[str, Tensor]:
    """The rows, columns or entries that `config` chooses for the module called `name`: by part, (r,) int64.

    Where the choice needs data it is the first ones, in their place until `turnrow.select` has chosen.

    Raises:
        UserError: more are asked for than there are, or the given ones do not fit; names the module.
    """
    sizes = {"row": out_features, "column": in_features, "entry": out_features * in_features}
    given = _given(config, name)
    chosen = {}
    for part in parts_of_mode(config.mode) if given is None else given:
        if given is not None:
            index = check_indices(given[part], sizes[part], what=part, module=name)
            # The gradient of entries is taken block by block of rows.
            chosen[part] = index.sort().values if part == "entry" else index
        else:
            count = _rank(config, part, name, out_features, in_features)
            chosen[part] = choose(
                "first" if needs_data(config.selection) else config.selection,
                sizes[part],
                count,
                among=choosable(config, name, part, sizes[part]),
                seed=config.selection_seed,
                module=name,
                part=part,
            )
    return chosen


def choosable(config: RocoftConfig, name: str, part: str, size: int) -> Tensor | None:
    """The rows, columns or entries of the module called `name` that may be chosen, int64; None allows all.

    Args:
        part: "row", "column" or "entry".
        size: how many the module has.

    Raises:
        UserError: ``config.within`` names none of them, or some that the module does not have.
    """
    own = of_module(config.within, name)
    if own is None or is_given(config, name):
        return None
    return subspace(own, size, where=f"within, for module {name!r},", what=plural(part))


def is_given(config: RocoftConfig, name: str) -> bool:
    """Whether ``config.indices`` says what is trained in the module called `name`."""
    return _given(config, name) is not None


def choose_expert_indices(config: RocoftConfig, name: str, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """As `choose_indices`, for each expert of the fused weight called `name`: by part, (E, r) int64.

    Args:
        config: its indices for this weight may be one list, which serves every expert, or a list for each expert.
        name: of the parameter.
        shape: (E, out, in).
    """
    count, out_features, in_features = shape
    sizes = {"row": out_features, "column": in_features, "entry": out_features * in_features}
    given = _given(config, name)
    if given is None or not any(_is_nested(lists) for lists in given.values()):
        chosen = choose_indices(config, name, out_features, in_features)
        return {part: index.repeat(count, 1) for part, index in chosen.items()}
    nested: dict[str, Any] = {part: v if _is_nested(v) else [v] * count for part, v in given.items()}
    by_part = {}
    for part, lists in nested.items():
        if len(lists) != count or len({len(numbers) for numbers in lists}) != 1:
            raise UserError(
                f"indices of {name!r} are {len(lists)} lists of {_lengths(lists)} numbers; {count} lists of one length are needed, "
                "one for each expert, or a single list for all"
            )
        of_each = [
            check_indices(numbers, sizes[part], what=part, module=f"{name}, expert {expert}")
            for expert, numbers in enumerate(lists)
        ]
        by_part[part] = torch.stack([index.sort().values if part == "entry" else index for index in of_each])
    return by_part


def shape_of_part(part: str, chosen: Mapping[str, Tensor], out_features: int, in_features: int) -> tuple[int, ...]:
    """Shape of the trained difference of `part` in one matrix, where `chosen` holds the (..., r) indices of all parts."""
    shape = PARTS[part].shape(out_features, in_features, chosen[part].shape[-1])
    if part == "column" and "row" in chosen:
        return shape[0] - chosen["row"].shape[-1], shape[1]  # what lies in both is the rows'
    return tuple(shape)


def named_modules(config: RocoftConfig) -> list[str]:
    """The modules that ``config.indices`` names, whole or by their last parts; none where it serves every module."""
    given = config.indices
    return [] if not isinstance(given, dict) or set(given) <= set(parts_of_mode(config.mode)) else list(given)


def _rank(config: RocoftConfig, part: str, name: str, out_features: int, in_features: int) -> int:
    """How many rows, columns or entries of a module are trained where no indices are given."""
    if part == "entry":
        return entries.count(out_features, in_features, config.density or 0.0)
    r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    size = out_features if part == "row" else in_features
    if r > size:
        raise UserError(
            f"r is {r}, but module {name!r} has only {size} {part}s (its weight is {out_features} x {in_features}); "
            "lower r, or give this module its own rank in rank_pattern"
        )
    return r


def _given(config: RocoftConfig, name: str) -> dict[str, list[int]] | None:
    """The indices that the config gives for a module, by part."""
    given: Any = config.indices
    parts = parts_of_mode(config.mode)
    if named_modules(config):
        given = most_specific(given, name)
    if given is None:
        return None
    if len(parts) == 1 and not isinstance(given, dict):
        return {parts[0]: given}
    # A module that is named itself may have one of the two parts alone, as adapters combined of several have.
    complete = isinstance(given, dict) and (set(given) == set(parts) or (named_modules(config) and given))
    if not complete or not set(given) <= set(parts):
        wanted = ", ".join(f"{part!r}: [...]" for part in parts)
        raise UserError(f"indices of module {name!r} are {given!r}; mode {config.mode!r} needs {{{wanted}}}")
    return given


def _is_nested(numbers: Any) -> bool:
    return any(isinstance(inner, (list, tuple)) for inner in numbers)


def _lengths(lists: list[list[int]]) -> str:
    return " and ".join(map(str, sorted({len(numbers) for numbers in lists})))
