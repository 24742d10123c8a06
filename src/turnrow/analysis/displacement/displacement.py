"""What fine-tuning did to the hidden states of a model: how much longer or shorter, and how far turned, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turnrow.analysis.displacement.measures import magnitude_change, turn
from turnrow.analysis.displacement.states import StatePair, evaluating, paired_states
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
    on_batch: Callable[[Mapping[str, Tensor], TokenDisplacement], None] | None = None,
) -> Displacement:
    """Compare the hidden states of a model with those of its base, over any number of texts.

    Two forward passes a batch. Memory is that of the states of one batch: the numbers are summed up as they come.

    Args:
        adapted: a peft model with any adapter, or a fine-tuned model.
        batches: inputs of the model, as the tokenizer makes them (`input_ids`, `attention_mask`, ...).
        base: the model before. None, for a peft model: itself without its adapter.
        special_ids: the tokenizer's `all_special_ids`; without them every token counts as content.
        on_batch: called with each batch and what `token_displacement` would say of it.

    Raises:
        UserError: as `paired_states`; there are no batches.
    """
    found: defaultdict[str, dict[TokenKind, tuple[RunningNumbers, RunningNumbers]]] = defaultdict(
        lambda: {kind: (RunningNumbers(), RunningNumbers()) for kind in KINDS}
    )
    texts = undefined = 0
    with evaluating(adapted, base):
        for batch in batches:
            tokens: list[_OfLayer] = []
            size = 0
            for pair in paired_states(adapted, base, batch):
                one = _of_layer(pair, batch)
                defined = one.magnitude.isfinite() & one.turn.isfinite()
                undefined += int((one.real & ~defined).sum())
                for kind, chosen in kinds_of(one.real, batch.get(pair.ids_name), special_ids).items():
                    magnitudes, turns = found[pair.layer][kind]
                    magnitudes.add(one.magnitude[chosen & defined])
                    turns.add(one.turn[chosen & defined])
                size = len(one.real)
                if on_batch is not None and pair.ids_name == "input_ids":
                    tokens.append(one)
            texts += size
            if on_batch is not None:
                on_batch(batch, _joined(tokens))
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
    with evaluating(adapted, base):
        pairs = paired_states(adapted, base, batch)
        return _joined([_of_layer(pair, batch) for pair in pairs if pair.ids_name == "input_ids"])


@dataclass(frozen=True, eq=False)
class _OfLayer:
    layer: str
    real: Tensor
    """(B, T) bool: what is no padding."""
    magnitude: Tensor
    """(B, T), NaN for padding."""
    turn: Tensor
    """(B, T), NaN for padding."""


def _of_layer(pair: StatePair, batch: Mapping[str, Tensor]) -> _OfLayer:
    x, x0 = pair.adapted, pair.base
    real = real_tokens(batch, (x.shape[0], x.shape[1]), mask=pair.mask_name)
    longer, turned = (torch.where(real, measure(x, x0).cpu(), torch.nan) for measure in (magnitude_change, turn))
    return _OfLayer(pair.layer, real, longer, turned)


def _joined(layers: Sequence[_OfLayer]) -> TokenDisplacement:
    return TokenDisplacement(
        [one.layer for one in layers],
        torch.stack([one.magnitude for one in layers]),
        torch.stack([one.turn for one in layers]),
    )
