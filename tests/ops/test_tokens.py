"""Sums over tokens: the partial products on a CPU are the plain product."""

from __future__ import annotations

import pytest
import torch

from turnrow.ops.tokens import token_product


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 255, 256, 300, 1024])
@pytest.mark.parametrize("r", [1, 3, 16, 17])
def test_partial_products_add_up_to_the_product(tokens, r):
    generator = torch.Generator().manual_seed(tokens + r)
    a = torch.randn(tokens, r, generator=generator, dtype=torch.float64)
    b = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(token_product(a, b), torch.einsum("tr,tn->rn", a, b))


def test_a_transposed_operand_is_taken_as_it_is():
    wide = torch.randn(6, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = wide[:3].t(), wide.t()
    torch.testing.assert_close(token_product(a, b), wide[:3] @ wide.t())
