"""The configuration of RoAd: peft's own, and which part of every layer an adapter may turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import RoadConfig as PeftRoadConfig

from turnrow.errors import UserError, near_matches
from turnrow.ops.subspace import check_subspaces
from turnrow.tuners._names import check_names

__all__ = ["TRAINABLE", "RoadConfig", "settings_of"]

TRAINABLE = ("angle", "scale")
"""The parameters theta and alpha."""


@dataclass
class RoadConfig(PeftRoadConfig):
    """Rotate and scale pairs of output features (Liao et al., NeurIPS 2024). peft's fields, and two of our own.

    Whatever they say, the files are peft's and hold theta and alpha whole, of the pairs that are not turned 0 and 1: another
    library may ignore them and computes the same.

    Raises:
        UserError, ValueError: a value is not allowed; names it and what is allowed.
    """

    blocks: str | list[int] | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Which pairs are turned, so that several adapters can share a layer and none touches what is another's. A "
            "layer of n output features has pairs 0 to n / 2 - 1, in the order of theta in road_1. None turns all; a text is a slice: "
            "':50%' the first half, '50%:' the second, '::2' every second, '1::2' the others; a list names numbers. A dict maps "
            "module names (whole, or their last parts) to such values, and all pairs of the modules that it does not name are "
            "turned. Only what is turned has parameters, gradients and optimizer state."
        },
    )
    train: str | list[str] = field(
        default_factory=lambda: list(TRAINABLE),
        metadata={
            "help": "What is learned: ['angle', 'scale'], ['angle'] alone, which keeps the length of every pair in road_1, or "
            "['scale'] alone. What is not learned stays 0, for angles, or 1."
        },
    )

    def __post_init__(self) -> None:
        # peft compares without a look at the type: a text is a TypeError there, 4.0 fails in the first layer, True is odd.
        if type(self.group_size) is not int:
            raise UserError(f"group_size is {self.group_size!r}; it must be an even whole number, 2 or more")
        super().__post_init__()
        check_names(self)
        check_subspaces(self.blocks, "blocks")
        self.train = _trained(self.train)

    def to_dict(self) -> dict[str, Any]:
        """As in peft; what is ours only where it is set, for peft alone warns of fields that it does not know."""
        fields = super().to_dict()
        if self.blocks is None:
            del fields["blocks"]
        if len(self.train) == len(TRAINABLE):
            del fields["train"]
        return fields


def settings_of(config: PeftRoadConfig) -> tuple[Any, Sequence[str]]:
    """`blocks` and `train` of any RoAd config, peft's own too."""
    return getattr(config, "blocks", None), getattr(config, "train", TRAINABLE)


def _trained(names: object) -> list[str]:
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, (list, tuple, set)) or not listed:
        raise UserError(f"train is {names!r}; it must be ['angle', 'scale'], or one of the two")
    for name in listed:
        if name not in TRAINABLE:
            raise UserError(
                f"train contains {name!r}; it must be 'angle' or 'scale'{near_matches(str(name), TRAINABLE)}"
            )
    return [name for name in TRAINABLE if name in listed]
