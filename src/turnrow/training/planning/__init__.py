"""What a run would take, before any weight is loaded."""

from __future__ import annotations

from turnrow.training.planning.figures import NOT_COVERED, BatchForecast, MethodPlan, Plan
from turnrow.training.planning.forecast import plan

__all__ = ["NOT_COVERED", "BatchForecast", "MethodPlan", "Plan", "plan"]
