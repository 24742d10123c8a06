"""Adapters as elements of an algebra: RoCoFT adapters add up, RoAd adapters multiply; the results are adapters again."""

from __future__ import annotations

from turnrow.adapters.algebra.operations import compose, interpolate, scale, subtract
from turnrow.adapters.algebra.regrouping import Regrouping, regroup
from turnrow.adapters.algebra.result import Composition

__all__ = ["Composition", "Regrouping", "compose", "interpolate", "regroup", "scale", "subtract"]
