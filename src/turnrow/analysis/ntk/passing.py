"""The pass over the data: each batch once forward and once backward per output, its factors packed and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnrow.analysis.ntk.checking import disagreeing, without_padding
from turnrow.analysis.ntk.factors import Batch, Call, Outputs, Unseparable, batch_size, on_device_of, record, widened
from turnrow.analysis.ntk.gram import Samples
from turnrow.analysis.ntk.layout import Layout, kind_of
from turnrow.analysis.ntk.slices import StoredVectors
from turnrow.analysis.ntk.store import FactorStore, Handle
from turnrow.analysis.ntk.terms import Term, Vector, Weight, one_by_one
from turnrow.analysis.ntk.token_factors import TokenFactors
from turnrow.errors import UserError

__all__ = ["FactorPass"]


@dataclass(frozen=True)
class _Packed:
    """The factors of one module for one batch, without the tokens that no output depends on."""

    x: Handle
    g: Handle
    tokens: int


class FactorPass:
    """What some terms need of every batch.

    Args:
        layout: of a model that is frozen as long as batches are added.
        terms: each once.
        outputs: f.
        memory: bytes of factors that stay in memory; the others go to a file.
        largest: samples in the largest batch.
    """

    def __init__(self, layout: Layout, terms: Sequence[Term], outputs: Outputs, memory: int, largest: int) -> None:
        self._layout = layout
        self._terms = {term.key: term for term in terms}
        self._outputs = outputs
        self._store = FactorStore(memory)
        self._piece_bytes = max(1, memory // 16) // largest
        self._copied: set[str] = set()
        self._packed: dict[str, list[_Packed | None]] = {}
        self._vectors: dict[str, list[list[Handle]]] = {}
        self._pieces: dict[str, int] = {}
        self._sizes: list[int] = []
        self.f: list[np.ndarray] = []
        """Of each batch, (B, C) float64."""
        dtypes = [p.dtype for p in layout.parameters.values() if p.is_floating_point()]
        widest = max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
        device = next((p.device for p in layout.parameters.values() if p.device.type != "meta"), torch.device("cpu"))
        self.like = torch.empty(0, dtype=torch.promote_types(widest, torch.float32), device=device)
        """Of the dtype and device of all factors."""

    def __enter__(self) -> FactorPass:
        return self

    def __exit__(self, *exception: object) -> None:
        self._store.close()

    # --- before ----------------------------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> None:
        """Compare the factors of a batch with autograd; what is trained whole and differs is asked sample by sample.

        Raises:
            UserError: the factors of a part of a weight, or of what an adapter adds to a layer, differ.
        """
        seen = [term for term in self._terms.values() if term.modules]
        if not seen:
            return
        batch = on_device_of(self._layout.model, batch)
        for key in disagreeing(self._layout, batch, self._outputs, seen, self._copied):
            term = self._terms[key]
            if term.parameter is None:
                raise _mixes_samples(term.modules[0])
            self._terms[key] = one_by_one(self._layout, term.parameter)

    # --- during ----------------------------------------------------------------------------------------------------------

    def add(self, batch: Batch) -> None:
        """Run the model on a batch and keep its factors."""
        size = batch_size(batch)
        batch = on_device_of(self._layout.model, batch)
        watched = {name: self._layout.modules[name] for term in self._terms.values() for name in term.modules}
        if watched:
            recording = record(self._layout.model, batch, self._outputs, watched, self._copied)
            f = recording.f.detach()
            ends = [recording.f[:, c].sum() for c in range(f.shape[1])]
            gradients = [recording.gradients(end, keep=end is not ends[-1])[0] for end in ends]
            calls = recording.calls(gradients)
            del recording, ends, gradients  # and with them the graph
        else:
            with torch.no_grad():
                f, calls = self._outputs(self._layout.model, batch), {}
        if self.f and f.shape[1] != self.f[0].shape[1]:
            raise UserError(f"outputs returned {self.f[0].shape[1]} outputs for one batch and {f.shape[1]} for another")
        self.f.append(f.to("cpu", torch.float64).numpy())
        self._sizes.append(size)
        self._keep_vectors(batch, calls, f.shape[1])
        self._keep_factors(calls)

    def _keep_vectors(self, batch: Batch, calls: Mapping[str, list[Call]], classes: int) -> None:
        slow = [term for term in self._terms.values() if isinstance(term, Vector) and term.gradient is None]
        asked = self._sample_by_sample(batch, slow) if slow else {}
        for term in self._terms.values():
            if not isinstance(term, Vector):
                continue
            gradient = asked[term.key] if term.gradient is None else self._of_calls(term, calls, classes)
            piece = self._pieces.setdefault(term.key, max(1, self._piece_bytes // (classes * gradient.element_size())))
            parts = [self._store.put(part.contiguous()) for part in gradient.split(piece, dim=2)]
            self._vectors.setdefault(term.key, []).append(parts)

    def _of_calls(self, term: Vector, calls: Mapping[str, list[Call]], classes: int) -> Tensor:
        """(B, C, size), the sum over the calls of all modules of a term."""
        total: Tensor | None = None
        gradient_of: Callable[[Call], Tensor] | None = term.gradient
        for name in term.modules:
            for call in calls.get(name, []):
                try:
                    gradient = gradient_of(call) if gradient_of is not None else None
                except Unseparable:
                    raise _mixes_samples(name) from None
                if gradient is not None:
                    total = gradient if total is None else total + gradient
        return self.like.new_zeros(self._sizes[-1], classes, term.size) if total is None else total

    def _sample_by_sample(self, batch: Batch, terms: Sequence[Vector]) -> dict[str, Tensor]:
        """(B, C, size) by key, each sample by itself: slow, and right whatever the model does."""
        size = batch_size(batch)
        parameters = {t.key: self._layout.parameters[t.parameter] for t in terms if t.parameter is not None}
        found: dict[str, list[Tensor]] = {key: [] for key in parameters}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            for sample in range(size):
                one = {k: v[sample : sample + 1] if _is_batched(v, size) else v for k, v in batch.items()}
                f = self._outputs(self._layout.model, one)
                rows: list[tuple[Tensor | None, ...]] = []
                for c in range(f.shape[1]):
                    if f.requires_grad:
                        rows.append(
                            torch.autograd.grad(
                                f[0, c], list(parameters.values()), retain_graph=True, allow_unused=True
                            )
                        )
                    else:
                        rows.append((None,) * len(parameters))
                for (key, parameter), gradients in zip(parameters.items(), zip(*rows, strict=True), strict=True):
                    dense = [torch.zeros_like(parameter) if g is None else g for g in gradients]
                    found[key].append(torch.stack([widened(g).flatten() for g in dense]))
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
        return {key: torch.stack(gradients).to(self.like) for key, gradients in found.items()}

    def _keep_factors(self, calls: Mapping[str, list[Call]]) -> None:
        modules = dict.fromkeys(
            name for term in self._terms.values() if isinstance(term, Weight) for name in term.modules
        )
        # Query, key and value are made from the same inputs: kept once.
        known: list[tuple[tuple[Any, ...], Tensor | None, Handle]] = []
        for name in modules:
            packed = self._pack(name, calls[name], known) if name in calls else None
            self._packed.setdefault(name, []).append(packed)

    def _pack(
        self, name: str, calls: list[Call], known: list[tuple[tuple[Any, ...], Tensor | None, Handle]]
    ) -> _Packed | None:
        """Without the tokens that have no gradient: padding, and all but the first where only that one is read."""
        try:
            x, g = _joined([(call.x, self._gradient(call)) for call in calls])
        except Unseparable:
            raise _mixes_samples(name) from None
        if x is None or g is None:
            return None
        matters = g.abs().amax((1, 3)) != 0  # (B, T)
        kept = int(matters.sum(1).max())
        if kept == 0:
            return None
        order: Tensor | None = None
        if kept < matters.shape[1]:
            order = matters.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :kept]
            g = g.gather(2, order[:, None, :, None].expand(-1, g.shape[1], -1, g.shape[3]))
        raw = calls[0].inputs[0]
        same = (raw.data_ptr(), raw.shape, raw.dtype, len(calls))
        for key, its_order, handle in known if len(calls) == 1 else []:
            if key == same and _equal(its_order, order):
                return _Packed(handle, self._store.put(g), kept)
        if order is not None:
            x = x.gather(1, order if x.dim() == 2 else order[..., None].expand(-1, -1, x.shape[2]))
        handle = self._store.put(x)
        known.append((same, order, handle))
        return _Packed(handle, self._store.put(g), kept)

    def _gradient(self, call: Call) -> Tensor:
        g = call.g
        return without_padding(call, g) if kind_of(call.module) == "embedding" else g

    # --- after -----------------------------------------------------------------------------------------------------------

    def samples(self, train_batches: int) -> Samples:
        """The batches that were added, of which the first are those of training samples."""
        return Samples(tuple(self._sizes), train_batches, self.f[0].shape[1])

    def now(self, key: str) -> Term:
        """A term by its key, as `check` left it."""
        return self._terms[key]

    def vectors(self, term: Vector) -> StoredVectors:
        """The gradients of a few parameters."""
        return StoredVectors(self._store, self._vectors[term.key], self._pieces[term.key], term.size, self.like)

    def tokens(self, term: Weight) -> list[tuple[int, int]]:
        """For every batch the tokens of linear layers and of embeddings that share a weight."""
        counts = []
        for batch in range(len(self._sizes)):
            linear = looked_up = 0
            for name in term.modules:
                packed = self._packed[name][batch]
                if packed is not None and self._is_embedding(name):
                    looked_up += packed.tokens
                elif packed is not None:
                    linear += packed.tokens
            counts.append((linear, looked_up))
        return counts

    def load(self, term: Weight, batch: int) -> TokenFactors:
        """The factors of a weight, or of the part of it that is trained."""
        linear: list[tuple[Tensor, Tensor]] = []
        looked_up: list[tuple[Tensor, Tensor]] = []
        for name in term.modules:
            packed = self._packed[name][batch]
            if packed is not None:
                pair = (self._store.get(packed.x), self._store.get(packed.g))
                (looked_up if self._is_embedding(name) else linear).append(pair)
        x, g = _joined(linear)
        ids, e = _joined(looked_up)
        if x is not None and g is not None:
            if term.rows is not None:
                g = g.index_select(3, term.rows.to(g.device))
            if term.columns is not None:
                x = x.index_select(2, term.columns.to(x.device))
            if term.down is not None:
                x = x @ term.down.to(x)
        return TokenFactors(x, g, ids, e)

    def _is_embedding(self, name: str) -> bool:
        return kind_of(self._layout.modules[name]) == "embedding"


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, Tensor | None]:
    """The tokens of several modules behind one another."""
    if not pairs:
        return None, None
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([x for x, _ in pairs], dim=1), torch.cat([g for _, g in pairs], dim=2)


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _is_batched(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def _mixes_samples(module: str) -> UserError:
    return UserError(
        f"the factors of module {module!r} do not give its gradient sample by sample: the model computes with its weight elsewhere, "
        "or hands it the tokens of all samples in an order of its own; leave it out by `modules`, or give batches of one sample"
    )
