"""Adapter layers around modules of any kind, of which models read more than torch's layers have."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["AttributesOfBase"]


class AttributesOfBase(nn.Module):
    """What is not found here is looked up in the base layer: the epsilon of a norm, the number of experts."""

    def __getattr__(self, name: str) -> Any:
        """An attribute of this layer, else of the base layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)
