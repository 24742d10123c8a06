"""Adapters by name: registered, checked, versioned, on disk and in host memory."""

from __future__ import annotations

from turnrow.serving.store.adapters import AdapterStore, Entry, Version
from turnrow.serving.store.names import BASE

__all__ = ["BASE", "AdapterStore", "Entry", "Version"]
