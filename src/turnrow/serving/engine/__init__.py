"""Who runs, the steps of the model, and the choice of tokens: one thread for all requests."""

from __future__ import annotations

from turnrow.serving.engine.engine import Engine, EngineStats
from turnrow.serving.engine.limits import Limits

__all__ = ["Engine", "EngineStats", "Limits"]
