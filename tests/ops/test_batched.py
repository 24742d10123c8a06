"""Equations for a batch of many adapters: every sample must come out as it does alone, forward and backward."""

from __future__ import annotations

import pytest
import torch

from turnrow.ops import batched, columns, entries, pairs, rows

IN, OUT = 12, 16
TOKENS = pytest.mark.parametrize("tokens", [1, 5])
RANKS = pytest.mark.parametrize("ranks", [(2, 2, 2), (3, None, 1), (None, 2, None), (1, 3, 2)])


def _inputs(samples, tokens, dtype=torch.float64):
    return torch.randn(samples, tokens, OUT, dtype=dtype), torch.randn(samples, tokens, IN, dtype=dtype)


def _chosen(ops, ranks, dtype=torch.float64):
    size = {rows: OUT, columns: IN, entries: OUT * IN}[ops]
    return [
        None
        if r is None
        else (
            torch.randn(ops.shape(OUT, IN, r), dtype=dtype, requires_grad=True),
            torch.randperm(size)[:r].sort().values,
        )
        for r in ranks
    ]


def _together(ops, y, x, chosen):
    if ops is entries:
        return batched.add_entries(y, x, batched.stack_entries(chosen, OUT, IN))
    stack, add = {
        rows: (batched.stack_rows, batched.add_rows),
        columns: (batched.stack_columns, batched.add_columns),
    }[ops]
    return add(y, x, stack(chosen, y.dtype))


def _alone(ops, y, x, chosen):
    return torch.stack(
        [
            y[b] if one is None else y[b] + torch.nn.functional.linear(x[b], _dense(ops, *one))
            for b, one in enumerate(chosen)
        ]
    )


def _dense(ops, delta, index):
    if ops is entries:
        return entries.dense(delta, index, OUT, IN)
    weight = delta.new_zeros(OUT, IN)
    return weight.index_copy(0 if ops is rows else 1, index, delta)


PARTS = pytest.mark.parametrize("ops", [rows, columns, entries], ids=["rows", "columns", "entries"])


@PARTS
@RANKS
@TOKENS
def test_every_sample_gets_the_change_of_its_own_adapter(ops, ranks, tokens):
    y, x = _inputs(len(ranks), tokens)
    chosen = _chosen(ops, ranks)
    with torch.no_grad():
        expected = _alone(ops, y, x, chosen)
        torch.testing.assert_close(_together(ops, y.clone(), x, chosen), expected)


@PARTS
@RANKS
@TOKENS
def test_gradients_reach_every_adapter_and_the_input(ops, ranks, tokens):
    y, x = (tensor.requires_grad_() for tensor in _inputs(len(ranks), tokens))
    chosen = _chosen(ops, ranks)
    weights = torch.randn(y.shape, dtype=y.dtype)
    leaves = [x, y, *(one[0] for one in chosen if one is not None)]
    expected = torch.autograd.grad((_alone(ops, y, x, chosen) * weights).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad((_together(ops, y, x, chosen) * weights).sum(), leaves), expected)


@PARTS
def test_one_adapter_may_serve_several_samples(ops):
    y, x = _inputs(3, 2)
    chosen = _chosen(ops, (2,)) * 3
    torch.testing.assert_close(_together(ops, y, x, chosen), _alone(ops, y, x, chosen))


@PARTS
def test_the_output_is_written_in_place_only_where_no_gradient_is_asked_for(ops):
    y, x = _inputs(2, 3)
    chosen, before = _chosen(ops, (2, 1)), y.clone()
    assert not torch.equal(_together(ops, y, x, chosen), y)
    assert torch.equal(y, before)
    with torch.no_grad():
        assert _together(ops, y, x, chosen).data_ptr() == y.data_ptr()


@PARTS
def test_no_adapter_in_the_batch_is_nothing_to_stack(ops):
    stacked = {
        rows: lambda: batched.stack_rows([None, None], torch.float32),
        columns: lambda: batched.stack_columns([None, None], torch.float32),
        entries: lambda: batched.stack_entries([None, None], OUT, IN),
    }[ops]()
    assert stacked is None


@PARTS
def test_bfloat16_outputs_come_out_as_alone_up_to_their_rounding(ops):
    y, x = _inputs(2, 3, torch.bfloat16)
    chosen = _chosen(ops, (2, 5), torch.float32)
    result = _together(ops, y, x, chosen)
    assert result.dtype == torch.bfloat16
    expected = _alone(ops, y.float(), x.float(), chosen)
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02)


# --- rotation --------------------------------------------------------------------------------------------------------

KINDS = {
    "one-kind": [("road_1", 4), ("road_1", 4), ("road_1", 4)],
    "variants": [("road_1", 8), ("road_4", 8), ("road_2", 8), ("road_4", 8)],
    "groups": [("road_1", 2), ("road_2", 16), ("road_4", 4), ("road_1", 2)],
    "some-without": [None, ("road_2", 4), None],
    "groups-and-without": [None, ("road_2", 4), ("road_1", 8), None],
}
BATCHES = pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)


def _angles(kinds, dtype=torch.float64):
    """One (theta, alpha) a sample, and as `stack_rotations` takes them."""
    parameters = [
        None
        if kind is None
        else tuple(torch.randn(pairs.parameter_size(kind[0], OUT), dtype=dtype, requires_grad=True) for _ in range(2))
        for kind in kinds
    ]
    angles = []
    for kind in {kind: None for kind in kinds if kind is not None}:
        samples = [b for b, other in enumerate(kinds) if other == kind]
        theta, alpha = zip(*(parameters[b] for b in samples), strict=True)
        angles.append(batched.Angles(*kind, samples, theta, alpha))
    return parameters, angles


def _rotated_alone(h, kinds, parameters):
    return torch.stack(
        [
            h[b] if kind is None else pairs.rotate(h[b], pairs.coefficients(*kind, *parameters[b]))
            for b, kind in enumerate(kinds)
        ]
    )


@BATCHES
@TOKENS
def test_every_sample_is_rotated_by_its_own_adapter(kinds, tokens):
    h, _ = _inputs(len(kinds), tokens)
    parameters, angles = _angles(kinds)
    with torch.no_grad():
        expected = _rotated_alone(h, kinds, parameters)
        rotated = batched.rotate(h, batched.stack_rotations(angles, len(kinds), OUT))
        torch.testing.assert_close(rotated, expected)
        assert rotated.data_ptr() == h.data_ptr()  # in place where no gradient is asked for


@BATCHES
def test_gradients_of_the_rotation_reach_every_adapter_and_the_input(kinds):
    h, _ = _inputs(len(kinds), 3)
    h.requires_grad_()
    parameters, angles = _angles(kinds)
    leaves = [h, *(p for pair in parameters if pair is not None for p in pair)]
    weights = torch.randn_like(h)
    expected = torch.autograd.grad((_rotated_alone(h, kinds, parameters) * weights).sum(), leaves)
    rotated = batched.rotate(h, batched.stack_rotations(angles, len(kinds), OUT))
    torch.testing.assert_close(torch.autograd.grad((rotated * weights).sum(), leaves), expected)


@pytest.mark.parametrize("kinds", [KINDS["one-kind"], KINDS["groups"]], ids=["one-kind", "groups"])
def test_a_bfloat16_output_is_rotated_in_float32_and_rounded_once(kinds):
    h, _ = _inputs(len(kinds), 3, torch.bfloat16)
    parameters, angles = _angles(kinds, torch.float32)
    expected = _rotated_alone(h.float(), kinds, parameters)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            rotated = batched.rotate(h, batched.stack_rotations(angles, len(kinds), OUT))
        assert rotated.dtype == torch.bfloat16
        torch.testing.assert_close(rotated.float(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "group_size", "theta", "form"),
    [
        ("road_1", 2, torch.pi / 2, torch.Tensor),
        ("road_1", 8, 1.0, pairs.Shears),
        ("road_4", 2, 1.0, pairs.Shears),
        ("road_1", 8, torch.pi / 2, tuple),  # a quarter turn is no product of shears and a scale
        ("road_2", 2, torch.pi / 2, tuple),
        ("road_1", 8, torch.nan, tuple),
    ],
)
def test_a_rotation_in_place_takes_the_form_of_fewest_passes_that_is_exact(variant, group_size, theta, form):
    size = pairs.parameter_size(variant, OUT)
    parameters = torch.linspace(-1, 1, size) * theta, torch.linspace(0.5, 2, size)
    blocks = pairs.coefficients(variant, group_size, *parameters)
    prepared = pairs.prepare(blocks)
    assert isinstance(prepared, form)
    h = torch.randn(5, OUT)
    torch.testing.assert_close(pairs.rotate_(h.clone(), prepared), pairs.rotate(h, blocks), equal_nan=True)


def test_a_scale_of_zero_is_rotated_in_place_too():
    parameters = torch.randn(OUT // 2), torch.zeros(OUT // 2)
    blocks = pairs.coefficients("road_1", 8, *parameters)
    assert torch.equal(pairs.rotate_(torch.randn(3, OUT), pairs.prepare(blocks)), torch.zeros(3, OUT))


def test_a_sample_that_is_not_rotated_stays_as_it_is_to_the_bit():
    h, _ = _inputs(3, 4, torch.float32)
    _, angles = _angles(KINDS["some-without"], torch.float32)
    with torch.no_grad():
        rotated = batched.rotate(h.clone(), batched.stack_rotations(angles, 3, OUT))
    assert torch.equal(rotated[0], h[0])
    assert torch.equal(rotated[2], h[2])
    assert not torch.equal(rotated[1], h[1])


def test_no_rotation_in_the_batch_is_nothing_to_stack():
    assert batched.stack_rotations([], 3, OUT) == []
