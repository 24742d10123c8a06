"""Kernels by name: what each method of fine-tuning trains, from which its tangent kernel follows.

A description says which parameters move, and nothing of how. Every kernel below is that of the model as it is, with the
method's new parameters at their start, where no method changes any output:

================  =================================================================================================
`Full`            the weights of the chosen linear layers
`Everything`      every parameter of the model, or those named
`Rows`            r rows of each weight (RoCoFT, Kowsher et al., ACL 2025, arXiv:2410.10075)
`Columns`         r columns of each weight
`RowsAndColumns`  both; an entry where they cross counts once
`Entries`         single entries of each weight (RoCoFT's ablation)
`LoRA`            B of W + s B A, with B = 0 and A as given (Hu et al., 2022, arXiv:2106.09685); A has no gradient there
`Road`            angles and scales of pairs of output features (RoAd, Liao et al., NeurIPS 2024, arXiv:2409.00119)
`IA3`             scales of output features, or of input features of the feed-forward layers (arXiv:2205.05638)
`BitFit`          all biases (Ben Zaken et al., 2022, arXiv:2106.10199)
`LayerNorm`       weights and biases of the norms
================  =================================================================================================

At its start RoAd 4 has the kernel of RoAd 2: it gives the angle of the cosine and the scale of the sine of their own, and both
have gradients proportional to sin(theta), which is zero there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from turnrow.analysis.ntk.factors import Call
from turnrow.analysis.ntk.layout import Layout, Names, choose_names, kind_of
from turnrow.analysis.ntk.terms import Term, Vector, Weight, digest, whole
from turnrow.errors import UserError
from turnrow.ops import pairs

__all__ = [
    "DESCRIPTIONS",
    "IA3",
    "BitFit",
    "Columns",
    "Description",
    "Entries",
    "Everything",
    "Full",
    "LayerNorm",
    "LoRA",
    "Road",
    "Rows",
    "RowsAndColumns",
]

DESCRIPTIONS: dict[str, type[Description]] = {}
"""The descriptions by the name of their class."""

Indices = int | Sequence[int] | Mapping[str, Sequence[int]]
"""How many, from the first on; which; or which by module."""


@dataclass(frozen=True, kw_only=True)
class Description(ABC):
    """A set of trained parameters."""

    modules: Names = None
    """Which linear layers: a regular expression, names or their ends, or a function of name and module. By default all linear
    layers of the base, not the head."""
    also: Names = None
    """Parameters trained whole beside them, such as a classifier head: names of parameters or of modules."""

    def __init_subclass__(cls) -> None:
        DESCRIPTIONS[cls.__name__] = cls

    @abstractmethod
    def own_terms(self, layout: Layout) -> list[Term]:
        """The pieces without `also`."""

    def terms(self, layout: Layout) -> list[Term]:
        """The pieces of which the kernel is the sum.

        Raises:
            UserError: names fit nothing in the model, numbers are out of range, or `also` names what is trained already.
        """
        own = self.own_terms(layout)
        if self.also is None:
            return own
        named = layout.parameters_of(self.also, "also")
        for term in own:
            touched = (
                {layout.named.get((module, "weight")) for module in term.modules} if isinstance(term, Weight) else set()
            )
            twice = next((name for name in named if name in {*touched, term.parameter}), None)
            # What an adapter adds (LoRA's B) is not a part of the weight that it stands beside.
            if twice is not None and not (isinstance(term, Weight) and term.down is not None):
                raise UserError(
                    f"also names {twice!r}, which {type(self).__name__} trains itself; name parameters beside those"
                )
        return own + [whole(layout, name) for name in named]


@dataclass(frozen=True)
class Full(Description):
    """The weights of linear layers, whole."""

    def own_terms(self, layout: Layout) -> list[Term]:
        """One term a weight; a tied weight is one."""
        names = dict.fromkeys(layout.named[module, "weight"] for module in layout.linear(self.modules))
        return [whole(layout, name) for name in names]


@dataclass(frozen=True)
class Everything(Description):
    """Every parameter, or those named: what full fine-tuning moves. `modules` is not looked at."""

    parameters: Names = None

    def own_terms(self, layout: Layout) -> list[Term]:
        """One term a parameter."""
        return [whole(layout, name) for name in layout.parameters_of(self.parameters, "parameters")]


@dataclass(frozen=True)
class Rows(Description):
    """Some rows (output features) of each weight; each layer has its own, also where layers share a weight."""

    rows: Indices = 1

    def own_terms(self, layout: Layout) -> list[Term]:
        """One term a layer."""
        found: list[Term] = []
        for name in _layers(layout, self.modules, self.rows):
            out_features, in_features = layout.features(name)
            rows = _numbers(self.rows, out_features, name, "rows")
            found.append(_part(name, (len(rows), in_features), rows=rows))
        return found


@dataclass(frozen=True)
class Columns(Description):
    """Some columns (input features) of each weight."""

    columns: Indices = 1

    def own_terms(self, layout: Layout) -> list[Term]:
        """One term a layer."""
        found: list[Term] = []
        for name in _layers(layout, self.modules, self.columns):
            out_features, in_features = layout.features(name)
            columns = _numbers(self.columns, in_features, name, "columns")
            found.append(_part(name, (out_features, len(columns)), columns=columns))
        return found


@dataclass(frozen=True)
class RowsAndColumns(Description):
    """Some rows and some columns of each weight; an entry where they cross counts once."""

    rows: Indices = 1
    columns: Indices = 1

    def own_terms(self, layout: Layout) -> list[Term]:
        """Three terms a layer: the rows, the columns, and less what is in both."""
        found: list[Term] = []
        for name in _layers(layout, self.modules, self.rows, self.columns):
            out_features, in_features = layout.features(name)
            rows = _numbers(self.rows, out_features, name, "rows")
            columns = _numbers(self.columns, in_features, name, "columns")
            found.append(_part(name, (len(rows), in_features), rows=rows))
            found.append(_part(name, (out_features, len(columns)), columns=columns))
            found.append(_part(name, (len(rows), len(columns)), rows=rows, columns=columns, sign=-1))
        return found


@dataclass(frozen=True)
class Entries(Description):
    """Single entries of each weight: a share drawn at random, others in each layer, or those given."""

    density: float = 0.01
    """The share of entries; at least one."""
    seed: int = 0
    masks: Mapping[str, Tensor] | None = None
    """By module, instead of a share: (out, in) bool."""

    def own_terms(self, layout: Layout) -> list[Term]:
        """One term a layer."""
        if self.masks is None and not 0 < self.density <= 1:
            raise UserError(f"density is {self.density}; it is a share of the entries, more than 0 and at most 1")
        found: list[Term] = []
        for name in _layers(layout, self.modules, self.masks or 1):
            shape = layout.features(name)
            entries = self._drawn(name, shape) if self.masks is None else _in_mask(self.masks, name, shape)
            found.append(Weight(f"part {name} entries {digest(entries)}", (name,), shape, entries=entries))
        return found

    def _drawn(self, name: str, shape: tuple[int, int]) -> Tensor:
        size = math.prod(shape)
        count = max(1, round(self.density * size))
        return torch.randperm(size, generator=_generator(self.seed, name))[:count].sort().values


@dataclass(frozen=True)
class LoRA(Description):
    """B of W + s B A at its start, B = 0: the gradient of B is s G^T X A^T, and that of A is zero."""

    r: int = 8
    seed: int = 0
    a: Mapping[str, Tensor] | None = None
    """By module: A, (r, in). By default drawn as peft draws it, uniform between -1 / sqrt(in) and 1 / sqrt(in)."""
    scaling: float = 1.0
    """s; in peft lora_alpha / r."""

    def own_terms(self, layout: Layout) -> list[Term]:
        """One term a layer."""
        if self.r < 1:
            raise UserError(f"r is {self.r}; it must be at least 1")
        found: list[Term] = []
        for name in _layers(layout, self.modules, self.a or 1):
            out_features, in_features = layout.features(name)
            a = self._drawn(name, in_features) if self.a is None else _of(self.a, name, "a")
            if a.dim() != 2 or a.shape[1] != in_features:
                raise UserError(f"a of module {name!r} is of shape {tuple(a.shape)}; it must be (r, {in_features})")
            down = self.scaling * a.detach().t()
            found.append(Weight(f"lora {name} {digest(down)}", (name,), (out_features, len(a)), down=down))
        return found

    def _drawn(self, name: str, in_features: int) -> Tensor:
        uniform = torch.rand(self.r, in_features, generator=_generator(self.seed, name))
        return (2 * uniform - 1) / math.sqrt(in_features)


@dataclass(frozen=True)
class Road(Description):
    """Angles (0 at the start) and scales (1) of pairs of output features, in peft's layout."""

    variant: pairs.Variant = "road_1"
    group_size: int = 64
    """Feature j is paired with j + group_size / 2 within its group; 2 pairs neighbours."""

    def own_terms(self, layout: Layout) -> list[Term]:
        """One term a layer, its angles before its scales."""
        if self.group_size < 2 or self.group_size % 2:
            raise UserError(f"group_size is {self.group_size}; it must be an even number, 2 or more")
        found: list[Term] = []
        for name in layout.linear(self.modules):
            out_features, _ = layout.features(name)
            if out_features % self.group_size:
                raise UserError(
                    f"group_size is {self.group_size}, which does not divide the {out_features} output features of module "
                    f"{name!r}; give a divisor, or leave the module out by `modules`"
                )
            size = 2 * pairs.parameter_size(self.variant, out_features)
            gradient = partial(_road_gradient, self.variant, self.group_size)
            found.append(Vector(f"{self.variant} {self.group_size} {name}", (name,), size, gradient))
        return found


@dataclass(frozen=True)
class IA3(Description):
    """A scale for each output feature, or for each input feature where a layer is a feed-forward one; 1 at the start.

    By default keys, values and the second feed-forward layers, as peft chooses for BERT, RoBERTa, GPT-2, LLaMA, T5 and others. For other
    models peft has its own lists; give them as `modules` and `feedforward`.
    """

    feedforward: Names = None

    def own_terms(self, layout: Layout) -> list[Term]:
        """One term a layer."""
        by_default = [*_KEYS_AND_VALUES, *_FEEDFORWARD]
        modules: Names = (
            self.modules if self.modules is not None else partial(_in_base_and_ends_with, layout, by_default)
        )
        chosen = layout.linear(modules)
        inputs: set[str] = set()
        if self.feedforward is not None:
            inputs = {*layout.linear(self.feedforward)} if self.feedforward else set()
        else:
            inputs = {name for name in chosen if _ends_with(name, _FEEDFORWARD)}
        found: list[Term] = []
        for name in chosen:
            out_features, in_features = layout.features(name)
            if name in inputs:
                gradient = partial(_input_scale_gradient, layout.weight(name))
                found.append(Vector(f"ia3 inputs {name}", (name,), in_features, gradient))
            else:
                found.append(Vector(f"ia3 outputs {name}", (name,), out_features, _output_scale_gradient))
        return found


@dataclass(frozen=True)
class BitFit(Description):
    """All biases of the base, those of the norms among them; `modules` names the modules that have them."""

    def own_terms(self, layout: Layout) -> list[Term]:
        """One term a bias."""
        return _own_parameters(layout, self.modules, lambda module, attribute: attribute == "bias", "biases")


@dataclass(frozen=True)
class LayerNorm(Description):
    """Weights and biases of the norms of the base; `modules` names the norms."""

    def own_terms(self, layout: Layout) -> list[Term]:
        """One term a parameter."""
        return _own_parameters(layout, self.modules, lambda module, attribute: _is_norm(module), "parameters of norms")


_KEYS_AND_VALUES = ("key", "value", "k_proj", "v_proj", "k", "v", "c_attn", "query_key_value")
_FEEDFORWARD = ("output.dense", "down_proj", "fc2", "wo", "mlp.c_proj", "fc_out", "dense_4h_to_h")


# --- gradients of vectors ------------------------------------------------------------------------------------------------


def _road_gradient(variant: pairs.Variant, group_size: int, call: Call) -> Tensor:
    """Gradients of theta and alpha at theta = 0, alpha = 1, where z = R h = h: (B, C, 2 size), the parameters of a pair together."""
    by_pair = (-1, 2, group_size // 2)
    c1, c2 = call.products.unflatten(-1, by_pair).unbind(-2)  # (B, C, groups, half): g1 h1 and g2 h2
    s1, s2 = call.crossed_products(group_size).unflatten(-1, by_pair).unbind(-2)  # g1 h2 and g2 h1
    entries = torch.stack((c1, -s1, c2, s2), dim=-1)  # gradients of the entries of the blocks of R
    return (entries @ _at_the_start(variant).to(entries)).flatten(2)


@cache
def _at_the_start(variant: pairs.Variant) -> Tensor:
    """Derivatives of the four entries of one block by its own angles and scales, (4, parameters); all blocks are alike."""
    theta = torch.zeros(pairs.parameter_size(variant, 2))

    def entries(theta: Tensor, alpha: Tensor) -> Tensor:
        return torch.stack(pairs.coefficients(variant, 2, theta, alpha)).flatten()

    return torch.cat(torch.autograd.functional.jacobian(entries, (theta, torch.ones_like(theta))), dim=1)


def _output_scale_gradient(call: Call) -> Tensor:
    return call.products


def _input_scale_gradient(weight: Tensor, call: Call) -> Tensor:
    return ((call.g @ weight.to(call.g.dtype)) * call.x[:, None]).sum(2)


# --- names and numbers ---------------------------------------------------------------------------------------------------


def _part(
    name: str, shape: tuple[int, int], *, rows: Tensor | None = None, columns: Tensor | None = None, sign: int = 1
) -> Weight:
    key = f"part {name} {digest(rows, columns)} {sign:+d}"
    return Weight(key, (name,), shape, rows=rows, columns=columns, sign=sign)


def _layers(layout: Layout, modules: Names, *by_module: Any) -> list[str]:
    """The chosen layers; those that a mapping names, where no others are asked for."""
    mapping = next((one for one in by_module if isinstance(one, Mapping)), None)
    return layout.linear(list(mapping) if modules is None and mapping is not None else modules)


def _of(by_module: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in by_module:
        raise UserError(f"{what} has nothing for module {name!r}; give it, or leave the module out by `modules`")
    return by_module[name]


def _numbers(indices: Indices, size: int, name: str, what: str) -> Tensor:
    if isinstance(indices, Mapping):
        indices = _of(indices, name, what)
    if isinstance(indices, int):
        if not 1 <= indices <= size:
            raise UserError(f"{what} is {indices}; module {name!r} has {size} {what}: give 1 to {size}")
        return torch.arange(indices)
    numbers = torch.as_tensor(indices).long().cpu().sort().values
    if numbers.dim() != 1 or len(numbers) == 0 or numbers[0] < 0 or numbers[-1] >= size:
        raise UserError(
            f"{what} of module {name!r} are {list(indices)!r}; give numbers from 0 to {size - 1}, at least one"
        )
    if len(numbers.unique()) < len(numbers):
        raise UserError(f"{what} of module {name!r} are {list(indices)!r}; give each number once")
    return numbers


def _in_mask(masks: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    mask = _of(masks, name, "masks")
    if tuple(mask.shape) != shape or mask.dtype != torch.bool or not mask.any():
        raise UserError(
            f"the mask of module {name!r} is {mask.dtype} of shape {tuple(mask.shape)} with {int(mask.count_nonzero())} entries set; "
            f"it must be torch.bool of shape {shape} with at least one"
        )
    return mask.flatten().nonzero().flatten().cpu()


def _generator(seed: int, name: str) -> torch.Generator:
    """Others in each layer, and the same for a layer whichever others are there."""
    number = int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big")
    return torch.Generator().manual_seed(number)


def _ends_with(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _in_base_and_ends_with(layout: Layout, ends: Sequence[str], name: str, module: nn.Module) -> bool:
    return layout.in_base(name) and _ends_with(name, ends)


def _is_norm(module: nn.Module) -> bool:
    return kind_of(module) == "leaf" and "norm" in type(module).__name__.lower()


def _own_parameters(layout: Layout, modules: Names, is_wanted: Any, what: str) -> list[Term]:
    """The parameters that modules have themselves and that are wanted; by default those of the base."""
    having = {
        module: parameter
        for (module, attribute), parameter in layout.named.items()
        if is_wanted(layout.modules[module], attribute) and (modules is not None or layout.in_base(module))
    }
    if not having:
        raise UserError(f"the base of the model has no {what}; name others, or leave this kernel out")
    wanted: Names = modules if modules is not None else list(having)
    chosen = set(
        choose_names(wanted, {name: layout.modules[name] for name in having}, "modules", f"modules with {what}")
    )
    names = [
        parameter
        for (module, attribute), parameter in layout.named.items()
        if module in chosen and is_wanted(layout.modules[module], attribute)
    ]
    return [whole(layout, name) for name in dict.fromkeys(names)]
