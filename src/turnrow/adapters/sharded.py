"""Save an adapter whole from a model that is sharded over several processes (FSDP2, DeepSpeed's ZeRO-3)."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import distributed, nn

from turnrow.errors import UserError

__all__ = ["save_adapter", "whole_state_dict"]


def save_adapter(model: PeftModel, path: str | os.PathLike[str], **options: Any) -> None:
    """Save the adapters of `model` whole, sharded or not: all processes call it, the first one writes.

    ``model.save_pretrained`` alone sees only the pieces that lie on its own process. Here the adapters, and nothing of
    the base, are gathered in the memory of every process. When it returns the folder is complete.

    Args:
        model: not wrapped by DistributedDataParallel or an engine: ``accelerator.unwrap_model(model)``.
        path: the folder, as for ``save_pretrained``.
        options: further arguments of ``PeftModel.save_pretrained``.

    Raises:
        UserError: `model` is no PeftModel.
    """
    if not isinstance(model, PeftModel):
        raise UserError(
            f"save_adapter needs a PeftModel, got {type(model).__name__}; take off the wrapper with accelerator.unwrap_model"
        )
    state = whole_state_dict(model)
    several = distributed.is_available() and distributed.is_initialized()
    if not several or distributed.get_rank() == 0:
        model.save_pretrained(str(path), state_dict=state, **options)
    if several:
        distributed.barrier()


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The state dict to hand to ``model.save_pretrained``, gathered on the CPU; None where nothing is sharded.

    Of a PeftModel only what belongs to an adapter is gathered, of any other model everything. All processes must call it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = model.state_dict()
    if not any(_is_in_pieces(value, parameters.get(name)) for name, value in state.items()):
        return None
    saved = _saved_names(model, state)
    return {
        name: _whole(value, parameters.get(name))
        for name, value in state.items()
        # What is whole already costs nothing to keep.
        if name in saved or not _is_in_pieces(value, parameters.get(name))
    }


def _saved_names(model: nn.Module, state: dict[str, torch.Tensor]) -> set[str]:
    if not isinstance(model, PeftModel):
        return set(state)
    # Most methods hand on the tensors themselves; some build what they save from tensors that bear the adapter's name.
    handed_on = {
        id(value) for name in model.peft_config for value in get_peft_model_state_dict(model, state, name).values()
    }
    return {
        name
        for name, value in state.items()
        if id(value) in handed_on or not model.peft_config.keys().isdisjoint(name.split("."))
    }


def _is_in_pieces(value: torch.Tensor, parameter: nn.Parameter | None) -> bool:
    return _is_dtensor(value) or hasattr(parameter, "ds_id")


def _is_dtensor(value: torch.Tensor) -> bool:
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _whole(value: Any, parameter: nn.Parameter | None) -> torch.Tensor:
    if _is_dtensor(value):
        # With CPU offload the pieces lie on the CPU, but are exchanged on the devices.
        return value.to(value.device_mesh.device_type).full_tensor().cpu()
    if parameter is not None and hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()
    return value
