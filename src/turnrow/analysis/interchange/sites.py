"""Where in a model states are read and replaced: a module, its input or its output, and some of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from turnrow.analysis.displacement.tokens import real_tokens
from turnrow.errors import UserError, near_matches

__all__ = ["Places", "Positions", "Site", "module_of", "places"]

Positions = (
    int | Literal["all"] | Sequence[int] | Sequence[Sequence[int]] | Callable[[Mapping[str, Tensor]], Sequence[Any]]
)
"""Which tokens of each text, counted without padding: a number, negative from the end; ``"all"``; several numbers; a list of them for
each text; or a function of the batch that returns one of the last two."""

Places = tuple[Tensor, Tensor]
"""(n,) numbers of texts and (n,) places in them, padding counted."""


@dataclass(frozen=True, eq=False)
class Site:
    """Where states are read and replaced."""

    module: str | int
    """The name of a module, or the number of a layer of the model's one stack of layers, from 0."""
    where: Literal["input", "output"] = "output"
    """The first tensor that the module is given, or the first that it returns."""
    positions: Positions = "all"
    """Which tokens."""
    call: int | None = None
    """Which call, from 0, of a module that runs several times in a forward pass; None: it runs once."""
    mask: str = "attention_mask"
    """The input that says what is padding, for positions: in a decoder with an encoder ``"decoder_attention_mask"``."""

    def __post_init__(self) -> None:
        if self.where not in ("input", "output"):
            hint = near_matches(str(self.where), ("input", "output"))
            raise UserError(f"where is {self.where!r}; it must be 'input' or 'output'{hint}")
        if isinstance(self.positions, str) and self.positions != "all":
            raise UserError(
                f"positions are {self.positions!r}; they must be 'all', numbers, or a function of the batch"
            )


def module_of(model: nn.Module, site: Site) -> tuple[str, nn.Module]:
    """The module of a site, with its name.

    Raises:
        UserError: there is no such module, or a number names a layer of no stack, or of one of several.
    """
    modules = dict(model.named_modules())
    if isinstance(site.module, str):
        if site.module not in modules:
            raise UserError(
                f"there is no module {site.module!r} in a {type(model).__name__}{near_matches(site.module, modules)}"
            )
        return site.module, modules[site.module]
    stacks = {name: held for name, held in modules.items() if isinstance(held, nn.ModuleList)}
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(outer) != 1:
        raise UserError(
            f"layer {site.module} is one of {len(outer)} stacks of layers ({', '.join(outer) or 'none'}): name the module instead, "
            "such as 'encoder.layer.3'"
        )
    layers = stacks[outer[0]]
    if not -len(layers) <= site.module < len(layers):
        raise UserError(f"there is no layer {site.module}: the model has {len(layers)}, numbered from 0")
    name = f"{outer[0]}.{site.module % len(layers)}"
    return name, modules[name]


def places(positions: Positions, batch: Mapping[str, Tensor], shape: tuple[int, int], mask: str) -> Places:
    """Where the positions lie in states of a batch, text by text, each in the order given.

    Args:
        positions: which tokens.
        batch: inputs of the model.
        shape: (B, T) of the states.
        mask: the input that says what is padding.

    Raises:
        UserError: a text has no such token, or the positions are for another number of texts.
    """
    real = real_tokens(batch, shape, mask=mask)
    chosen: Any = positions(batch) if callable(positions) else positions
    if isinstance(chosen, str):
        text, place = real.nonzero(as_tuple=True)
        return text, place
    if isinstance(chosen, Tensor):
        chosen = chosen.tolist()
    of_each = [[chosen]] * len(real) if isinstance(chosen, int) else list(chosen)
    if not isinstance(chosen, int) and all(isinstance(one, int) for one in of_each):
        of_each = [of_each] * len(real)
    if len(of_each) != len(real):
        raise UserError(f"there are positions for {len(of_each)} texts, but {len(real)} texts in the batch")
    texts, found = [], []
    for number, (own, held) in enumerate(zip(of_each, real, strict=True)):
        at = held.nonzero()[:, 0]
        for position in own:
            if not -len(at) <= position < len(at):
                raise UserError(f"text {number} has no token {position}: it has {len(at)}, numbered from 0")
            texts.append(number)
            found.append(int(at[position]))
    return torch.tensor(texts, dtype=torch.int64), torch.tensor(found, dtype=torch.int64)
