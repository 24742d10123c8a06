"""What a run would take, before any weight is loaded: parameters, bytes, and the batch that fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from turnrow import count_parameters
from turnrow.errors import UserError
from turnrow.training.methods import apply_method, method_title
from turnrow.training.planning.candidates import candidates
from turnrow.training.planning.figures import BatchForecast, MethodPlan, Plan
from turnrow.training.planning.largest import largest_batch
from turnrow.training.planning.optimizer import optimizer_bytes
from turnrow.training.planning.quantized import treat_as_quantized, unpacked_bytes
from turnrow.training.planning.setting import Setting
from turnrow.training.planning.walk import quick_collections, walk
from turnrow.training.recipe import Recipe
from turnrow.training.skeleton import Skeleton

__all__ = ["plan"]


def plan(
    recipe: Recipe,
    *,
    batches: Sequence[int] | None = None,
    sequence: int | None = None,
    memory: int | None = None,
    methods: Sequence[Mapping[str, Any]] | None = None,
    on_method: Callable[[str], None] = lambda title: None,
) -> Plan:
    """Forecast what a recipe's run takes in memory, and beside it its sibling methods, LoRA and full fine-tuning.

    The model is built without weights, from its config; the forecast takes the first steps of training on tensors without
    values, on the device that a run on this machine would choose. A 7B model takes some seconds a method and batch.

    Args:
        recipe: as for `train`. Its training split is read for the labels if it is a local file.
        batches: rows on one device; by default the recipe's ``per_device_train_batch_size``.
        sequence: tokens a row; by default the longest input that the run would not cut.
        memory: bytes; each method then also gets the largest batch that fits.
        methods: what to plan, as `method` sections that `check_method` returned; by default the recipe's own and those beside it.
        on_method: told the title of each method before it is computed.

    Raises:
        UserError: the recipe, a batch, the sequence or the memory is out of range; the model cannot be had; or the task is
            not supported.
    """
    _check_sizes(batches, sequence, memory)
    setting = Setting.of(recipe, sequence)
    sizes = list(dict.fromkeys(batches or [setting.args.per_device_train_batch_size]))
    planned = []
    for number, method in enumerate(candidates(recipe.method) if methods is None else methods):
        on_method(method_title(method))
        try:
            with quick_collections():
                planned.append(_plan_method(method, setting, sizes, memory))
        except UserError as error:
            if number == 0 and methods is None:
                raise
            planned.append(MethodPlan(title=method_title(method), method=dict(method), note=str(error)))
    return Plan(
        model=recipe.model,
        labels=setting.labels,
        sequence=setting.sequence,
        device=str(setting.device),
        dtype=recipe.dtype,
        quantization=recipe.quantization,
        precision=setting.precision_name,
        checkpointing=bool(setting.args.gradient_checkpointing),
        micro_steps=setting.args.gradient_accumulation_steps,
        optimizer=str(getattr(setting.args.optim, "value", setting.args.optim)),
        memory=memory,
        methods=tuple(planned),
        notes=setting.notes,
    )


def _check_sizes(batches: Sequence[object] | None, sequence: object, memory: object) -> None:
    given = [*(("batch", batch) for batch in batches or ()), ("sequence", sequence), ("memory", memory)]
    for name, value in given:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{name} is {value!r}; expected a whole number, 1 or more")


def _plan_method(method: Mapping[str, Any], setting: Setting, sizes: Sequence[int], memory: int | None) -> MethodPlan:
    skeleton = setting.base_for(method)
    base_bytes = _bytes(skeleton.model)
    model, warned = _adapted(skeleton, method, setting.task.peft_task_type)
    setting.prepare(model)
    model_bytes = _bytes(model)
    if method["name"] == "full":
        # The weights themselves, which it needs in float32.
        base_bytes = model_bytes
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    optimizer = optimizer_bytes(setting.args, trained, setting.device)
    state, update = (0, 0) if optimizer is None else optimizer

    def forecast(batch: int) -> BatchForecast:
        steps = walk(
            model,
            lambda: setting.inputs(batch),
            device=setting.device,
            precision=setting.precision,
            micro_steps=setting.args.gradient_accumulation_steps,
        )
        moments = (steps.first_peak, state + steps.later_peak, steps.kept + gradients + state + update)
        return BatchForecast(batch, steps.saved, model_bytes + max(moments))

    count = count_parameters(model)
    notes = [*warned, *(["the state of this optimizer is not known, and left out"] if optimizer is None else [])]
    fits = None
    try:
        forecasts = {size: forecast(size) for size in sizes}
        if memory is not None:
            fits = largest_batch(lambda size: (forecasts.get(size) or forecast(size)).peak_bytes or 0, memory)
    except (RuntimeError, AssertionError) as error:
        forecasts = {size: BatchForecast(size, None, None) for size in sizes}
        reason = str(error).splitlines()[0].removesuffix(".")
        notes.append(f"no forecast of the step, which without values stops at: {reason}")
    return MethodPlan(
        title=method_title(method),
        method=dict(method),
        trainable_parameters=count.trainable,
        total_parameters=count.total,
        base_bytes=base_bytes,
        adapter_bytes=model_bytes - base_bytes,
        gradient_bytes=gradients,
        optimizer_bytes=None if optimizer is None else optimizer.state,
        batches=tuple(forecasts.values()),
        largest_batch=fits,
        note="; ".join(notes) or None,
    )


def _adapted(base: Skeleton, method: Mapping[str, Any], peft_task_type: str | None) -> tuple[Any, list[str]]:
    """The model with the adapter, and what the method warned of."""
    try:
        with torch.device("meta"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model = apply_method(base, method, peft_task_type)
    except RuntimeError as error:
        raise UserError(
            f"method {method['name']} cannot be planned, because it starts from the values of the weights: {error}"
        ) from error
    treat_as_quantized(model)
    return model, list(dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning))


def _bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each once however many names it has."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors) - unpacked_bytes(model)
