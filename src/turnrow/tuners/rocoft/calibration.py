"""Choose what a RoCoFT adapter trains by what the base model does with data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from turnrow.errors import UserError, near_matches
from turnrow.selection import (
    Batch,
    Chosen,
    ExpertInputNorms,
    GradientSums,
    InputNorms,
    Selection,
    choose_by_score,
    gather,
    needs_data,
)
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.experts import RocoftExpertWeight
from turnrow.tuners.rocoft.layer import RocoftLayer
from turnrow.tuners.rocoft.linear import RocoftLinear
from turnrow.tuners.rocoft.parts import Part, choosable, is_given, parts_of_mode

__all__ = ["select"]

log = logging.getLogger(__name__)

_Layer = RocoftLinear | RocoftExpertWeight

_LISTED_MODULES = 3


def select(
    model: PeftModel | PeftMixedModel, batches: Iterable[Batch] | None = None, adapter_name: str = "default"
) -> Selection:
    """Choose the rows, columns or entries of an adapter by the strategy that its config names, and set them.

    For the strategies that need data this must be done once after `get_peft_model`, before training. Otherwise nothing
    changes, and what is chosen already is returned.

    The same batches give the same choice on the same device. Another device rounds its scores otherwise, which may decide
    between two that are nearly equal. Memory is that of one batch and of a number for each row, column and input feature
    of the target modules, or for each entry in mode "entry" by gradient; it does not grow with the number of batches.

    Args:
        model: training mode, `requires_grad` flags, hooks, weights and which adapters are on are as before afterwards, also
            after an exception.
        batches: what the model is called with, such as ``{"input_ids": ..., "attention_mask": ..., "labels": ...}``; the
            tensors are moved to its device. "gradient" and "fisher" need labels, for the loss. Tokens that `attention_mask`
            marks as padding do not count towards the norms of the inputs; a padded token that changes no loss has no gradient.
        adapter_name: which adapter. All adapters are off meanwhile; modules that are trained whole, such as a new head, are
            used as they are.

    Returns:
        The choice of every module and fused weight, with the share of all scores that it covers. A module that no data reached
        keeps its first rows, columns or entries, and a warning is logged; so does an expert that no token reached, without one.

    Raises:
        UserError: there is no such adapter, it is trained already, an adapter is merged, the strategy needs data and there is
            none or none that gives a loss, or a score is not finite; names the adapter or the module. Nothing is changed.
    """
    config = _config(model, adapter_name)
    layers = _layers(model, adapter_name)
    open_layers = {name: layer for name, layer in layers.items() if not is_given(config, name)}
    scored: dict[tuple[str, str], tuple[Tensor, float | None]] = {}
    if needs_data(config.selection) and open_layers:
        if batches is None:
            raise UserError(
                f"adapter {adapter_name!r} selects by {config.selection!r}, which needs data: give select() calibration batches"
            )
        _check_untouched(model, open_layers, config, adapter_name)
        scored = _score(model, open_layers, batches, config, adapter_name)
        for (name, part), (index, _) in scored.items():
            layers[name].set_index(adapter_name, part, index)
    return Selection(
        mode=config.mode,
        strategy=config.selection if open_layers else "indices",
        chosen=tuple(
            Chosen(
                module=name,
                part=part.name,
                shape=(layer.out_features, layer.in_features),
                index=part.index.to("cpu", copy=True),
                share=scored[name, part.name][1] if (name, part.name) in scored else None,
            )
            for name, layer in layers.items()
            for part in _parts(layer, adapter_name)
        ),
    )


def _config(model: nn.Module, adapter_name: str) -> RocoftConfig:
    if not isinstance(model, (PeftModel, PeftMixedModel)):
        raise UserError(
            f"select() works on what get_peft_model returns, and was given a {type(model).__name__}; put the adapter in first"
        )
    configs = model.peft_config
    if adapter_name not in configs:
        raise UserError(
            f"there is no adapter {adapter_name!r}; the model has {', '.join(map(repr, configs))}"
            f"{near_matches(adapter_name, configs)}"
        )
    config = configs[adapter_name]
    if not isinstance(config, RocoftConfig):
        raise UserError(f"adapter {adapter_name!r} is of {type(config).__name__}; select() is for RoCoFT adapters")
    return config


def _layers(model: PeftModel | PeftMixedModel, adapter_name: str) -> dict[str, _Layer]:
    """The layers of an adapter by their names in the base model, those of fused weights by the names of the parameters."""
    base: Any = model.base_model
    # In a mixed model the layer may lie inside one of another method.
    return {
        name.replace(".base_layer", ""): module
        for name, module in base.model.named_modules()
        if isinstance(module, _Layer) and module.parts(adapter_name)
    }


def _parts(layer: _Layer, adapter_name: str) -> list[Part]:
    return sorted(layer.parts(adapter_name), key=lambda part: part.name, reverse=True)


def _check_untouched(model: nn.Module, layers: dict[str, _Layer], config: RocoftConfig, adapter_name: str) -> None:
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise UserError(
                f"adapter {layer.merged_adapters[0]!r} is merged into the base model: call unmerge_adapter() first"
            )
    for name, layer in layers.items():
        # Without init_weights the differences are random from the start.
        if config.init_weights and any(part.parameter.any() for part in layer.parts(adapter_name)):
            raise UserError(
                f"adapter {adapter_name!r} is trained already: its difference in module {name!r} is not zero. What is trained "
                "is selected before training; add a new adapter"
            )


def _score(
    model: PeftModel | PeftMixedModel,
    layers: dict[str, _Layer],
    batches: Iterable[Batch],
    config: RocoftConfig,
    adapter_name: str,
) -> dict[tuple[str, str], tuple[Tensor, float | None]]:
    """Index and covered share by module and part; nothing of the model is changed."""
    with _without_adapters(model):
        bases = {name: layer.get_base_layer() for name, layer in layers.items()}
        gathered = gather(model, bases, batches, config.selection, parts_of_mode(config.mode))
        chosen: dict[tuple[str, str], tuple[Tensor, float | None]] = {}
        for name, layer in layers.items():
            for part in layer.parts(adapter_name):
                scores = _scores(gathered[name], part.name, layer)
                count, size = part.index.shape[-1], scores.shape[-1]
                among = choosable(config, name, part.name, size)
                of_each = [
                    choose_by_score(config.selection, own, count, among=among, module=module, part=part.name)
                    for module, own in _matrices(name, scores)
                ]
                index = torch.stack(of_each) if layer.of_experts else of_each[0]
                total = float(scores.sum())
                chosen[name, part.name] = index, float(scores.gather(-1, index).sum()) / total if total else None
    _warn_of_unreached(
        list(dict.fromkeys(name for (name, _), (_, share) in chosen.items() if share is None)), len(layers)
    )
    return chosen


def _matrices(name: str, scores: Tensor) -> list[tuple[str, Tensor]]:
    """The scores of each matrix, and what to call it in an error."""
    if scores.dim() == 1:
        return [(name, scores)]
    return [(f"{name}, expert {expert}", own) for expert, own in enumerate(scores)]


def _scores(statistic: InputNorms | ExpertInputNorms | GradientSums, part: str, layer: _Layer) -> Tensor:
    if statistic.count == 0:
        sizes = {
            "row": layer.out_features,
            "column": layer.in_features,
            "entry": layer.out_features * layer.in_features,
        }
        return torch.zeros(layer._base.shape[0], sizes[part]) if layer.of_experts else torch.zeros(sizes[part])
    if isinstance(statistic, GradientSums):
        return statistic.scores(part)
    if isinstance(layer, RocoftLinear):
        return statistic.scores(part, layer.dense_values())
    fused: Any = layer.get_base_layer()
    return statistic.scores(part, fused.matrices(values=True))


def _warn_of_unreached(names: list[str], layers: int) -> None:
    if names:
        log.warning(
            "the calibration data say nothing of %d of %d modules, where the first are chosen: %s%s",
            len(names),
            layers,
            ", ".join(names[:_LISTED_MODULES]),
            ", ..." if len(names) > _LISTED_MODULES else "",
        )


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """All adapters off in this block, and each layer afterwards as before.

    peft's own `disable_adapter` would set `requires_grad` anew and switch trained heads off too.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    were_off = [layer._disable_adapters for layer in layers]
    try:
        for module in model.modules():
            if isinstance(module, RocoftLayer):
                module.restore_base()
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in zip(layers, were_off, strict=True):
            layer._disable_adapters = off
