"""An adapter as a thing on disk: safe reading, the manifest that ties it to its base, inspection, merging, export.

Files are peft's (``adapter_config.json`` and ``adapter_model.safetensors``); ``turnrow.json`` beside them is ours.
"""

from __future__ import annotations

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.algebra import Composition, Regrouping, compose, interpolate, regroup, scale, subtract
from turnrow.adapters.base_model import load_base, load_for_task, load_processor, skeleton
from turnrow.adapters.changes import (
    ModelChanges,
    WeightChange,
    adapter_changes,
    merged_changes,
    model_changes,
    original_weights,
    reads_without_base,
)
from turnrow.adapters.extraction import Extraction, extract_adapter
from turnrow.adapters.inspection import AdapterSummary, ModuleSummary, inspect_adapter
from turnrow.adapters.loading import load_adapter
from turnrow.adapters.lora import export_lora
from turnrow.adapters.lora_rules import BrokenRule, broken_rules, max_lora_rank
from turnrow.adapters.manifest import write_manifest
from turnrow.adapters.merging import MergeResult, merge_adapter
from turnrow.adapters.quantization import needed_package, quantization_config
from turnrow.adapters.reading import read_adapter
from turnrow.adapters.road_import import RoadImport, import_road
from turnrow.adapters.road_lora import RoadExport, export_road_lora
from turnrow.adapters.sharded import save_adapter, whole_state_dict
from turnrow.adapters.streaming import (
    MergePlan,
    merge_files,
    plan_merge,
    store_originals,
    unmerge_files,
    why_not_stream,
)

__all__ = [
    "AdapterFile",
    "AdapterSummary",
    "BrokenRule",
    "Composition",
    "Extraction",
    "MergePlan",
    "MergeResult",
    "ModelChanges",
    "ModuleSummary",
    "Regrouping",
    "RoadExport",
    "RoadImport",
    "WeightChange",
    "adapter_changes",
    "broken_rules",
    "compose",
    "export_lora",
    "export_road_lora",
    "extract_adapter",
    "import_road",
    "inspect_adapter",
    "interpolate",
    "load_adapter",
    "load_base",
    "load_for_task",
    "load_processor",
    "max_lora_rank",
    "merge_adapter",
    "merge_files",
    "merged_changes",
    "model_changes",
    "needed_package",
    "original_weights",
    "plan_merge",
    "quantization_config",
    "read_adapter",
    "reads_without_base",
    "regroup",
    "save_adapter",
    "scale",
    "skeleton",
    "store_originals",
    "subtract",
    "unmerge_files",
    "whole_state_dict",
    "why_not_stream",
    "write_manifest",
]
