"""The mathematics of both methods: plain functions on tensors, each with its own autograd rule.

Knows torch alone. Every equation of turnrow lives in this room; layers, merging, export and counting call it.

- `delta`: a trained difference on top of kept values.
- `rows`: train r rows of a weight matrix (RoCoFT).
- `columns`: train r columns of a weight matrix (RoCoFT).
- `entries`: train single entries of a weight matrix (RoCoFT's ablation).
- `experts`: the same for the experts of a layer in one tensor.
- `rotation`: rotate and scale pairs of output features (RoAd).
- `tokens`: sums over tokens, which every gradient above is.
"""

from __future__ import annotations

from turnrow.ops import columns, delta, entries, experts, rotation, rows

__all__ = ["columns", "delta", "entries", "experts", "rotation", "rows"]
