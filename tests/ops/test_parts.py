"""Rows, columns and entries: the same claims for all, against the dense matrix written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnrow.ops import columns, entries, rows
from turnrow.ops.delta import adapted

ALL = pytest.mark.parametrize("ops", [rows, columns, entries], ids=["rows", "columns", "entries"])
BOTH = pytest.mark.parametrize("ops", [rows, columns], ids=["rows", "columns"])


def _case(ops, out_features=7, in_features=5, index=(4, 0, 2), dtype=torch.float64):
    weight = torch.randn(out_features, in_features, dtype=dtype)
    index = torch.tensor(sorted(index) if ops is entries else index)
    delta = torch.randn(ops.shape(out_features, in_features, len(index)), dtype=dtype)
    dense = torch.zeros_like(weight)
    if ops is rows:
        dense[index] = delta
    elif ops is columns:
        dense[:, index] = delta
    else:
        dense.view(-1)[index] = delta
    return weight, index, delta, dense


@ALL
@pytest.mark.parametrize("leading", [(3,), (2, 3), (0,), ()])
def test_overlay_equals_the_changed_weight(ops, leading):
    weight, index, delta, dense = _case(ops)
    x = torch.randn(*leading, 5, dtype=torch.float64)
    y = ops.overlay(x @ weight.t(), x, delta, index)
    torch.testing.assert_close(y, x @ (weight + dense).t())


@BOTH
def test_overlay_on_narrow_activations_keeps_no_wider_copy_of_them(ops):
    weight, index, delta, dense = _case(ops, dtype=torch.float32)
    x = torch.randn(8, 5).bfloat16().requires_grad_()
    delta.requires_grad_()
    kept = []

    def keep(tensor):
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = ops.overlay(x @ weight.t().bfloat16(), x, delta, index)
    assert y.dtype == torch.bfloat16
    assert all(dtype == torch.bfloat16 for dtype, numel in kept if numel >= x.numel() and dtype.is_floating_point)
    torch.testing.assert_close(y.float(), x.float() @ (weight + dense).t(), rtol=2**-6, atol=2**-6)


@ALL
def test_put_writes_what_the_dense_change_says_and_keep_undoes_it(ops):
    weight, index, delta, dense = _case(ops)
    changed = weight.clone()
    kept = ops.keep(changed, index)
    ops.put_(changed, index, adapted(kept, delta))
    torch.testing.assert_close(changed, weight + dense, rtol=0, atol=0)
    ops.put_(changed, index, kept)
    assert torch.equal(changed, weight)


@ALL
def test_put_writes_through_a_transposed_view(ops):
    weight, index, delta, dense = _case(ops)
    stored = weight.t().contiguous()
    ops.put_(stored.t(), index, adapted(ops.keep(stored.t(), index), delta))
    assert torch.equal(stored, (weight + dense).t())


@ALL
def test_attached_gradient_passes_gradcheck_against_the_overlay(ops):
    weight, index, delta, dense = _case(ops)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    delta.requires_grad_()
    live = weight + dense
    y = ops.attach_gradient(torch.nn.functional.linear(x, live), x, delta, index)
    expected = ops.overlay(x @ weight.t(), x, delta, index)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, (x, delta), dy), torch.autograd.grad(expected, (x, delta), dy), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(lambda x, d: ops.overlay(x @ weight.t(), x, d, index), (x, delta))


@ALL
def test_the_output_may_be_overwritten_by_its_reader(ops):
    weight, index, delta, _ = _case(ops)
    x = torch.randn(4, 5, dtype=torch.float64)
    delta.requires_grad_()
    y = ops.attach_gradient(x @ weight.t(), x, delta, index)
    y += 1  # what a model with in-place activations or residuals does
    y.sum().backward()
    assert delta.grad is not None
    assert delta.grad.abs().sum() > 0


@ALL
def test_an_optimizer_step_between_forward_and_backward_is_noticed(ops):
    weight, index, delta, _ = _case(ops)
    delta.requires_grad_()
    x = torch.randn(4, 5, dtype=torch.float64)
    y = ops.attach_gradient(x @ weight.t(), x, delta, index)
    with torch.no_grad():
        delta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@ALL
def test_a_second_derivative_is_refused_instead_of_wrong(ops):
    weight, index, delta, _ = _case(ops)
    delta.requires_grad_()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = ops.attach_gradient(x @ weight.t(), x, delta, index)
    (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@BOTH
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_lora_factors_are_the_dense_change_exactly(ops, data):
    out_features, in_features = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    size = out_features if ops is rows else in_features
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    _, index, delta, dense = _case(ops, out_features, in_features, tuple(index), torch.float32)
    a, b = ops.lora_factors(delta, index, size)
    assert a.shape == (len(index), in_features)
    assert b.shape == (out_features, len(index))
    assert torch.equal(b @ a, dense)


def test_columns_keep_only_the_chosen_features():
    kept = []
    x = torch.randn(100, 50, requires_grad=True)
    delta = torch.zeros(8, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        columns.attach_gradient(torch.zeros(100, 8), x, delta, torch.arange(3))
    assert [tuple(t.shape) for t in kept if t is not delta] == [(100, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_once_from_the_float32_sum(dtype):
    kept, delta = torch.full((1, 4), 1.0, dtype=dtype), torch.full((1, 4), 2.0**-9)
    # A delta too small for one step of the half-precision weight is not lost: it counts once it has grown.
    assert adapted(kept, 8 * delta).dtype == dtype
    assert torch.equal(adapted(kept, 8 * delta).float(), torch.full((1, 4), 1 + 2.0**-6))


@BOTH
def test_gradient_under_autocast_is_float32_and_close(ops):
    weight, index, delta, dense = _case(ops, dtype=torch.float32)
    x, dy = torch.randn(64, 5), torch.randn(64, 7)
    delta.requires_grad_()
    exact = (dy[:, index].t() @ x) if ops is rows else (dy.t() @ x[:, index])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.attach_gradient(torch.nn.functional.linear(x, weight + dense), x, delta, index)
        assert y.dtype == torch.bfloat16
        y.backward(dy.to(torch.bfloat16))  # inside the context, as careless loops do
    assert delta.grad is not None
    assert delta.grad.dtype == torch.float32
    torch.testing.assert_close(delta.grad, exact, rtol=0.05, atol=0.15)


@BOTH
def test_no_gradient_is_copied_for_a_layer_with_a_bias(ops):
    weight, index, delta, _ = _case(ops)
    delta.requires_grad_()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.linear(x, weight, torch.zeros(7, dtype=torch.float64))
    assert y._is_view()  # of the two-dimensional product: without this the test proves nothing
    attached = ops.attach_gradient(y, x, delta, index)
    assert attached.shape == (2, 3, 7)
    seen, todo = set(), [attached.grad_fn]
    while todo:
        node = todo.pop()
        seen.add(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert "CopySlices" not in seen
    attached += 1  # a reader may still overwrite it
    attached.sum().backward()
    assert delta.grad is not None
