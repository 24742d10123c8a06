"""What a forward changes in its own model, one thread at a time.

A forward may find that the adapter is not in the weight yet, and put it there. Forwards of several threads run side by side,
so the first one does it while the others wait, and they find it done.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["one_at_a_time"]

_lock = threading.RLock()
"""One for all models: held for a moment, and a lock of its own in each layer could be neither copied nor pickled."""


def one_at_a_time() -> AbstractContextManager:
    """In this block no other thread is. Code that `torch.compile` traces takes no part: it changes nothing."""
    return nullcontext() if torch.compiler.is_compiling() else _lock
