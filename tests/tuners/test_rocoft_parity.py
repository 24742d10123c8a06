"""RoCoFT against Algorithm 1 of the paper, written here from its text: a weight put together of trained and frozen rows."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from turnrow import RocoftConfig


class Algorithm1(nn.Module):
    """Rows or columns S of W are a parameter, the rest is a buffer; the weight is put together at every forward."""

    def __init__(self, linear: nn.Linear, index: list[int], mode: str) -> None:
        super().__init__()
        dim = 0 if mode == "row" else 1
        rest = [i for i in range(linear.weight.shape[dim]) if i not in index]
        weight = linear.weight.detach()
        self.trained = nn.Parameter(weight.index_select(dim, torch.tensor(index)).clone())
        self.register_buffer("frozen", weight.index_select(dim, torch.tensor(rest)).clone())
        self.order = torch.tensor([*index, *rest]).argsort()
        self.dim, self.bias = dim, None if linear.bias is None else linear.bias.detach()

    def forward(self, x):
        weight = torch.cat((self.trained, self.frozen), self.dim).index_select(self.dim, self.order)
        return nn.functional.linear(x, weight, self.bias)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 16)
        self.second = nn.Linear(16, 12, bias=False)

    def forward(self, x):
        return self.second(torch.nn.functional.gelu(self.first(x)))


@pytest.mark.parametrize("mode", ["row", "column"])
@pytest.mark.parametrize("index", [[0, 1, 2], [7, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_gradients_and_training_agree_with_algorithm_1(mode, index, dtype):
    torch.manual_seed(0)
    network = Network().to(dtype)
    reference = Network().to(dtype)
    reference.load_state_dict(network.state_dict())
    reference.first = Algorithm1(reference.first, index, mode)
    reference.second = Algorithm1(reference.second, index, mode)
    ours = get_peft_model(network, RocoftConfig(mode=mode, indices=index, target_modules=["first", "second"]))

    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1, momentum=0.9) for m in (ours, reference)
    ]
    for _ in range(5):
        x = torch.randn(4, 3, 10, dtype=dtype)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [m(i) for m, i in zip((ours, reference), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        for y in outputs:
            y.square().mean().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (ours, reference)]
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["row", "column"])
def test_weight_decay_pulls_towards_the_pretrained_weights(mode):
    network = Network()
    before = network.first.weight.detach().clone()
    model = get_peft_model(network, RocoftConfig(mode=mode, r=2, target_modules=["first"]))
    delta = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        delta.fill_(1.0)
    optimizer = torch.optim.AdamW([delta], lr=0.1, weight_decay=1.0)
    delta.grad = torch.zeros_like(delta)
    for _ in range(100):
        optimizer.step()
    model(torch.randn(1, 10))
    torch.testing.assert_close(network.first.weight, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["row", "column"])
def test_functional_transforms_see_the_exact_jacobian(mode):
    model = get_peft_model(Network().double(), RocoftConfig(mode=mode, r=2, target_modules=["first", "second"]))
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(3, 10, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).sum(0))(parameters)
    y = model(x).sum(0)
    for output in range(12):
        gradients = torch.autograd.grad(
            y[output], [p for p in model.parameters() if p.requires_grad], retain_graph=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(jacobian[name][output], gradient)
