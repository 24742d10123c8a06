"""Products of gradients that are never formed: products of tokens, summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from turnrow.analysis.ntk.gram import Gram, Samples
from turnrow.analysis.ntk.token_factors import Load, TokenFactors

__all__ = ["by_tokens"]


def by_tokens(load: Load, samples: Samples, grams: Sequence[Gram], room: int, sign: int = 1) -> None:
    """Add the kernel of a weight to the kernels that it is a part of, without ever forming its gradients.

    Args:
        load: the factors of a batch.
        samples: the batches.
        grams: where to add.
        room: bytes for the products of tokens; a batch is taken in as many parts as needed.
        sign: -1 takes away.
    """
    for p in range(samples.train_batches):
        first = load(p)
        if first.is_empty:
            continue
        for q in range(p, len(samples.sizes)):
            second = load(q)
            if second.is_empty:
                continue
            for begin, part in _parts(first, second, samples.classes, room):
                for begin_columns, other in _parts(second, part, samples.classes, room):
                    block = _token_products(part, other)
                    for gram in grams:
                        gram.add(p, q, block, begin * samples.classes, begin_columns * samples.classes, sign)


def _parts(factors: TokenFactors, other: TokenFactors, classes: int, room: int) -> Iterator[tuple[int, TokenFactors]]:
    """A batch in parts so small that their products with another batch fit: (first sample, part)."""
    held = next(t for t in (factors.e, factors.g) if t is not None)
    others = next(t for t in (other.e, other.g) if t is not None)
    # Products of tokens for every pair of outputs, and one more while they are multiplied.
    each = 2 * classes**2 * max(factors.tokens) * len(others) * max(other.tokens) * held.element_size()
    step = max(1, min(len(held), room // max(1, each)))
    for begin in range(0, len(held), step):
        of = slice(begin, begin + step)
        x, g, ids, e = (None if t is None else t[of] for t in (factors.x, factors.g, factors.ids, factors.e))
        yield begin, TokenFactors(x, g, ids, e)


def _token_products(p: TokenFactors, q: TokenFactors) -> Tensor:
    """(B_p C, B_q C)."""
    total: Tensor | None = None
    if p.x is not None and p.g is not None and q.x is not None and q.g is not None:
        total = _summed(_gram(p.g, q.g), _gram(p.x[:, None], q.x[:, None]))
    if p.ids is not None and p.e is not None and q.ids is not None and q.e is not None:
        same = (p.ids[:, None, :, None, None, None] == q.ids[None, None, None, :, None, :]).to(p.e.dtype)
        total = _plus(total, _summed(_gram(p.e, q.e), same))
    if p.x is not None and p.g is not None and q.ids is not None and q.e is not None:
        total = _plus(total, _crossed(p.x, p.g, q.ids, q.e))
    if q.x is not None and q.g is not None and p.ids is not None and p.e is not None:
        total = _plus(total, _crossed(q.x, q.g, p.ids, p.e).permute(2, 3, 0, 1))
    if total is None:
        raise RuntimeError("there are no factors")
    return total.reshape(total.shape[0] * total.shape[1], -1)


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """(B, C, T, B', C', T'): products of all vectors of two batches."""
    product = left.reshape(-1, left.shape[-1]) @ right.reshape(-1, right.shape[-1]).T
    return product.view(*left.shape[:3], *right.shape[:3])


def _summed(of_gradients: Tensor, of_inputs: Tensor) -> Tensor:
    """Sum over tokens of the product, (B, C, B', C')."""
    return of_gradients.mul_(of_inputs).sum((2, 5))


def _crossed(x: Tensor, g: Tensor, ids: Tensor, e: Tensor) -> Tensor:
    """<G^T X, D of an embedding>: sum over t, s of G[t, id_s] (x_t . e_s), (B, C, B', C')."""
    chosen = g[..., ids]  # (B, C, T, B', S)
    products = _gram(x[:, None], e).squeeze(1)  # (B, T, B', C', S)
    return torch.einsum("bctps,btpds->bcpd", chosen, products)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
