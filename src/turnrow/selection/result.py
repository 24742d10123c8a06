"""What was chosen, module by module, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from turnrow.errors import UserError
from turnrow.selection.indices import check_form

__all__ = ["Chosen", "Selection", "read_indices"]

_FILE_VERSION = 1


@dataclass(frozen=True, eq=False)
class Chosen:
    """The rows, columns or entries of one module."""

    module: str
    """Name in the base model."""
    part: str
    """"row", "column" or "entry"."""
    shape: tuple[int, int]
    """(out, in) of the weight, of a fused one that of each expert."""
    index: Tensor
    """(r,) int64 on the CPU, of a fused weight of experts (E, r); an entry is row * in + column."""
    share: float | None
    """Sum of the scores of what was chosen over the sum of all, 0 to 1; None where nothing was scored."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The choice for a whole model."""

    mode: str
    """"row", "column", "row+column" or "entry"."""
    strategy: str
    """The strategy by name, or "indices" where the user named them."""
    chosen: tuple[Chosen, ...]
    """In the order of the modules; a module in mode "row+column" comes twice."""

    def __iter__(self) -> Iterator[Chosen]:
        return iter(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def indices(self) -> dict[str, Any]:
        """For `RocoftConfig.indices`: module name to a list, or to {"row": [...], "column": [...]} in mode "row+column"."""
        parts: dict[str, dict[str, list[int]]] = {}
        for chosen in self.chosen:
            parts.setdefault(chosen.module, {})[chosen.part] = chosen.index.tolist()
        if self.mode == "row+column":
            return dict(parts)
        return {module: lists[self.mode] for module, lists in parts.items()}

    def to_dict(self) -> dict[str, Any]:
        """What the file of indices holds, as JSON can."""
        return {
            "version": _FILE_VERSION,
            "mode": self.mode,
            "strategy": self.strategy,
            "modules": self.indices(),
        }


def read_indices(path: str | Path, mode: str) -> dict[str, Any]:
    """Read a file that `turnrow select` wrote, as `Selection.indices` gives it.

    Args:
        path: a JSON file with what `Selection.to_dict` returns.
        mode: the mode that the indices are wanted for.

    Raises:
        UserError: there is no such file, it is no file of indices or of a later version, it is for another mode, or what it
            holds for a module are no indices.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"indices names the file {str(path)!r}, which cannot be read ({error.strerror}); write one by turnrow select"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON file of indices: {error}") from None
    if not isinstance(held, dict) or not isinstance(held.get("modules"), dict) or not held["modules"]:
        raise UserError(
            f"{path} is no file of indices: it must hold 'version', 'mode' and 'modules', as turnrow select writes"
        )
    if held.get("version") != _FILE_VERSION:
        raise UserError(
            f"{path} has format version {held.get('version')!r}, this turnrow reads {_FILE_VERSION}; a higher number comes "
            "from a later turnrow: upgrade it"
        )
    if held.get("mode") != mode:
        raise UserError(
            f"{path} holds indices for mode {held.get('mode')!r}, and the mode here is {mode!r}; select anew"
        )
    check_form(held["modules"], f"{path}: modules")
    return held["modules"]
