"""The weights of many experts in one tensor, W (E, out, in): train rows, columns or entries of the matrix of every expert.

Mixture-of-experts models keep the experts of a layer as one parameter. The equations are those of `turnrow.ops.rows`, `columns`
and `entries` with a leading dimension: S (E, r) holds a choice for each expert, delta is (E, r, in), (E, out, r) or (E, n).

Letters beside those: E experts; S_e what is chosen in expert e; tokens of a forward (tokens, in), each routed to one expert.

- `rows`, `columns`, `entries`: what to keep, put and differentiate, one module for each part.
- `routing`: which expert each token goes to, and sums over the tokens of each expert.
- `attach`: gradients for the changes, given a weight that already holds them.
- `reading`: a weight in the hands of a model's code, and what it is multiplied with.
- `fused`: where models keep such weights, and which way round.
"""

from __future__ import annotations

from turnrow.ops.experts import columns, entries, rows
from turnrow.ops.experts.attach import attach_gradient, overlay, whole_weight
from turnrow.ops.experts.fused import FusedWeight, fused_weights, holds_other_experts
from turnrow.ops.experts.reading import Reader, ReadWeight, read_weight
from turnrow.ops.experts.routing import Routing

__all__ = [
    "FusedWeight",
    "ReadWeight",
    "Reader",
    "Routing",
    "attach_gradient",
    "columns",
    "entries",
    "fused_weights",
    "holds_other_experts",
    "overlay",
    "read_weight",
    "rows",
    "whole_weight",
]
