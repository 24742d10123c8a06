"""What servers ask of a LoRA adapter before they load it, in one place.

The rules are those of vLLM's loader, the strictest that we know of; peft reads all that it reads. Some are asked of an adapter before
it is exported, because nothing could be done about them (`check_saved_modules`); all are asked of what an export has written
(`broken_rules`), which may load in peft and yet not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.folder import KEY_PREFIX
from turnrow.errors import UserError

__all__ = ["SAVED", "BrokenRule", "broken_rules", "check_saved_modules", "max_lora_rank"]

SAVED = ("classifier", "score")
"""Modules trained whole that a server takes beside the low-rank tensors."""

_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` can be; 16 if nothing is said. An adapter of any rank up to it loads."""


@dataclass(frozen=True)
class BrokenRule:
    """A rule, and how an adapter breaks it."""

    rule: str
    """What is asked."""
    found: str
    """What the adapter has instead."""

    def __str__(self) -> str:
        return f"{self.rule}, and here {self.found}"


def broken_rules(adapter: AdapterFile) -> list[BrokenRule]:
    """Which rules a LoRA adapter breaks, each with its first case; none if a server takes it.

    What no file says is not asked: whether the server's model has the modules, under names that it does not join (q, k and v, or gate
    and up).
    """
    return [
        BrokenRule(rule, found) for rule, case in _RULES.items() if (found := next(case(adapter), None)) is not None
    ]


def max_lora_rank(rank: int) -> int | None:
    """The smallest `max_lora_rank` of vLLM that an adapter of this rank needs; None if there is none."""
    return next((most for most in _MAX_RANKS if most >= rank), None)


def check_saved_modules(adapter: AdapterFile) -> None:
    """Refuse an adapter with modules trained whole that LoRA servers do not take (UserError)."""
    other = _others_saved(adapter.saved_modules)
    if other:
        raise UserError(
            f"{adapter.path} holds {other[0]!r} trained whole, and LoRA servers take only {' and '.join(SAVED)} beside the "
            "low-rank tensors: train without it in modules_to_save, or merge it into the base (`turnrow merge`)"
        )


def _others_saved(names: Mapping[str, Any]) -> list[str]:
    return [name for name in names if not set(SAVED) & set(name.split("."))]


def _rank(adapter: AdapterFile) -> Iterator[str]:
    rank = adapter.config["r"]
    if max_lora_rank(rank) is None:
        yield f"r is {rank}"


def _scaling(adapter: AdapterFile) -> Iterator[str]:
    config = adapter.config
    if config.get("lora_alpha") != config["r"]:
        yield f"lora_alpha is {config.get('lora_alpha')} and r is {config['r']}"
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if ranks != alphas:
        yield f"rank_pattern is {ranks} and alpha_pattern {alphas}"


def _biases(adapter: AdapterFile) -> Iterator[str]:
    for name, plain in (("bias", "none"), ("lora_bias", False)):
        if adapter.config.get(name, plain) not in (plain, None):
            yield f"{name} is {adapter.config[name]!r}"


def _variants(adapter: AdapterFile) -> Iterator[str]:
    for name in ("use_dora", "use_rslora", "use_qalora"):
        if adapter.config.get(name):
            yield f"{name} is set"
    start = adapter.config.get("init_lora_weights", True)
    if isinstance(start, str):
        yield f"init_lora_weights is {start!r}"


def _saved(adapter: AdapterFile) -> Iterator[str]:
    for name in adapter.config.get("modules_to_save") or ():
        if name not in SAVED:
            yield f"modules_to_save names {name!r}"
    for name in _others_saved(adapter.saved_modules):
        yield f"the file holds {name!r} whole"


def _experts(adapter: AdapterFile) -> Iterator[str]:
    for name in adapter.config.get("target_parameters") or ():
        yield f"target_parameters names {name!r}, experts in one parameter"


def _names(adapter: AdapterFile) -> Iterator[str]:
    for key in adapter.tensors:
        if not key.startswith(KEY_PREFIX):
            yield f"the file holds {key!r}"
    targets = adapter.config.get("target_modules")
    for module, tensors in _of_modules(adapter).items():
        for parameter in tensors:
            if parameter not in ("lora_A.weight", "lora_B.weight"):
                yield f"the file holds {module}.{parameter}"
        if len(tensors) == 1:
            yield f"the file holds one factor of {module!r} alone"
        if not isinstance(targets, list) or not any(f".{module}".endswith(f".{target}") for target in targets):
            yield f"target_modules does not name {module!r}"


def _shapes(adapter: AdapterFile) -> Iterator[str]:
    for module, tensors in _of_modules(adapter).items():
        a, b = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
        if a is not None and b is not None and not _fit(a, b, adapter.config["r"]):
            yield f"{module!r} has {list(a.shape)} and {list(b.shape)}, with r {adapter.config['r']}"


def _of_modules(adapter: AdapterFile) -> dict[str, dict[str, Tensor]]:
    """Without what belongs to fused experts, of which `_experts` says all that there is to say."""
    experts = {name.rpartition(".")[0] for name in adapter.config.get("target_parameters") or ()}
    return {name: own for name, own in adapter.modules.items() if name.partition(".base_layer")[0] not in experts}


def _fit(a: Tensor, b: Tensor, r: int) -> bool:
    return a.ndim == b.ndim == 2 and len(a) == b.shape[1] <= r


_RULES: dict[str, Callable[[AdapterFile], Iterator[str]]] = {
    f"the rank is at most {_MAX_RANKS[-1]} (the largest max_lora_rank)": _rank,
    "the scaling is 1 for every module: lora_alpha = r, alpha_pattern = rank_pattern": _scaling,
    "no biases are trained": _biases,
    "it is plain LoRA: no DoRA, no rank-stabilized scaling, no start that changes the base": _variants,
    f"modules_to_save names none but {' and '.join(SAVED)}": _saved,
    "it adapts modules, no parameters of fused experts": _experts,
    "tensors are named <module>.lora_A.weight and lora_B.weight, of modules in target_modules": _names,
    "lora_A is (rank, in) and lora_B (out, rank), with a rank of at most r": _shapes,
}
