"""Which tokens of a batch are of which kind. Padding is of none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from turnrow.errors import UserError

__all__ = ["KINDS", "TokenKind", "kinds_of", "real_tokens"]

TokenKind = Literal["all", "first", "special", "content", "last"]
"""A token may be of several kinds:

- ``all``: every token that is no padding.
- ``first``: the first of a text, where BERT puts [CLS].
- ``special``: what the tokenizer adds or holds special, [CLS] and [SEP] among them.
- ``content``: the others.
- ``last``: the last of a text, whose state says what follows.
"""
KINDS: tuple[TokenKind, ...] = get_args(TokenKind)


def real_tokens(batch: Mapping[str, Any], shape: tuple[int, int], *, mask: str = "attention_mask") -> Tensor:
    """Which tokens are no padding: bool (B, T). Without a mask all of them.

    Args:
        batch: inputs of a model.
        shape: (B, T) of its states.
        mask: name of the mask among the inputs, (B, T).

    Raises:
        UserError: the mask is of another shape.
    """
    held = batch.get(mask)
    if held is None:
        return torch.ones(shape, dtype=torch.bool)
    if tuple(held.shape) != shape:
        raise UserError(
            f"{mask} is {list(held.shape)}, but the states are of {shape[0]} texts of {shape[1]} tokens: give a mask "
            "with one number a token"
        )
    return held.bool().cpu()


def kinds_of(real: Tensor, ids: Tensor | None, special_ids: Collection[int]) -> dict[TokenKind, Tensor]:
    """Bool (B, T) by kind.

    Args:
        real: (B, T), what is no padding, on either side.
        ids: (B, T), or None of what has no tokens of a vocabulary, such as patches of an image, none of which is special.
        special_ids: ids of the tokenizer's special tokens (`all_special_ids`).
    """
    real = real.cpu()
    number = real.cumsum(1) * real
    listed = torch.tensor(sorted(special_ids), dtype=torch.int64)
    special = torch.zeros_like(real) if ids is None else torch.isin(ids.cpu(), listed) & real
    return {
        "all": real,
        "first": number == 1,
        "special": special,
        "content": real & ~special,
        "last": (number == number.amax(1, keepdim=True)) & real,
    }
