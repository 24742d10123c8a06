"""What fine-tuning did to the hidden states of a model: how much longer or shorter, and how far turned, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turnrow.analysis.displacement.measures import magnitude_change, turn
from turnrow.analysis.displacement.states import evaluating, paired_states
from turnrow.analysis.displacement.streaming import RunningNumbers, Summary
from turnrow.analysis.displacement.tokens import KINDS, TokenKind, kinds_of, real_tokens
from turnrow.errors import UserError

__all__ = ["Displacement", "Moved", "TokenDisplacement", "displacement", "token_displacement"]


@dataclass(frozen=True)
class Moved:
    """How the tokens of one kind moved in one layer."""

    magnitude: Summary
    """Of dM, the relative change of the length."""
    turn: Summary
    """Of 1 - cos(x, x0): how far the directions were turned."""

    @property
    def cosine(self) -> float:
        """The mean of dD = cos(x, x0)."""
        return 1 - self.turn.mean


@dataclass(frozen=True)
class Displacement:
    """What `displacement` found."""

    layers: dict[str, dict[TokenKind, Moved]]
    """By layer, in the order of the model, then by kind of token; a kind without tokens is left out."""
    texts: int
    undefined: int
    """States of zero length, or not finite, in either model, over all layers: they have no direction and are left out."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class TokenDisplacement:
    """How each token of a batch moved in each layer."""

    layers: list[str]
    magnitude: Tensor
    """dM, (layers, B, T) float64; NaN for padding and where it is not defined."""
    turn: Tensor
    """1 - dD, (layers, B, T) float64; NaN for padding and where it is not defined."""


def displacement(
    adapted: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    base: nn.Module | None = None,
    *,
    special_ids: Collection[int] = (),
) -> Displacement:
    """Compare the hidden states of a model with those of its base, over any number of texts.

    Two forward passes a batch. Memory is that of the states of one batch: the numbers are summed up as they come.

    Args:
        adapted: a peft model with any adapter, or a fine-tuned model.
        batches: inputs of the model, as the tokenizer makes them (`input_ids`, `attention_mask`, ...).
        base: the model before. None, for a peft model: itself without its adapter.
        special_ids: the tokenizer's `all_special_ids`; without them every token counts as content.

    Raises:
        UserError: as `paired_states`; there are no batches.
    """
    found: defaultdict[str, dict[TokenKind, tuple[RunningNumbers, RunningNumbers]]] = defaultdict(
        lambda: {kind: (RunningNumbers(), RunningNumbers()) for kind in KINDS}
    )
    texts = undefined = 0
    with evaluating(adapted, base):
        for batch in batches:
            size = 0
            for pair in paired_states(adapted, base, batch):
                real = real_tokens(batch, _shape(pair.adapted), mask=pair.mask_name)
                longer, turned = (f(pair.adapted, pair.base).cpu() for f in (magnitude_change, turn))
                defined = longer.isfinite() & turned.isfinite()
                undefined += int((real & ~defined).sum())
                for kind, chosen in kinds_of(real, batch.get(pair.ids_name), special_ids).items():
                    magnitudes, turns = found[pair.layer][kind]
                    magnitudes.add(longer[chosen & defined])
                    turns.add(turned[chosen & defined])
                size = len(real)
            texts += size
    if not texts:
        raise UserError("there are no texts to compare the models on: give at least one batch")
    return Displacement(
        {
            layer: {kind: Moved(m.summary(), t.summary()) for kind, (m, t) in kinds.items() if m.count}
            for layer, kinds in found.items()
        },
        texts,
        undefined,
    )


def token_displacement(
    adapted: nn.Module, batch: Mapping[str, Tensor], base: nn.Module | None = None
) -> TokenDisplacement:
    """How each token of a batch moved in each layer. Of an encoder-decoder the encoder alone.

    Args:
        adapted, base: as `displacement` takes them.
        batch: inputs of the model.

    Raises:
        UserError: as `paired_states`.
    """
    layers, magnitudes, turns = [], [], []
    with evaluating(adapted, base):
        for pair in paired_states(adapted, base, batch):
            if pair.ids_name != "input_ids":
                continue
            real = real_tokens(batch, _shape(pair.adapted), mask=pair.mask_name)
            layers.append(pair.layer)
            magnitudes.append(torch.where(real, magnitude_change(pair.adapted, pair.base).cpu(), torch.nan))
            turns.append(torch.where(real, turn(pair.adapted, pair.base).cpu(), torch.nan))
    return TokenDisplacement(layers, torch.stack(magnitudes), torch.stack(turns))


def _shape(states: Tensor) -> tuple[int, int]:
    return states.shape[0], states.shape[1]
