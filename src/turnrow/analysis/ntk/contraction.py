"""Products of gradients, layer by layer, in bounded memory.

For a weight, samples i and j and outputs c and d, the kernel is <D_ic, D_jd> with D_ic = G_ic^T X_i. Two ways:

- *instantiate*: form D for many samples, a slice of its rows at a time, and multiply. C T in out operations a sample and
  C^2 in out a pair of samples.
- *tokens*: never form D: <G_ic^T X_i, G_jd^T X_j> = sum over tokens t, s of (x_it . x_js) (g_ict . g_jds).
  T^2 (in + C^2 out) a pair.

So short inputs, or layers that only one token of each sample matters to, are cheaper by tokens; `cheaper` says by how much.
An embedding is the same with a one-hot X in the place of G, of which nothing is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from turnrow.analysis.ntk.gram import Samples

__all__ = ["Contraction", "cheaper"]

Contraction = Literal["auto", "instantiate", "tokens"]

_PASS = 8.0
"""What touching a product of tokens once more costs, in multiplications."""


def cheaper(tokens: Sequence[tuple[int, int]], shape: tuple[int, int], samples: Samples) -> Contraction:
    """The way with the fewer multiplications, given the T and S of every batch and the rows and columns of the weight."""
    rows, columns = shape
    c = samples.classes
    form = pair_up = token_pairs = 0.0
    for p, size in enumerate(samples.sizes):
        form += size * c * (tokens[p][0] + 1) * rows * columns
        if p >= samples.train_batches:
            continue
        for q in range(p, len(samples.sizes)):
            pairs = size * samples.sizes[q] / (2 if p == q else 1)
            pair_up += pairs * c**2 * rows * columns
            linear = tokens[p][0] * tokens[q][0] * (columns + c**2 * (rows + _PASS))
            looked_up = tokens[p][1] * tokens[q][1] * c**2 * (columns + _PASS)
            crossed = (tokens[p][0] * tokens[q][1] + tokens[p][1] * tokens[q][0]) * c * (columns + c * _PASS)
            # A diagonal pair of batches is computed whole.
            token_pairs += size * samples.sizes[q] * (linear + looked_up + crossed)
    return "tokens" if token_pairs < form + pair_up else "instantiate"
