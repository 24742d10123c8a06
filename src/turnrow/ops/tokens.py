"""a^T b, summed over tokens, where a is only a few features wide: the shape of every gradient in this room."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["token_product"]

_CHUNK = 128
"""Tokens in one of the partial products on a CPU."""

_THIN = 16
"""Up to this width of `a` a CPU gains from partial products; wider ones are ordinary matrix products."""


def token_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for a (tokens, r) and b (tokens, n) of one dtype: (r, n).

    On a CPU a thin product over many tokens is taken in chunks of tokens that are added up. The matrix library runs over
    the whole of b once for each of the r rows, or packs it first; a chunk of b stays in the cache meanwhile. Twice as fast for
    r = 3 and 1,024 tokens, and the shorter sums round less.
    """
    tokens, r = a.shape
    chunks = tokens // _CHUNK
    if a.device.type != "cpu" or r > _THIN or chunks < 2:
        return a.t() @ b
    whole = chunks * _CHUNK
    parts = torch.bmm(a[:whole].reshape(chunks, _CHUNK, r).transpose(1, 2), b[:whole].reshape(chunks, _CHUNK, -1))
    product = parts.sum(0)
    return product if whole == tokens else product + a[whole:].t() @ b[whole:]
