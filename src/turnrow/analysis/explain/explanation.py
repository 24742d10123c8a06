"""What an adapter changed, and where: all that was found, for tables, pages and machines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from turnrow.analysis.displacement import Displacement
from turnrow.analysis.explain.tokens import TextTurned, TokenMoved
from turnrow.analysis.explain.turning import Turning
from turnrow.analysis.explain.weights import WeightMovement

__all__ = ["Explanation", "place_of"]


@dataclass(frozen=True)
class Explanation:
    """What `turnrow explain` shows."""

    facts: dict[str, str]
    """Adapter, method, base, ..., as the page shows them."""
    weights: list[WeightMovement]
    """Those that moved furthest first, by the relative norm, else by the norm; biases and norms after the matrices, since small vectors move
    far of themselves."""
    whole: list[str] = field(default_factory=list)
    """Parameters that were trained whole or have no counterpart in the base, such as a classifier's."""
    displacement: Displacement | None = None
    tokens: list[TokenMoved] = field(default_factory=list)
    """Turned most first."""
    texts: list[TextTurned] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        facts: Mapping[str, str],
        weights: Iterable[WeightMovement],
        *,
        whole: Iterable[str] = (),
        displacement: Displacement | None = None,
        tokens: Iterable[TokenMoved] = (),
        texts: Iterable[TextTurned] = (),
    ) -> Explanation:
        """Put the weights in order."""
        ordered = sorted(weights, key=_how_far, reverse=True)
        return cls(dict(facts), ordered, list(whole), displacement, list(tokens), list(texts))

    @property
    def norm(self) -> float | None:
        """Frobenius norm of all changes together; None where one is not known."""
        norms = [weight.norm for weight in self.weights]
        return None if None in norms else math.hypot(*(norm for norm in norms if norm is not None))

    @property
    def relative(self) -> float | None:
        """`norm` over that of the weights that changed; None where the base is not known."""
        held = [w.norm / w.relative for w in self.weights if w.norm and w.relative]
        return self.norm / math.hypot(*held) if self.norm is not None and len(held) == len(self.weights) else None

    @property
    def turning(self) -> Turning | None:
        """Angles and scales of all pairs together; None where nothing is turned."""
        found = [weight.turning for weight in self.weights if weight.turning is not None]
        if not found:
            return None
        return Turning.joined(torch.cat([t.angles for t in found]), torch.cat([t.scales for t in found]))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; NaN as null."""
        whole = asdict(self, dict_factory=lambda items: {k: v for k, v in items if k not in ("angles", "scales")})
        turning = self.turning
        return _plain({**whole, "norm": self.norm, "relative": self.relative, "turning": None if turning is None else {
            k: v for k, v in asdict(turning).items() if k not in ("angles", "scales")
        }})  # fmt: skip


def place_of(name: str) -> tuple[int | None, str]:
    """The layer that a weight lies in, by the first number in its name, and what it is there: ``(3, "layer.*.output.dense")``."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    if match is None:
        return None, name
    return int(match[0]), f"{name[: match.start()]}*{name[match.end() :]}"


def _how_far(weight: WeightMovement) -> tuple[bool, float, float, float]:
    turned = 0.0 if weight.turning is None else weight.turning.angle[0.5]
    relative = 0.0 if weight.relative is None else weight.relative
    return weight.is_matrix, relative, 0.0 if weight.norm is None else weight.norm, turned


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
