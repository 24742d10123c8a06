"""What was chosen, module by module, and the file that keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["INDEX_FILE_VERSION", "Chosen", "Selection"]

INDEX_FILE_VERSION = 1


@dataclass(frozen=True, eq=False)
class Chosen:
    """The rows, columns or entries of one module."""

    module: str
    """Name in the base model."""
    part: str
    """"row", "column" or "entry"."""
    shape: tuple[int, int]
    """(out, in) of the weight."""
    index: Tensor
    """(r,) int64 on the CPU; an entry is row * in + column."""
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
            "version": INDEX_FILE_VERSION,
            "mode": self.mode,
            "strategy": self.strategy,
            "modules": self.indices(),
        }
