"""Factors between the pass that makes them and the products that need them: in memory up to a limit, then in a file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from torch import Tensor

__all__ = ["FactorStore", "Handle"]


@dataclass(frozen=True)
class _Written:
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    device: torch.device


Handle = Tensor | _Written
"""What `put` returns and `get` takes."""


class FactorStore:
    """Tensors that are written once and read often.

    Args:
        limit: bytes that stay in memory; what comes later goes to a file that no one else can open and that is gone when the
            store is closed. It lies where temporary files do (``TMPDIR``).
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._file: IO[bytes] | None = None
        self.written_bytes = 0

    def put(self, tensor: Tensor) -> Handle:
        """Keep a tensor; it must not be changed afterwards."""
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            # What is kept must not hold a larger storage alive.
            is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
            return tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="turnrow-factors-")  # noqa: SIM115 - closed by `close`
        values = tensor.detach().cpu().contiguous().numpy()
        handle = _Written(self.written_bytes, tuple(tensor.shape), values.dtype, tensor.device)
        self._file.seek(handle.offset)
        self._file.write(values.data)
        self.written_bytes += values.nbytes
        return handle

    def get(self, handle: Handle) -> Tensor:
        """The tensor, on the device where it was."""
        if isinstance(handle, Tensor):
            return handle
        if self._file is None:
            raise RuntimeError("the store is closed")
        self._file.seek(handle.offset)
        count = int(np.prod(handle.shape))
        values = np.fromfile(self._file, dtype=handle.dtype, count=count)
        return torch.from_numpy(values).reshape(handle.shape).to(handle.device)

    def close(self) -> None:
        """Give the file's room back."""
        if self._file is not None:
            self._file.close()
            self._file = None
