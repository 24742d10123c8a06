"""Whether what the factors say of a parameter is what autograd says, on one batch with random weights of its samples.

A model may compute with a weight outside of the module that owns it, or hand a module the tokens of all samples in an order
of its own (a router of experts). Then X and G do not tell the samples apart, or not everything. So before a pass every watched
layer is compared with autograd: sum_i w_i d f_c(x_i), for random w and one c.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from turnrow.analysis.ntk.factors import Batch, Call, Outputs, Unseparable, batch_size, record
from turnrow.analysis.ntk.layout import Layout, kind_of
from turnrow.analysis.ntk.terms import Term

__all__ = ["disagreeing", "without_padding"]


def disagreeing(layout: Layout, batch: Batch, outputs: Outputs, terms: Iterable[Term], copied: set[str]) -> set[str]:
    """Keys of the terms whose factors do not give their gradient. The model is frozen, the batch on its device.

    Of a part of a weight, or of what an adapter adds to a layer, the weight itself is compared. A weight that has no gradient
    (a quantized one) cannot be.
    """
    asked = {term.key: _parameter_of(layout, term) for term in terms}
    sharing = {module for names in asked.values() for name in names for module, _ in layout.owners[name]}
    sharing |= {module for term in terms for module in term.modules}
    watched = {name: module for name, module in layout.modules.items() if name in sharing and kind_of(module)}
    named = {name: layout.parameters[name] for names in asked.values() for name in names}
    named = {name: p for name, p in named.items() if p.is_floating_point()}
    # On the device of the model a generator may not be had.
    weights = torch.randn(batch_size(batch), generator=torch.Generator().manual_seed(0))
    with _trainable(named.values()):
        recording = record(layout.model, batch, outputs, watched, copied)
        f = recording.f
        column = next((c for c in range(f.shape[1]) if f[:, c].requires_grad), 0)
        gradients, _ = recording.gradients(f[:, column].sum())
        weights = weights.to(f.device, f.dtype)
        expected = torch.autograd.grad((weights * f[:, column]).sum(), list(named.values()), allow_unused=True)
    calls = recording.calls([gradients])
    by_name = dict(zip(named, expected, strict=True))
    agrees = {
        name: _agrees(
            layout,
            name,
            [call for module, _ in layout.owners[name] for call in calls.get(module, [])],
            gradient,
            weights,
        )
        for name, gradient in by_name.items()
    }
    return {key for key, names in asked.items() if not all(agrees.get(name, True) for name in names)}


def _parameter_of(layout: Layout, term: Term) -> list[str]:
    if term.parameter is not None:
        return [term.parameter]
    return [layout.named[name, "weight"] for name in term.modules if (name, "weight") in layout.named]


def _agrees(layout: Layout, name: str, calls: list[Call], expected: Tensor | None, weights: Tensor) -> bool:
    attributes = {id(layout.modules[module]): attribute for module, attribute in layout.owners[name]}
    shape = layout.parameters[name].shape
    total = torch.zeros(shape, dtype=torch.promote_types(weights.dtype, torch.float32), device=weights.device)
    size = 0.0
    try:
        for call in calls:
            gradient, its_size = _weighted(call, attributes[id(call.module)], weights.to(total.dtype), shape)
            total += gradient
            size += its_size
    except Unseparable:
        return False
    if expected is None:
        expected = torch.zeros_like(total)
    off = float((total - expected).norm())
    # Wide enough for the norms that compute in float32 whatever they are given; samples that are mixed up are off by about 1.
    tolerance = min(0.1, max(1e-4, 1000 * torch.finfo(layout.parameters[name].dtype).eps))
    return off <= tolerance * max(size, float(expected.norm()))


def _weighted(call: Call, attribute: str, weights: Tensor, shape: torch.Size) -> tuple[Tensor, float]:
    """The gradient of a parameter summed over samples with weights, and how large it might be without cancelling."""
    kind = kind_of(call.module)
    if kind == "leaf":
        gradient = call.leaf_gradient(attribute)[:, 0]
        size = sum(float(g.abs().sum()) for g in call.gradients) * float(weights.abs().max())
        return (weights @ gradient).view(shape), size
    g = call.g[:, 0] * weights[:, None, None]  # (B, T, out)
    if attribute == "bias":
        return g.sum((0, 1)), float(_lengths(g).sum())
    if kind == "embedding":
        ids = call.x.flatten()
        g = without_padding(call, g.unsqueeze(1)).squeeze(1).flatten(0, 1)
        return torch.zeros(shape, dtype=g.dtype, device=g.device).index_add_(0, ids, g), float(_lengths(g).sum())
    x = call.x
    product = torch.einsum("bto,bti->oi", g, x)
    size = float((_lengths(g) * _lengths(x)).sum())
    return (product.t() if isinstance(call.module, Conv1D) else product), size


def _lengths(vectors: Tensor) -> Tensor:
    """Of vectors along the last dimension; `norm` is many times slower on a CPU."""
    return vectors.square().sum(-1).sqrt()


def without_padding(call: Call, g: Tensor) -> Tensor:
    """Gradients (B, C, T, d) of what an embedding returned, zero where it looked up its padding, which is never trained."""
    table: nn.Module = call.module
    padding = getattr(table, "padding_idx", None)
    return g if padding is None else g.masked_fill((call.x == padding)[:, None, :, None], 0.0)


@contextmanager
def _trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
