"""What there is in a model: its linear layers, its base and its head, its parameters and the modules that own them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from turnrow.errors import UserError, near_matches

__all__ = ["Kind", "Layout", "Names", "choose_names", "kind_of"]

Names = str | Sequence[str] | Callable[[str, Any], bool] | None
"""Which modules, or parameters: a regular expression that matches whole names; names or their ends (``"query"`` for every
module called so); or a function of a name and what has it. None is the default of whoever asks."""

Kind = Literal["linear", "embedding", "leaf"]


def kind_of(module: nn.Module) -> Kind | None:
    """How gradients of a module's parameters follow from its inputs and the gradients of its outputs.

    "linear" and "embedding" are modules whose forward is torch's, or transformers' Conv1D; "leaf" is any other module that has
    parameters and no modules inside, such as a norm. None: its parameters have to be asked one sample at a time.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward or isinstance(module, Conv1D):
        return "linear"
    if forward is nn.Embedding.forward:
        table: Any = module
        return "embedding" if table.max_norm is None and not table.scale_grad_by_freq else None
    has_own = next(module.parameters(recurse=False), None) is not None
    is_leaf = next(module.children(), None) is None
    return "leaf" if has_own and is_leaf else None


class Layout:
    """Modules and parameters of a model by name, and who owns what.

    The base of a transformers model is its ``base_model``; what is outside is its head. Any other module is all base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        base = getattr(model, "base_model", model)
        self._base = next((name for name, module in self.modules.items() if module is base), "")
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.owners: dict[str, list[tuple[str, str]]] = {name: [] for name in self.parameters}
        """By parameter: every module that has it, and as what. Tied parameters have several, and one name."""
        self.named: dict[tuple[str, str], str] = {}
        """The name of the parameter that a module has under a name of its own."""
        for module_name, module in self.modules.items():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    name = names[id(parameter)]
                    self.owners[name].append((module_name, attribute))
                    self.named[module_name, attribute] = name

    def in_base(self, name: str) -> bool:
        """Whether a module or parameter lies in the base, not in the head."""
        return not self._base or name.startswith(f"{self._base}.")

    def linear(self, modules: Names) -> list[str]:
        """Names of linear layers; by default all those in the base.

        Raises:
            UserError: a name fits no linear layer, or none is left.
        """
        there = {name: module for name, module in self.modules.items() if kind_of(module) == "linear"}
        if modules is None:
            there = {name: module for name, module in there.items() if self.in_base(name)}
        return choose_names(modules, there, "modules", "linear layers")

    def parameters_of(self, parameters: Names, what: str) -> list[str]:
        """Names of parameters; a name chooses a parameter, or all parameters of a module. By default all there are.

        Raises:
            UserError: a name fits none, or none is left.
        """
        return choose_names(parameters, self.parameters, what, "parameters", of_modules=True)

    def features(self, module: str) -> tuple[int, int]:
        """Output and input features of a linear layer."""
        layer: Any = self.modules[module]
        return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)

    def weight(self, module: str) -> Tensor:
        """The weight of a linear layer as (out, in)."""
        layer: Any = self.modules[module]
        return layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()


def choose_names(wanted: Names, there: Mapping[str, Any], what: str, kind: str, of_modules: bool = False) -> list[str]:
    """The names in `there` that are wanted, in its order; with `of_modules` a name also chooses what lies inside a module.

    Raises:
        UserError: a name fits none, or none is left.
    """
    if wanted is None:
        found = list(there)
    elif callable(wanted):
        found = [name for name, thing in there.items() if wanted(name, thing)]
    elif isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise UserError(f"{what} is {wanted!r}, which is no regular expression: {error}") from error
        found = [name for name in there if pattern.fullmatch(name)]
    else:
        found = _by_names(wanted, there, what, kind, of_modules)
    if not found:
        raise UserError(
            f"{what} is {wanted!r}, which fits none of the model's {len(there)} {kind}{_near(wanted, there)}"
        )
    return found


def _by_names(wanted: Iterable[str], there: Mapping[str, Any], what: str, kind: str, of_modules: bool) -> list[str]:
    found: dict[str, None] = {}
    for one in wanted:
        fitting = [name for name in there if name == one or name.endswith(f".{one}")]
        if of_modules:
            fitting += [name for name in there if f".{one}." in f".{name}"]
        if not fitting:
            raise UserError(f"{what} names {one!r}, which fits none of the model's {kind}{_near([one], there)}")
        found |= dict.fromkeys(fitting)
    return [name for name in there if name in found]  # in the model's order


def _near(wanted: Any, there: Iterable[str]) -> str:
    if callable(wanted) or wanted is None:
        return ""
    known = {end for name in there for end in (name, name.rpartition(".")[2])}
    texts = [wanted] if isinstance(wanted, str) else list(wanted)
    return near_matches(texts[0], sorted(known)) if texts else ""
