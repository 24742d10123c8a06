"""RoAd's rotation: against the matrix R written out, by gradcheck, and in its ways of keeping less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnrow.ops import pairs, rotation

VARIANTS = pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
GROUPS = pytest.mark.parametrize("group_size", [2, 4, 12])
OUT = 24


def _parameters(variant, out_features=OUT, dtype=torch.float64):
    size = pairs.parameter_size(variant, out_features)
    theta = torch.randn(size, dtype=dtype)
    alpha = 1 + 0.3 * torch.rand(size, dtype=dtype)
    if variant != "road_1":
        theta = 0.5 * theta.tanh()  # independent angles near one another: every block can be undone
    return theta.requires_grad_(), alpha.requires_grad_()


def _dense(blocks, out_features=OUT):
    """R as an out x out matrix, entry by entry from the paper's block."""
    c1, s1, c2, s2 = blocks
    groups, half = c1.shape
    matrix = torch.zeros(out_features, out_features, dtype=c1.dtype)
    for group in range(groups):
        for j in range(half):
            i1, i2 = group * 2 * half + j, group * 2 * half + half + j
            matrix[i1, i1], matrix[i1, i2] = c1[group, j], -s1[group, j]
            matrix[i2, i1], matrix[i2, i2] = s2[group, j], c2[group, j]
    return matrix


def test_quarter_turn_of_neighbours_by_eye():
    theta, alpha = torch.tensor([torch.pi / 2, 0.0]), torch.tensor([1.0, 2.0])
    blocks = pairs.coefficients("road_1", 2, theta, alpha)
    torch.testing.assert_close(pairs.rotate(torch.tensor([1.0, 2.0, 3.0, 4.0]), blocks), torch.tensor([-2.0, 1, 6, 8]))


def test_groups_pair_the_halves_by_eye():
    theta, alpha = torch.tensor([torch.pi / 2, 0.0]), torch.tensor([1.0, 1.0])
    blocks = pairs.coefficients("road_1", 4, theta, alpha)
    torch.testing.assert_close(pairs.rotate(torch.tensor([1.0, 2.0, 3.0, 4.0]), blocks), torch.tensor([-3.0, 2, 1, 4]))


@VARIANTS
@GROUPS
def test_every_way_computes_the_dense_product(variant, group_size):
    theta, alpha = _parameters(variant)
    blocks = pairs.coefficients(variant, group_size, theta, alpha)
    dense = _dense([b.detach() for b in blocks])
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 5, 7), (OUT, 7), (OUT,)))
    h = x @ weight.t() + bias
    settings_ = {"variant": variant, "group_size": group_size}
    for z in (
        pairs.rotate(h, blocks),
        pairs.rotate_values(h, [b.detach() for b in blocks]),
        rotation.rotate_output(h, theta, alpha, **settings_),
        rotation.rotated_linear(x, weight, bias, theta, alpha, **settings_),
        rotation.rotated_linear(x, weight.t().contiguous().t(), bias, theta, alpha, **settings_),
    ):
        torch.testing.assert_close(z, h @ dense.t())


@VARIANTS
@GROUPS
@pytest.mark.parametrize("keep", ["output", "copy", "input"])
def test_gradients_of_the_rotated_output_pass_gradcheck(variant, group_size, keep):
    theta, alpha = _parameters(variant)
    h = torch.randn(2, 3, OUT, dtype=torch.float64, requires_grad=True)

    def function(h, theta, alpha):
        return rotation.rotate_output(h, theta, alpha, variant=variant, group_size=group_size, keep=keep)

    assert torch.autograd.gradcheck(function, (h, theta, alpha))


@VARIANTS
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_of_the_rotated_linear_pass_gradcheck(variant, with_bias):
    theta, alpha = _parameters(variant)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(OUT, 5, dtype=torch.float64)
    bias = torch.randn(OUT, dtype=torch.float64) if with_bias else None

    def function(x, theta, alpha):
        return rotation.rotated_linear(x, weight, bias, theta, alpha, variant=variant, group_size=4, keep="output")

    assert torch.autograd.gradcheck(function, (x, theta, alpha))


@VARIANTS
def test_unrotate_undoes_rotate(variant):
    theta, alpha = _parameters(variant, dtype=torch.float32)
    blocks = [b.detach() for b in pairs.coefficients(variant, 4, theta, alpha)]
    weight, bias = torch.randn(OUT, 5), torch.randn(OUT)
    merged, merged_bias = weight.clone(), bias.clone()
    rotation.rotate_weight_(merged, merged_bias, blocks)
    torch.testing.assert_close(merged, _dense(blocks) @ weight)
    torch.testing.assert_close(merged_bias, _dense(blocks) @ bias)
    rotation.unrotate_weight_(merged, merged_bias, blocks)
    torch.testing.assert_close(merged, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged_bias, bias, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(angle=st.floats(-6.3, 6.3), scale=st.floats(0.1, 10), first=st.floats(-5, 5), second=st.floats(-5, 5))
def test_road_1_keeps_the_length_of_a_pair_up_to_its_scale(angle, scale, first, second):
    blocks = pairs.coefficients("road_1", 2, torch.tensor([angle]).double(), torch.tensor([scale]).double())
    h = torch.tensor([first, second]).double()
    torch.testing.assert_close(pairs.rotate(h, blocks).norm(), scale * h.norm())


@pytest.mark.parametrize("scale", [0.0, 1e-9, float("nan")])
def test_a_scale_of_zero_counts_as_not_invertible(scale):
    alpha = torch.ones(OUT // 2)
    alpha[3] = scale
    assert not pairs.is_invertible(pairs.coefficients("road_1", 4, torch.zeros(OUT // 2), alpha))
    assert pairs.is_invertible(pairs.coefficients("road_1", 4, torch.zeros(OUT // 2), torch.ones(OUT // 2)))


def test_equal_rows_count_as_not_invertible():
    theta = torch.zeros(2, 2, 1)
    theta[:, 1] = torch.pi / 2  # z1 = h1 and z2 = h1: nothing is left of h2
    assert not pairs.is_invertible(pairs.coefficients("road_2", 2, theta.flatten(), torch.ones(4)))


def test_gradients_with_a_scale_of_zero_are_right_when_the_input_is_kept():
    theta, alpha = _parameters("road_1")
    with torch.no_grad():
        alpha[0] = 0
    h = torch.randn(5, OUT, dtype=torch.float64, requires_grad=True)

    def function(h, theta, alpha):
        return rotation.rotate_output(h, theta, alpha, variant="road_1", group_size=4, keep="input")

    assert torch.autograd.gradcheck(function, (h, theta, alpha))


def test_only_the_output_is_kept():
    theta, alpha = _parameters("road_1", dtype=torch.float32)
    x, weight = torch.randn(30, 5, requires_grad=True), torch.randn(OUT, 5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z = rotation.rotated_linear(x, weight, None, theta, alpha, variant="road_1", group_size=4, keep="output")
    known = {t.untyped_storage().data_ptr() for t in (z, theta, alpha, weight)}
    assert {t.untyped_storage().data_ptr() for t in kept} <= known


def test_watch_learns_whether_the_output_is_overwritten():
    theta, alpha = _parameters("road_1")
    for overwrite in (False, True):
        watch = rotation.OutputWatch()
        assert watch.keep == "copy"
        h = torch.randn(5, OUT, dtype=torch.float64)
        z = rotation.rotate_output(h, theta, alpha, variant="road_1", group_size=4, keep=watch.keep, watch=watch)
        expected = torch.autograd.grad(pairs.rotate(h, pairs.coefficients("road_1", 4, theta, alpha)).sum(), theta)
        if overwrite:
            z += 1
        (gradient,) = torch.autograd.grad(z.sum(), theta)
        torch.testing.assert_close(gradient, expected[0])
        assert watch.overwritten is overwrite
        assert watch.keep == ("copy" if overwrite else "output")


def test_a_reader_that_begins_to_overwrite_is_an_error_once_and_then_right():
    theta, alpha = _parameters("road_1")
    watch = rotation.OutputWatch(overwritten=False)
    h = torch.randn(5, OUT, dtype=torch.float64)

    def step():
        z = rotation.rotate_output(h, theta, alpha, variant="road_1", group_size=4, keep=watch.keep, watch=watch)
        z += 1
        return torch.autograd.grad(z.sum(), theta)[0]

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step()
    reference = pairs.rotate(h, pairs.coefficients("road_1", 4, theta, alpha))
    torch.testing.assert_close(step(), torch.autograd.grad(reference.sum(), theta)[0])


def test_bfloat16_is_rotated_in_float32():
    theta, alpha = _parameters("road_1", dtype=torch.float32)
    blocks = [b.detach() for b in pairs.coefficients("road_1", 4, theta, alpha)]
    h = torch.randn(50, OUT).bfloat16()
    exact = pairs.rotate(h.float(), blocks)
    assert torch.equal(pairs.rotate_values(h, blocks), exact.bfloat16())


def test_unknown_variant_lists_allowed():
    with pytest.raises(ValueError, match="'road_3'; it must be one of road_1, road_2, road_4"):
        pairs.parameter_size("road_3", 8)


@VARIANTS
@GROUPS
def test_products_and_parameters_are_those_of_the_matrices(variant, group_size):
    first, second = (
        pairs.coefficients(variant, group_size, *(p.detach() for p in _parameters(variant))) for _ in range(2)
    )
    product = pairs.product(second, first)
    torch.testing.assert_close(_dense(product), _dense(second) @ _dense(first))
    torch.testing.assert_close(_dense(pairs.product(pairs.inverse(first), first)), torch.eye(OUT, dtype=torch.float64))
    again = pairs.coefficients("road_2", group_size, *pairs.parameters(product))
    torch.testing.assert_close(_dense(again), _dense(product))
