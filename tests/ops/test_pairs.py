"""R as a matrix: which of its entries a pairing has, and what two pairings have in common."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from turnrow.ops import pairs

GROUPS = {24: [2, 4, 6, 8, 12, 24], 16: [2, 4, 8, 16], 6: [2, 6]}
CASES = st.sampled_from([(out, g) for out, sizes in GROUPS.items() for g in sizes])
VARIANTS = st.sampled_from(["road_1", "road_2", "road_4"])


def blocks_of(out, group_size, variant, seed):
    torch.manual_seed(seed)
    size = pairs.parameter_size(variant, out)
    return pairs.coefficients(
        variant, group_size, torch.randn(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    )


def dense(blocks):
    """R, column by column: what it makes of each unit vector."""
    out = 2 * blocks[0].numel()
    return pairs.rotate(torch.eye(out, dtype=torch.float64), blocks).T


@given(CASES, VARIANTS, st.integers(0, 99))
def test_diagonal_and_off_diagonal_are_all_of_r(case, variant, seed):
    blocks = blocks_of(*case, variant, seed)
    matrix = dense(blocks)
    assert torch.equal(matrix.diagonal(), pairs.diagonal(blocks))
    beside = matrix - matrix.diagonal().diag()
    assert torch.equal(beside.sum(1), pairs.off_diagonal(blocks))  # one entry a row
    assert ((beside != 0).sum(1) == 1).all()


@given(st.sampled_from(list(GROUPS)), st.data())
def test_pairings_of_two_group_sizes_have_no_pair_in_common(out, data):
    one, other = data.draw(st.lists(st.sampled_from(GROUPS[out]), min_size=2, max_size=2, unique=True))
    first, second = (dense(blocks_of(out, g, "road_2", 0)) != 0 for g in (one, other))
    assert torch.equal(first & second, torch.eye(out, dtype=torch.bool))


@given(st.sampled_from(list(GROUPS)), VARIANTS, st.integers(0, 99), st.data())
def test_no_r_of_another_group_size_is_nearer_than_the_diagonal(out, variant, seed, data):
    one, other = data.draw(st.lists(st.sampled_from(GROUPS[out]), min_size=2, max_size=2, unique=True))
    matrix = dense(blocks_of(out, one, variant, seed))
    least = torch.linalg.matrix_norm(matrix - matrix.diagonal().diag())
    step = data.draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0])) * dense(blocks_of(out, other, "road_4", seed + 1))
    assert torch.linalg.matrix_norm(matrix - matrix.diagonal().diag() - step) >= least


@given(CASES, VARIANTS, st.integers(0, 99))
def test_polar_is_the_nearest_rotation_and_the_singular_values_of_each_block(case, variant, seed):
    blocks = blocks_of(*case, variant, seed)
    c1, s1, c2, s2 = (entry.flatten() for entry in blocks)
    matrices = torch.stack((c1, -s1, s2, c2), dim=-1).view(-1, 2, 2)
    angle, larger, smaller = (values.flatten() for values in pairs.polar(blocks))
    u, values, v = torch.linalg.svd(matrices)
    torch.testing.assert_close(torch.stack((larger, smaller.abs()), dim=-1), values)
    torch.testing.assert_close(larger * smaller, torch.linalg.det(matrices))
    turns = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=-1).view(-1, 2, 2)
    # The orthogonal matrix nearest to one of positive determinant (Procrustes).
    torch.testing.assert_close(turns[smaller > 1e-9], (u @ v)[smaller > 1e-9])
    if variant == "road_1":
        torch.testing.assert_close(larger, smaller)


def test_golden_polar():
    theta, alpha = torch.tensor([0.5, -3.0]), torch.tensor([2.0, 0.25])
    angle, larger, smaller = pairs.polar(pairs.coefficients("road_1", 2, theta, alpha))
    torch.testing.assert_close(angle.flatten(), theta)
    torch.testing.assert_close(larger.flatten(), alpha)
    torch.testing.assert_close(smaller.flatten(), alpha)
