"""Distributed interchange interventions: what a model says when parts of its states come from other inputs."""

from __future__ import annotations

from turnrow.analysis.interchange.alignment import Counterfactual, align, interchange_accuracy, logits_of
from turnrow.analysis.interchange.equation import dii, exchanged, road_intervention
from turnrow.analysis.interchange.hooks import read_states
from turnrow.analysis.interchange.interchange import Batch, Interchange, Intervention, Part, SourceStates
from turnrow.analysis.interchange.maps import BlockRotation, Dense, Identity, Map, Orthogonal
from turnrow.analysis.interchange.sites import Positions, Site

__all__ = [
    "Batch",
    "BlockRotation",
    "Counterfactual",
    "Dense",
    "Identity",
    "Interchange",
    "Intervention",
    "Map",
    "Orthogonal",
    "Part",
    "Positions",
    "Site",
    "SourceStates",
    "align",
    "dii",
    "exchanged",
    "interchange_accuracy",
    "logits_of",
    "read_states",
    "road_intervention",
]
