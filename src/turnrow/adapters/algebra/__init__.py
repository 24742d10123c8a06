"""Adapters as elements of an algebra: RoCoFT adapters add up, RoAd adapters multiply; the results are adapters again."""

from __future__ import annotations

from turnrow.adapters.algebra.operations import Composition, compose, interpolate, scale, subtract

__all__ = ["Composition", "compose", "interpolate", "scale", "subtract"]
