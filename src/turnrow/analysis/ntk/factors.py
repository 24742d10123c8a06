"""One forward and one backward pass per output: what each layer got, and how each output changes with what it returned.

For sample i and output c, G = d f_c(x_i) / d H for the outputs H of a layer, and the gradient of anything that the layer is
made of follows from X, H and G without another pass. The backward pass of the sum over the batch, sum_i f_c(x_i), gives the G of all
samples at once, because no sample's output depends on another's input. The model is frozen meanwhile: no weight gets a
gradient, and the backward pass is that to the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from turnrow.errors import UserError
from turnrow.ops.delta import unviewed
from turnrow.ops.frozen import frozen

__all__ = [
    "Batch",
    "Call",
    "Outputs",
    "Recording",
    "Unseparable",
    "batch_size",
    "factors",
    "on_device_of",
    "ready_for_gradients",
    "record",
]

Batch = Mapping[str, Any]
"""Keyword arguments of a forward: input_ids, attention_mask, ..."""

Outputs = Callable[[nn.Module, Batch], Tensor]
"""From a model and a batch of B samples to f, (B, C): one number for each class."""


class Unseparable(Exception):
    """What a module was called with cannot be told apart by sample. Never leaves this room."""


@dataclass
class Call:
    """One call of a module, with the gradients of its output for each of C outputs of the model."""

    module: nn.Module
    inputs: tuple[Any, ...]
    output: Tensor
    batch: int
    """B, the number of samples."""
    gradients: Sequence[Tensor] = ()
    """For each output of the model, of the shape of the module's output."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    _crossed: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def x(self) -> Tensor:
        """Inputs of a linear layer, (B, T, in), in float32 at least; of an embedding its ids, (B, T)."""
        x = self.inputs[0]
        if not x.is_floating_point():
            return self._by_sample(x, 0)
        return widened(self._by_sample(x, 1))

    @property
    def h(self) -> Tensor:
        """Outputs of a linear layer, (B, T, out)."""
        return widened(self._by_sample(self.output, 1))

    @cached_property
    def g(self) -> Tensor:
        """(B, C, T, out): gradients of the outputs of the model with respect to those of a linear layer or embedding."""
        by_sample = [widened(self._by_sample(g.reshape(self.output.shape), 1)) for g in self.gradients]
        self.gradients = ()  # not kept twice
        return torch.stack(by_sample, dim=1)

    @cached_property
    def products(self) -> Tensor:
        """(B, C, out): sum over tokens of g_j h_j, for every output feature j of a linear layer."""
        return (self.g * self.h[:, None]).sum(2)

    def crossed_products(self, group_size: int) -> Tensor:
        """(B, C, out): sum over tokens of g_j h_k, for every output feature j and the k that RoAd pairs it with."""
        if group_size not in self._crossed:
            partners = self.h.unflatten(-1, (-1, 2, group_size // 2)).flip(-2).flatten(-3)
            self._crossed[group_size] = (self.g * partners[:, None]).sum(2)
        return self._crossed[group_size]

    def leaf_gradient(self, attribute: str) -> Tensor:
        """(B, C, p): gradients of a parameter of any module that treats every sample alone, by its own backward rule."""
        if type(self.module).forward is nn.LayerNorm.forward:
            return self._norm_gradient(attribute)
        parameters = {name: p.detach() for name, p in self.module.named_parameters(recurse=False)}
        keywords, module = dict(self.keywords), self.module
        moving = {attribute: parameters.pop(attribute)}
        if any(isinstance(value, Tensor) for value in keywords.values()):
            raise Unseparable
        inputs = tuple(one for one in self.inputs if isinstance(one, Tensor))
        if len(inputs) != len(self.inputs) or any(one.dim() == 0 or len(one) != self.batch for one in inputs):
            raise Unseparable
        if len(self.output) != self.batch:
            raise Unseparable

        def of_sample(inputs: tuple[Tensor, ...], g: Tensor) -> Tensor:
            def forward(moving: dict[str, Tensor]) -> Tensor:
                one = tuple(x.unsqueeze(0) for x in inputs)
                return torch.func.functional_call(module, parameters | moving, one, keywords).squeeze(0)

            pull: Callable[..., Any] = torch.func.vjp(forward, moving)[1]
            return torch.func.vmap(lambda cotangent: pull(cotangent)[0][attribute].flatten())(g)

        g = torch.stack([g.reshape(self.output.shape) for g in self.gradients], dim=1)
        try:
            return widened(torch.func.vmap(of_sample)(inputs, g))
        except RuntimeError as error:  # what the module does cannot be done for all samples at once
            raise Unseparable from error

    def _norm_gradient(self, attribute: str) -> Tensor:
        """(B, C, p) of torch's LayerNorm: sum over tokens of g, or of g times what was normalized."""
        norm: Any = self.module
        kept = len(norm.normalized_shape)
        g = torch.stack([widened(self._by_sample(g.reshape(self.output.shape), kept)) for g in self.gradients], dim=1)
        if attribute == "weight":
            x = nn.functional.layer_norm(widened(self.inputs[0]), norm.normalized_shape, eps=norm.eps)
            g = g * self._by_sample(x, kept)[:, None]
        return g.sum(2).flatten(2)

    def _by_sample(self, values: Tensor, trailing: int) -> Tensor:
        """(B, T, ...): with as many trailing dimensions kept, those between them and the samples as one."""
        if values.dim() > trailing and len(values) % self.batch == 0:
            return values.reshape(self.batch, -1, *values.shape[values.dim() - trailing :])
        raise Unseparable


@dataclass
class _Pending:
    call: Call
    edge: GradientEdge
    versions: tuple[tuple[Tensor, int], ...]


class Recording:
    """The outputs f of a batch and the calls of the watched modules, as long as their graph lives."""

    def __init__(self, f: Tensor, pending: Mapping[str, list[_Pending]]) -> None:
        self.f = f
        self._pending = pending

    def gradients(self, of: Tensor, *more: Tensor, keep: bool = True) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        """Gradients of a number with respect to the outputs of all calls in order, and to further tensors."""
        calls = [one for calls in self._pending.values() for one in calls]
        wanted: list[Any] = [*(one.edge for one in calls), *more]
        found: Any = torch.autograd.grad(of, wanted, retain_graph=keep, allow_unused=True)
        dense = [
            torch.zeros_like(one.call.output) if g is None else g
            for one, g in zip(calls, found[: len(calls)], strict=True)
        ]
        return dense, found[len(calls) :]

    def calls(self, gradients: Sequence[Sequence[Tensor]]) -> dict[str, list[Call]]:
        """The calls by module, with what `gradients` returned for each output of the model."""
        by_call = iter(zip(*gradients, strict=True))
        for calls in self._pending.values():
            for one in calls:
                one.call.gradients = next(by_call)
        return {name: [one.call for one in calls] for name, calls in self._pending.items()}


def record(
    model: nn.Module, batch: Batch, outputs: Outputs, modules: Mapping[str, nn.Module], copied: set[str] | None = None
) -> Recording:
    """Run a frozen model on a batch and note what the modules were called with.

    Args:
        model: in evaluation mode, see `ready_for_gradients`.
        batch: on the model's device.
        outputs: f.
        modules: those to watch, by name.
        copied: names of modules whose tensors are copied because the model overwrites them. Names are added where that turns
            out to be so, and the forward is run again.

    Raises:
        UserError: f is not of shape (B, C), or no gradient reaches it.
    """
    copied = set() if copied is None else copied
    while True:
        watch = _Watch(batch_size(batch), copied)
        with ExitStack() as undo:
            for name, module in modules.items():
                if type(module).forward is nn.Embedding.forward:
                    undo.callback(module.register_forward_pre_hook(watch.spread).remove)
                hook = module.register_forward_hook(partial(watch.called, name), with_kwargs=True)
                undo.callback(hook.remove)
            f = outputs(model, batch)
        overwritten = watch.overwritten()
        if not overwritten:
            break
        copied |= overwritten
    _check_outputs(f, batch)
    return Recording(f, watch.pending)


def factors(
    model: nn.Module, batch: Batch, outputs: Outputs, modules: Mapping[str, nn.Module]
) -> tuple[Tensor, dict[str, list[Call]]]:
    """f of a batch, (B, C), and for each module its calls, from which X, H and G can be read.

    Args:
        model: as it is before, so it is afterwards: training mode, `requires_grad`, hooks.
        batch: tensors are moved to the model's device.
        outputs: f.
        modules: the modules to watch, by name.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> batch = {"input": torch.ones(3, 2)}
        >>> f, calls = factors(layer, batch, lambda model, batch: model(**batch), {"": layer})
        >>> [tuple(calls[""][0].x.shape), tuple(calls[""][0].g.shape)]
        [(3, 1, 2), (3, 1, 1, 1)]
    """
    with ready_for_gradients(model):
        recording = record(model, on_device_of(model, batch), outputs, modules)
        classes = recording.f.shape[1]
        gradients = [recording.gradients(recording.f[:, c].sum(), keep=c < classes - 1)[0] for c in range(classes)]
        return recording.f.detach(), recording.calls(gradients)


class _Watch:
    def __init__(self, batch: int, copied: set[str]) -> None:
        self.pending: dict[str, list[_Pending]] = {}
        self._batch = batch
        self._copied = copied
        # All that a frozen model computes from here on has a gradient. A number without dimensions goes with any tensor.
        self._start = torch.zeros((), requires_grad=True)

    def spread(self, module: nn.Module, args: tuple) -> tuple | None:
        """Ask the positions, which are the same for all samples, once for each: then their gradients differ by sample."""
        ids = args[0] if args else None
        if isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1 and ids.shape[1] > 1 and self._batch > 1:
            return (ids.expand(self._batch, -1), *args[1:])
        return None

    def called(self, name: str, module: nn.Module, args: tuple, keywords: dict, output: Any) -> Any:
        """Forward hook."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        if not args and len(keywords) == 1:
            args, keywords = tuple(keywords.values()), {}
        changed = not output.requires_grad
        if changed:
            output = output + self._start.to(output.device, output.dtype)
        # Where the model overwrites a view, the view itself is no longer a part of the graph, but what it is a view of is.
        whole = unviewed(output)
        edge = get_gradient_edge(whole if whole.requires_grad else output)
        kept = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        value = output.detach()
        if name in self._copied:
            kept = tuple(x.clone() if isinstance(x, Tensor) else x for x in kept)
            value = value.clone()
        versions = tuple((x, x._version) for x in (*kept, value) if isinstance(x, Tensor))
        call = Call(module, kept, value, self._batch, keywords=keywords)
        self.pending.setdefault(name, []).append(_Pending(call, edge, versions))
        return output if changed else None

    def overwritten(self) -> set[str]:
        """Modules whose inputs or outputs are no longer what they were when they were called."""
        return {
            name
            for name, calls in self.pending.items()
            if any(x._version != version for one in calls for x, version in one.versions)
        }


def _check_outputs(f: Any, batch: Batch) -> None:
    size = batch_size(batch)
    if not isinstance(f, Tensor) or f.dim() != 2 or len(f) != size or f.shape[1] == 0:
        what = f"of shape {tuple(f.shape)}" if isinstance(f, Tensor) else f"a {type(f).__name__}"
        raise UserError(
            f"outputs returned {what} for a batch of {size}; it must return a tensor ({size}, C), a number for each class"
        )
    if not f.requires_grad:
        raise UserError(
            "what outputs returned depends on none of the layers that the kernels are made of, or was detached from them; "
            "compute it from the model's outputs with operations that have gradients"
        )


def batch_size(batch: Batch) -> int:
    """B: the length of the first tensor.

    Raises:
        UserError: the batch is no mapping or holds no tensors.
    """
    if not isinstance(batch, Mapping):
        raise UserError(
            f"a batch is a {type(batch).__name__}; it must be a mapping of the model's arguments, such as "
            "{'input_ids': ..., 'attention_mask': ...}"
        )
    size = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)
    if size == 0:
        raise UserError(
            f"a batch with {', '.join(map(repr, batch)) or 'nothing in it'} has no samples; it needs tensors (B, ...)"
        )
    return size


def on_device_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch with its tensors on the device of the model."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def ready_for_gradients(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on and no trainable parameter in this block; afterwards as before."""
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        yield


def widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
