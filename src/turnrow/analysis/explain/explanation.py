"""What an adapter changed, and where: all that was found, for tables, pages and machines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

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
        return _together(weight.norm for weight in self.weights)

    @property
    def relative(self) -> float | None:
        """`norm` over that of the weights that changed; None where the base is not known."""
        return _ratio(self.norm, _together(weight.before for weight in self.weights))

    @property
    def layers(self) -> dict[str, tuple[float, float | None]]:
        """By layer, such as ``"encoder.layer.3"``: norm of its changes, and the same over that of its weights that changed.

        The second is None where the base is not known. A layer with a change that is not known is left out.
        """
        found: dict[tuple[str, int], list[WeightMovement]] = {}
        for weight in self.weights:
            number, role = place_of(weight.name)
            if number is not None:
                found.setdefault((role.partition("*")[0], number), []).append(weight)
        sums = {
            f"{stack}{number}": (_together(w.norm for w in own), _together(w.before for w in own))
            for (stack, number), own in sorted(found.items())
        }
        return {layer: (norm, _ratio(norm, before)) for layer, (norm, before) in sums.items() if norm is not None}

    @property
    def turning(self) -> Turning | None:
        """Angles and scales of all pairs together; None where nothing is turned."""
        found = [weight.turning for weight in self.weights if weight.turning is not None]
        if not found:
            return None
        return Turning.joined(torch.cat([t.angles for t in found]), torch.cat([t.scales for t in found]))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; NaN as null."""
        turning = self.turning
        told = asdict(self) | {
            "norm": self.norm,
            "relative": self.relative,
            "layers": {layer: {"norm": norm, "relative": relative} for layer, (norm, relative) in self.layers.items()},
            "turning": None if turning is None else asdict(turning),
        }
        return _plain(told)


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


def _together(norms: Iterable[float | None]) -> float | None:
    """The norm of parts of one whole; None where one is not known."""
    known = list(norms)
    return None if None in known else math.hypot(*(norm for norm in known if norm is not None))


def _ratio(norm: float | None, before: float | None) -> float | None:
    return norm / before if norm is not None and before else None


def _plain(value: Any) -> Any:
    """As JSON has it: without NaN, without tensors (each angle and scale), with texts as keys."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if not isinstance(inner, Tensor)}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
