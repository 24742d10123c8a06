"""How many bytes of tensors are alive, now and at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]

# A sparse tensor has no storage of its own, its indices and values have.
_PARTS: dict[torch.layout, tuple[Callable[[Tensor], Tensor], ...]] = {
    torch.sparse_coo: (Tensor._indices, Tensor._values),
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices, Tensor.values),
    torch.sparse_bsr: (Tensor.crow_indices, Tensor.col_indices, Tensor.values),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices, Tensor.values),
    torch.sparse_bsc: (Tensor.ccol_indices, Tensor.row_indices, Tensor.values),
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made by torch operators inside the context that are alive, now and at the peak.

    It sees what operators return, on any device, and of tensors without values (meta, FakeTensor) what they would take;
    workspace inside one operator is not seen. Backward on CPU runs in the calling thread and is seen too; for CUDA use
    the allocator's own counters instead. torch's own `MemTracker` hooks every parameter, which a frozen one refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count the storages that it made."""
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:
            # By address of the storage's own record: that of the data is 0 for all tensors without values.
            given = {s._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) for s in _storages(t)}
            for tensor in made:
                for storage in _storages(tensor):
                    if storage._cdata not in given:
                        self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._release, size).atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _release(self, size: int) -> None:
        self.now -= size


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    parts = _PARTS.get(tensor.layout)
    return [part(tensor).untyped_storage() for part in parts] if parts else [tensor.untyped_storage()]
