"""The mathematics of both methods: plain functions on tensors, each with its own autograd rule.

Knows torch alone. Every equation of turnrow lives in this room; layers, merging, export and counting call it.

- `delta`: a trained difference on top of kept values.
- `rows`: train r rows of a weight matrix (RoCoFT).
- `columns`: train r columns of a weight matrix (RoCoFT).
- `entries`: train single entries of a weight matrix (RoCoFT's ablation).
- `experts`: the same for the experts of a layer in one tensor.
- `pairs`: the 2 x 2 blocks of a rotation, and what they do to pairs of values.
- `rotation`: rotate and scale pairs of output features (RoAd).
- `batched`: the same for a batch in which every sample has an adapter of its own.
- `subspace`: a part of the rows, columns or blocks of every weight, as a user names it.
- `rounding`: what quantizing a merged weight anew has cost.
- `tokens`: sums over tokens, which every gradient above is.
"""

from __future__ import annotations

from turnrow.ops import batched, columns, delta, entries, experts, pairs, rotation, rounding, rows

__all__ = ["batched", "columns", "delta", "entries", "experts", "pairs", "rotation", "rounding", "rows"]
