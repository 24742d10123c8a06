"""May these adapters be combined at all, and which of the modules that they trained whole does the result have?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.checks import check_finite
from turnrow.errors import UserError

__all__ = ["check_agreement", "mean_of_saved_modules", "same_tensors", "saved_modules_of"]


def check_agreement(adapters: Sequence[AdapterFile], *, check_base: bool) -> None:
    """Check that the adapters are of one method, for one kind of task, finite, and of one base.

    Args:
        check_base: compare the fingerprints of the base where two adapters have them, and its names where they have not.

    Raises:
        UserError: names the adapters, and the first module that differs.
    """
    first, *others = adapters
    for adapter in adapters:
        check_finite(adapter)
        if adapter.method not in ("ROCOFT", "ROAD"):
            raise UserError(
                f"{adapter.path} is a {adapter.method} adapter: turnrow combines ROCOFT and ROAD adapters; for others there is "
                "peft's add_weighted_adapter"
            )
    for other in others:
        if other.method != first.method:
            raise UserError(
                f"{first.path} is a {first.method} adapter and {other.path} a {other.method} adapter: one adds to the weights, the "
                "other turns the outputs, and no adapter does both. Merge one into the base (turnrow merge), or load both with "
                "get_peft_model(..., mixed=True)"
            )
        tasks = [adapter.config.get("task_type") for adapter in (first, other)]
        if None not in tasks and tasks[0] != tasks[1]:
            raise UserError(
                f"{first.path} is for the task type {tasks[0]}, {other.path} for {tasks[1]}: they share no model"
            )
        if check_base:
            _check_base(first, other)


def saved_modules_of(
    adapters: Sequence[AdapterFile], choice: AdapterFile | bool | None
) -> tuple[dict[str, torch.Tensor], list[str] | None]:
    """The modules trained whole that the result has, and the `modules_to_save` of its configuration.

    Args:
        choice: which adapter's; False for none; None for those that the adapters agree on.

    Raises:
        UserError: `choice` is None and the adapters differ in them.
    """
    having = [adapter for adapter in adapters if adapter.saved_modules]
    if choice is False or not having:
        return {}, None
    if choice is None or choice is True:
        first = having[0]
        differing = next((a for a in having[1:] if not same_tensors(first.saved_modules, a.saved_modules)), None)
        if differing is not None:
            name = next(iter(first.saved_modules))
            raise UserError(
                f"{first.path} and {differing.path} have trained modules such as {name!r} whole, each its own: say whose the result "
                "shall have (saved_modules_of=..., --saved-modules-of DIR), or none (False, --no-saved-modules)"
            )
        choice = first
    return dict(choice.saved_modules), choice.config.get("modules_to_save")


def mean_of_saved_modules(
    adapters: Sequence[AdapterFile], weights: Sequence[float]
) -> tuple[dict[str, torch.Tensor], list[str] | None] | None:
    """The weighted mean of modules that all adapters trained whole, in equal shapes; None where they did not."""
    shapes = [{name: tensor.shape for name, tensor in adapter.saved_modules.items()} for adapter in adapters]
    if not shapes[0] or any(shape != shapes[0] for shape in shapes):
        return None
    means = {}
    for name, like in adapters[0].saved_modules.items():
        parts = [w * adapter.saved_modules[name].double() for w, adapter in zip(weights, adapters, strict=True)]
        means[name] = torch.stack(parts).sum(0).to(like.dtype)
    return means, adapters[0].config.get("modules_to_save")


def _check_base(first: AdapterFile, other: AdapterFile) -> None:
    shared = first.base_prints.keys() & other.base_prints.keys()
    for name in (name for name in first.base_prints if name in shared):
        difference = first.base_prints[name].difference(other.base_prints[name], of_one_adapter=False)
        if difference is not None:
            raise UserError(
                f"{first.path} and {other.path} belong to different bases; the first module that differs is {name!r}: {difference} "
                f"({other.path} against {first.path}). check_base=False (--no-check-base) combines them all the same"
            )
    if not shared and first.base_name != other.base_name and first.base_name and other.base_name:
        raise UserError(
            f"{first.path} was trained on {first.base_name!r}, {other.path} on {other.base_name!r}, and there are no fingerprints to "
            "compare the two by. check_base=False (--no-check-base) combines them all the same"
        )


def same_tensors(mine: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names with the same values."""
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)
