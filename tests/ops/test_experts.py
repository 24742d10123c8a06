"""Rows, columns and entries of fused experts: the same claims for all, against one expert after another by the plain equations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from turnrow.ops import columns, entries, experts, rows
from turnrow.ops.delta import adapted

PARTS = {"rows": (rows, experts.rows), "columns": (columns, experts.columns), "entries": (entries, experts.entries)}
ALL = pytest.mark.parametrize("part", PARTS)
E, OUT, IN = 4, 7, 5
INDEX = [[4, 0, 2], [1, 2, 3], [0, 1, 4], [3, 4, 0]]


def _case(part, dtype=torch.float64):
    torch.manual_seed(0)
    plain, fused = PARTS[part]
    weight = torch.randn(E, OUT, IN, dtype=dtype)
    index = torch.tensor(INDEX).sort(1).values if part == "entries" else torch.tensor(INDEX)
    delta = torch.randn(E, *plain.shape(OUT, IN, 3), dtype=dtype)
    changed = weight.clone()
    for w, d, s in zip(changed, delta, index, strict=True):
        plain.put_(w, s, adapted(plain.keep(w, s), d))
    return plain, fused, weight, index, delta, changed


@ALL
@pytest.mark.parametrize("transposed", [False, True])
def test_put_writes_every_expert_as_the_plain_equation_does_and_keep_undoes_it(part, transposed):
    _, fused, weight, index, delta, changed = _case(part)
    stored = weight.transpose(1, 2).contiguous() if transposed else weight.clone()
    view = stored.transpose(1, 2) if transposed else stored
    kept = fused.keep(view, index)
    fused.put_(view, index, adapted(kept, delta))
    assert torch.equal(view, changed)
    fused.put_(view, index, kept)
    assert torch.equal(view, weight)


@ALL
def test_overlay_is_the_changed_weight_and_leaves_the_weight_alone(part):
    _, fused, weight, index, delta, changed = _case(part)
    before = weight.clone()
    delta.requires_grad_()
    assert torch.equal(experts.overlay(fused, weight, delta, index), changed)
    assert torch.equal(weight, before)
    assert torch.autograd.gradcheck(lambda d: experts.overlay(fused, weight, d, index), (delta,))


def test_columns_beside_rows_leave_the_crossing_to_the_rows():
    chosen = torch.tensor([[4, 0], [1, 2], [0, 6], [3, 5]])
    rest = experts.columns.others(chosen, OUT)
    delta = torch.randn(E, OUT - 2, 3)
    spread = experts.columns.spread(delta, rest, OUT)
    for e in range(E):
        assert torch.equal(rest[e], columns.others(chosen[e], OUT))
        assert torch.equal(spread[e], columns.spread(delta[e], rest[e], OUT))


# numbers of the expert of each of 12 tokens; the last leave one expert without any
ROUTINGS = {
    "sorted": torch.tensor([0] * 5 + [1] + [2] * 4 + [3] * 2),
    "equal shares": torch.arange(E).repeat_interleave(3),
    "unsorted": torch.tensor([2, 0, 3, 3, 2, 0, 0, 2, 3, 0, 2, 2]),
}


def _routing(kind, numbers):
    if kind == "sorted":
        return experts.Routing(numbers.bincount(minlength=E).cumsum(0).int())
    if kind == "equal shares":
        return experts.Routing.of_equal_shares(E, 3, numbers.device)
    return experts.Routing.of_numbers(numbers, E)


@ALL
@pytest.mark.parametrize("kind", ROUTINGS)
def test_attached_gradient_is_that_of_the_whole_weight(part, kind):
    numbers = ROUTINGS[kind]
    _, fused, _, index, delta, changed = _case(part)
    whole = changed.clone().requires_grad_()
    x = torch.randn(12, IN, dtype=torch.float64)
    dy = torch.randn(12, OUT, dtype=torch.float64)
    torch.einsum("ti,toi->to", x, whole[numbers]).backward(dy)
    expected = fused.keep(whole.grad, index)

    delta.requires_grad_()
    y = torch.einsum("ti,toi->to", x, changed[numbers])
    attached = experts.attach_gradient(fused, y.clone(), x, delta, index, _routing(kind, numbers))
    assert torch.equal(attached, y)
    attached.backward(dy)
    torch.testing.assert_close(delta.grad, expected)


@ALL
def test_no_tokens_give_no_gradient(part):
    _, fused, _, index, delta, _ = _case(part)
    delta.requires_grad_()
    routing = experts.Routing.of_numbers(torch.empty(0, dtype=torch.int64), E)
    y = experts.attach_gradient(fused, torch.empty(0, OUT).double(), torch.empty(0, IN).double(), delta, index, routing)
    y.sum().backward()
    assert torch.equal(delta.grad, torch.zeros_like(delta))


@ALL
@pytest.mark.parametrize("transposed", [False, True])
def test_the_whole_weight_hands_each_change_its_part_of_the_gradient(part, transposed):
    _, fused, _, index, delta, changed = _case(part)
    stored = changed.transpose(1, 2).contiguous() if transposed else changed
    delta.requires_grad_()
    whole = experts.whole_weight(stored, [(fused, delta, index)], transposed=transposed)
    assert whole.data_ptr() == stored.data_ptr()
    d_whole = torch.randn_like(stored)
    (whole * d_whole).sum().backward()
    assert torch.equal(delta.grad, fused.keep(d_whole.transpose(1, 2) if transposed else d_whole, index))


def test_tokens_after_the_last_end_belong_to_no_expert():
    a, b = torch.randn(6, 2), torch.randn(6, 3)
    routing = experts.Routing(torch.tensor([1, 1, 3, 4]))
    kept = experts.columns.keep_input(b, torch.zeros(E, 2, dtype=torch.int64), routing)
    assert kept.shape == (6, 2)
    product = experts.rows.gradient(a.repeat(1, 4)[:, :OUT], b, torch.tensor(INDEX), routing)
    same = experts.rows.gradient(a.repeat(1, 4)[:4, :OUT], b[:4], torch.tensor(INDEX), routing)
    torch.testing.assert_close(product, same)
    assert torch.equal(product[1], torch.zeros(3, 3))


@pytest.mark.parametrize("part", ["rows", "columns"])
def test_lora_factors_make_up_the_change_of_every_expert_exactly(part):
    _, fused, weight, index, delta, changed = _case(part, torch.float32)
    a, b = fused.lora_factors(delta, index, OUT if part == "rows" else IN)
    dense = fused.put(torch.zeros_like(weight), index, delta)
    assert torch.equal(b @ a, dense)
    torch.testing.assert_close(weight + b @ a, changed)


class _Experts(nn.Module):
    has_gate, is_transposed = True, True

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(E, IN, OUT))
        self.up_proj_bias = nn.Parameter(torch.randn(E, OUT))
        self.scaled = nn.Parameter(torch.zeros(E, IN, OUT, dtype=torch.float8_e4m3fn), requires_grad=False)


def test_fused_weights_are_found_with_their_layout_and_biases():
    found = experts.fused_weights(_Experts())
    assert list(found) == ["up_proj"]
    fused = found["up_proj"]
    assert fused.shape == (E, OUT, IN)
    assert fused.bias is fused.module.up_proj_bias
    assert [name for name, _ in fused.named_parameters()] == ["weight", "bias"]
    fused.matrices(values=True)[1].zero_()
    assert not fused.weight[1].any()
    assert experts.fused_weights(nn.Conv1d(2, 3, 4)) == {}
