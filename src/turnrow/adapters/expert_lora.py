"""The changes of fused experts in the LoRA format, as peft's `target_parameters` has it.

Each expert's change is a LoRA of its own (`turnrow.ops.experts`). peft keeps those of one weight in two matrices, lora_A
(E r, in) and lora_B (out, r E), and puts a layer around the module for every weight of it that is trained. The layers nest in the
order of the module's parameters, the last one outermost, and the names in the file follow from that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.fingerprint import named_weights
from turnrow.adapters.low_rank import low_rank_factors
from turnrow.errors import UserError
from turnrow.ops.experts import FusedWeight, columns, rows

__all__ = ["ExpertLora", "expert_loras"]


class ExpertLora(NamedTuple):
    """The LoRA of one fused weight."""

    place: str
    """Where its tensors stand: the module, and ``.base_layer`` for each layer around it."""

    a: torch.Tensor
    """(E r, in)"""

    b: torch.Tensor
    """(out, r E)"""

    rank: int


def expert_loras(adapter: AdapterFile, base: torch.nn.Module | None) -> dict[str, ExpertLora]:
    """The LoRAs of all fused weights that `adapter` trains, by name of the parameter.

    Args:
        adapter: checked against `base`.
        base: the base model, which may be on the meta device.

    Raises:
        UserError: there are such weights, and `base` is None.
    """
    trained = adapter.fused_weights
    if not trained:
        return {}
    if base is None:
        raise UserError(
            f"{adapter.path} trains fused experts ({trained[0]!r}), and their names in a LoRA file follow from the order of the "
            "model's parameters: name the base model (base=..., or --base on the command line)"
        )
    weights = {name: fused for name, fused in named_weights(base).items() if isinstance(fused, FusedWeight)}
    places = _places([name for name in weights if name in trained])
    return {name: _lora(place, adapter.modules[name], weights[name]) for name, place in places.items()}


def _places(names: list[str]) -> dict[str, str]:
    of_module = defaultdict(list)
    for name in names:
        of_module[name.rpartition(".")[0]].append(name)
    return {
        name: module + ".base_layer" * around
        for module, inner_first in of_module.items()
        for around, name in enumerate(reversed(inner_first))
    }


def _lora(place: str, tensors: Mapping[str, torch.Tensor], weight: FusedWeight) -> ExpertLora:
    a, b = low_rank_factors(tensors, rows, columns, *weight.shape[1:])
    if weight.transposed != getattr(weight.module, "is_transposed", False):
        a, b = b.mT, a.mT  # peft takes this weight for its transpose
    return ExpertLora(place, a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous(), a.shape[1])
