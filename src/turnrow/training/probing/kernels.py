"""From a method of a recipe to the description of its kernel: which modules it adapts, and what in them moves."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from turnrow import count_parameters, select
from turnrow.analysis.ntk import (
    IA3,
    Batch,
    BitFit,
    Columns,
    Description,
    Entries,
    Everything,
    LayerNorm,
    LoRA,
    Road,
    Rows,
    RowsAndColumns,
)
from turnrow.errors import UserError, near_matches
from turnrow.selection import needs_data
from turnrow.training.base import Base
from turnrow.training.methods import apply_method

__all__ = ["KERNEL_METHODS", "Candidate", "attached", "candidate"]

_KEPT_OUT = {"road": ("blocks", "train"), "lora": ("use_dora", "target_parameters")}
"""Options that change the kernel in ways which no description tells."""


@dataclass(frozen=True)
class Candidate:
    """A method on a model."""

    description: Description
    trainable_parameters: int
    """With the head."""


def attached(base: Base, method: Mapping[str, Any], peft_task_type: str | None) -> nn.Module:
    """A copy of the base that is trainable by the method. What warns of the method does so when it is trained, not here."""
    spare = Base(copy.deepcopy(base.model), base.tokenizer, base.new_modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return apply_method(spare, method, peft_task_type)


def candidate(
    base: Base, method: Mapping[str, Any], peft_task_type: str | None, batches: Sequence[Batch], strip: str
) -> Candidate:
    """What `method` would train, as a description of its kernel.

    Args:
        base: the model; it is not changed.
        method: as returned by `check_method`.
        peft_task_type: as of `apply_method`.
        batches: with labels, for a selection by data.
        strip: what the names of modules begin with and those of the kernels do not.

    Raises:
        UserError: the method has no kernel here, or does not fit the model.
    """
    name = str(method["name"])
    describe = KERNEL_METHODS.get(name)
    if describe is None:
        raise UserError(
            f"method {name}: its kernel is not known; a probe knows {', '.join(KERNEL_METHODS)}"
            f"{near_matches(name, KERNEL_METHODS)}"
        )
    for option in _KEPT_OUT.get(name, ()):
        if method.get(option):
            raise UserError(
                f"method {name}: a probe knows no kernel of one with {option}; leave it out to probe the rest"
            )
    model = attached(base, method, peft_task_type)
    if isinstance(model, PeftModel):
        # Layers of a name in the head are trained whole by every method.
        targets = [target.removeprefix(strip) for target in getattr(model, "targeted_module_names", [])]
        description = describe(model, targets, batches, strip)
    else:
        description = Everything()
    return Candidate(description, count_parameters(model).trainable)


def _rocoft(model: Any, targets: list[str], batches: Sequence[Batch], strip: str) -> Description:
    config = model.peft_config["default"]
    if config.target_parameters:
        raise UserError(
            "method rocoft: a probe knows no kernel of the fused experts of this model, which it trains too; say target_parameters: [] "
            "to probe the rest"
        )
    selection = select(model, batches if needs_data(config.selection) else None)
    shapes = {chosen.module.removeprefix(strip): chosen.shape for chosen in selection}
    given = {module.removeprefix(strip): indices for module, indices in selection.indices().items()}
    also = [f"{module}.bias" for module in given] if config.bias != "none" else None
    modules = list(given)
    if config.mode == "row":
        return Rows(modules=modules, rows=given, also=also)
    if config.mode == "column":
        return Columns(modules=modules, columns=given, also=also)
    if config.mode == "row+column":
        rows = {module: parts["row"] for module, parts in given.items()}
        columns = {module: parts["column"] for module, parts in given.items()}
        return RowsAndColumns(modules=modules, rows=rows, columns=columns, also=also)
    masks = {module: _mask(entries, shapes[module]) for module, entries in given.items()}
    return Entries(modules=modules, masks=masks, also=also)


def _mask(entries: Sequence[int], shape: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[torch.as_tensor(entries)] = True
    return mask.view(shape)


def _road(model: Any, targets: list[str], batches: Sequence[Batch], strip: str) -> Description:
    config = model.peft_config["default"]
    return Road(modules=targets, variant=config.variant, group_size=config.group_size)


def _lora(model: Any, targets: list[str], batches: Sequence[Batch], strip: str) -> Description:
    """With A as it was drawn; of LoRA-FA too, since A has no gradient at the start."""
    config = model.peft_config["default"]
    start, end = "base_model.model." + strip, ".lora_A.weight"
    tensors = get_peft_model_state_dict(model)
    a = {key.removeprefix(start).removesuffix(end): value for key, value in tensors.items() if key.endswith(end)}
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return LoRA(modules=targets, a=a, scaling=scaling)


def _ia3(model: Any, targets: list[str], batches: Sequence[Batch], strip: str) -> Description:
    inputs = model.peft_config["default"].feedforward_modules or []
    ends = [inputs] if isinstance(inputs, str) else sorted(inputs)
    feedforward = [name for name in targets if any(name == end or name.endswith(f".{end}") for end in ends)]
    return IA3(modules=targets, feedforward=feedforward)


def _bitfit(model: Any, targets: list[str], batches: Sequence[Batch], strip: str) -> Description:
    return BitFit()


def _layer_norm(model: Any, targets: list[str], batches: Sequence[Batch], strip: str) -> Description:
    return LayerNorm(modules=targets)


def _full(model: Any, targets: list[str], batches: Sequence[Batch], strip: str) -> Description:
    return Everything()


KERNEL_METHODS: dict[str, Callable[[Any, list[str], Sequence[Batch], str], Description]] = {
    "full": _full,
    "rocoft": _rocoft,
    "road": _road,
    "lora": _lora,
    "lora_fa": _lora,
    "ia3": _ia3,
    "bitfit": _bitfit,
    "ln_tuning": _layer_norm,
}
"""Methods whose kernel is known, and what describes it: from the adapted model, its targets, batches, and the prefix of the base."""
