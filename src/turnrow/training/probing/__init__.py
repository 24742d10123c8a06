"""Which method will do, before any training: few-shot kernels of all methods on the user's own data and model.

Near its pretrained weights a model is almost linear in what is trained, so that fine-tuning by a method is regression with the method's
tangent kernel (`turnrow.analysis.ntk`). A probe draws a few rows of each class, finds the kernels of all candidates in one pass, trains on
them by kernel logistic regression, and looks at held-out rows; beside that stand parameters, memory and the seconds of a training step.
What such advice is worth was measured: docs/probe.md.
"""

from __future__ import annotations

from turnrow.training.probing.figures import MethodProbe, Probe
from turnrow.training.probing.probe import probe
from turnrow.training.probing.report import draw_probe, write_probe

__all__ = ["MethodProbe", "Probe", "draw_probe", "probe", "write_probe"]
