"""Learning rates that differ from module to module: the head's from the adapter's, lower layers' from upper ones'."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from turnrow.errors import UserError, near_matches

__all__ = ["check_rate_factors", "check_rate_patterns", "rate_factor", "scale_rates"]


def check_rate_factors(values: Any) -> dict[str, float]:
    """What a recipe's ``learning_rate_factors`` says, checked as far as it can be without the model.

    Raises:
        UserError: no mapping, a key that is no regular expression, or a factor that is no number above 0.
    """
    if not isinstance(values, Mapping) or not values:
        raise UserError(
            f"learning_rate_factors is {values!r}; expected a mapping from modules to factors such as {{classifier: 0.1}}"
        )
    checked = {}
    for pattern, factor in values.items():
        if not isinstance(pattern, str) or not pattern:
            raise UserError(
                f"learning_rate_factors holds {pattern!r}; expected a part of a module's name, or a regular expression for it"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"learning_rate_factors: {pattern!r} is no regular expression: {error}") from None
        checked[pattern] = _number(factor, f"learning_rate_factors.{pattern}")
    return checked


def rate_factor(name: str, factors: Mapping[str, float]) -> float:
    """By how much the learning rate of the parameter `name` is multiplied: the product of all factors whose pattern is a run of whole parts of the name."""
    name = name.replace("_fsdp_wrapped_module.", "")
    return math.prod(factor for pattern, factor in factors.items() if _is_in(pattern, name))


def check_rate_patterns(model: torch.nn.Module, factors: Mapping[str, float]) -> None:
    """See that every pattern is in the name of a parameter that is trained.

    Raises:
        UserError: one is not.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern in factors:
        if not any(_is_in(pattern, name) for name in trained):
            parts = dict.fromkeys(part for name in trained for part in name.split(".") if not part.isdecimal())
            raise UserError(
                f"learning_rate_factors: {pattern!r} is in the name of nothing that is trained; the names have the parts "
                f"{', '.join(parts)}{near_matches(pattern, parts)}"
            )


def scale_rates(optimizer: torch.optim.Optimizer, model: torch.nn.Module, factors: Mapping[str, float]) -> None:
    """Split the groups of a new optimizer by the factors of their parameters, and multiply the rates of the new groups.

    A group keeps the parameters whose factor is 1, and its place, even if none are left: the rate of the first group is the one that is logged.

    Args:
        optimizer: has taken no step, and no scheduler has seen it.
        model: whose parameters it holds, as they are named for users.
        factors: as of `check_rate_factors`.

    Raises:
        UserError: the optimizer keeps a parameter in no group of its own.
    """
    of = {parameter: rate_factor(name, factors) for name, parameter in model.named_parameters()}
    grouped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if any(parameter.requires_grad and parameter not in grouped for parameter in of):
        raise UserError(
            f"learning_rate_factors: {type(optimizer).__name__} does not hold all parameters in groups; take another training.optim"
        )
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [p for p in parameters if of[p] == 1]
        for factor in sorted({of[p] for p in parameters} - {1.0}):
            scaled = {**group, "params": [p for p in parameters if of[p] == factor], "lr": group["lr"] * factor}
            optimizer.add_param_group(scaled)


def _number(value: Any, where: str) -> float:
    try:
        # a text is what an override of the command line gives, and YAML 1.1 for 5e-1
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"{where} is {value!r}; expected a number above 0, by which training.learning_rate is multiplied"
        )
    return number


def _is_in(pattern: str, name: str) -> bool:
    return re.search(rf"(^|\.)(?:{pattern})(\.|$)", name) is not None
