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


def _masked_steps(network, mask, steps, lr):
    """What an adapter trains, by plain means: the whole weight is a parameter and its gradient is masked."""
    optimizer = torch.optim.AdamW([network.first.weight], lr=lr, weight_decay=0.0)
    for x in steps:
        network(x).square().mean().backward()
        network.first.weight.grad.mul_(mask)
        optimizer.step()
        network.zero_grad()


@pytest.mark.parametrize("mode", ["row", "column", "row+column", "entry"])
def test_training_agrees_with_the_whole_weight_under_a_mask(mode):
    torch.manual_seed(0)
    network, reference = Network().double(), Network().double()
    reference.load_state_dict(network.state_dict())
    indices = {
        "row": [4, 9],
        "column": [7, 0],
        "row+column": {"row": [4, 9], "column": [7, 0]},
        "entry": [159, 3, 40, 41],
    }
    mask = torch.zeros(16, 10, dtype=torch.bool)
    if "row" in mode:
        mask[[4, 9]] = True
    if "column" in mode:
        mask[:, [7, 0]] = True
    if mode == "entry":
        mask.view(-1)[[159, 3, 40, 41]] = True
    density = 0.025 if mode == "entry" else None
    config = RocoftConfig(mode=mode, indices=indices[mode], density=density, target_modules=["first"])
    ours = get_peft_model(network, config)
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == mask.sum()  # the crossing of rows and columns counts once

    steps = [torch.randn(4, 3, 10, dtype=torch.float64) for _ in range(5)]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    for x in steps:
        ours(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    _masked_steps(reference, mask, steps, lr=0.05)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged.first.weight, reference.first.weight)


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


@pytest.mark.parametrize("mode", ["row", "column", "row+column", "entry"])
def test_functional_transforms_see_the_exact_jacobian(mode):
    density = 0.1 if mode == "entry" else None
    config = RocoftConfig(mode=mode, r=2, density=density, target_modules=["first", "second"])
    model = get_peft_model(Network().double(), config)
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
