"""What a plan says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["NOT_COVERED", "BatchForecast", "MethodPlan", "Plan"]

NOT_COVERED = (
    "the process and its libraries (on GPUs the CUDA context)",
    "workspaces inside a kernel",
    "what the allocator rounds up and cannot reuse (fragmentation)",
    "data sets, evaluations and checkpoints",
)
"""What a run takes beyond the forecast."""

_FORMAT = 1


@dataclass(frozen=True)
class BatchForecast:
    """One batch size; None where the model's step depends on values, which are not here."""

    batch: int
    """Rows on one device, each as long as the plan's `sequence`."""
    saved_bytes: int | None
    """What a forward leaves behind for its backward."""
    peak_bytes: int | None
    """The most at any moment of training: weights, gradients, optimizer state, activations."""


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """What one method would take."""

    title: str
    method: dict[str, Any]
    """The `method` section of a recipe."""
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    base_bytes: int | None = None
    """Weights and buffers of the base model with its head."""
    adapter_bytes: int | None = None
    """What the method adds to them."""
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    """State of the optimizer; None where it is not known, and then the peaks are without it."""
    batches: tuple[BatchForecast, ...] = ()
    largest_batch: int | None = None
    """The most rows that fit into the plan's `memory`."""
    note: str | None = None
    """What is missing, and why."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the run of a recipe would take, by method."""

    model: str
    labels: int | None
    """Outputs of the head; None of a model that keeps its own."""
    sequence: int
    """Tokens a row."""
    device: str
    dtype: str
    """Of the frozen weights, and where they are quantized of all others."""
    quantization: str | Mapping[str, Any] | None
    """As in the recipe; full fine-tuning is planned without it."""
    precision: str
    """Of the forward: ``float32``, which is no autocast, or autocast to ``bfloat16`` or ``float16``."""
    checkpointing: bool
    """Whether the backward computes activations again instead of keeping them."""
    micro_steps: int
    """Forwards and backwards for one update."""
    optimizer: str
    memory: int | None
    """Bytes that were asked about."""
    methods: tuple[MethodPlan, ...]
    """The recipe's own method first."""
    notes: tuple[str, ...]
    """What had to be assumed."""
    not_covered: tuple[str, ...] = NOT_COVERED

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them."""
        return {"version": _FORMAT, **asdict(self)}
