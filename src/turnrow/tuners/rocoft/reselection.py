"""Change which rows or columns are trained in the middle of training: what was learned stays, fresh ones are trained on.

Rows that leave are *settled*: their difference stays part of the adapter, as a buffer, without gradient or optimizer state.
Rows that come back take theirs up again. At the end `unite` makes one adapter of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from turnrow.errors import UserError
from turnrow.selection import Batch, choose_by_score, gather
from turnrow.tuners.rocoft.config import RocoftConfig
from turnrow.tuners.rocoft.linear import RocoftLinear
from turnrow.tuners.rocoft.parts import choosable

__all__ = ["RESELECTION_STRATEGIES", "Move", "check_reselection", "move_optimizer_state", "reselect", "unite"]

RESELECTION_STRATEGIES = ("gradient", "fisher", "cycle")
"""The largest sums of |G| or of G^2 of the adapted model, or simply the next r."""

_AXIS = {"row": 0, "column": 1}


@dataclass(frozen=True)
class Move:
    """What became of the trained rows or columns of one layer."""

    parameter: nn.Parameter
    """The trained difference, which holds the new choice now."""

    axis: int
    """The dimension of the parameter that runs over rows or columns."""

    source: Tensor
    """(r,) int64: where each of them was in the parameter before; -1 for a fresh one or one that comes back."""


def check_reselection(config: object, strategy: object, budget: int | None) -> None:
    """Refuse what cannot be selected anew.

    Args:
        config: of the adapter.
        strategy: one of `RESELECTION_STRATEGIES`.
        budget: the most rows or columns of a module that may be trained over time; None sets no limit.

    Raises:
        UserError: no RoCoFT adapter, another mode than "row" or "column", an unknown strategy, a budget below r.
    """
    if not isinstance(config, RocoftConfig):
        raise UserError(f"reselection is for method rocoft; the adapter is of {type(config).__name__}")
    if config.mode not in _AXIS:
        raise UserError(f"reselection needs mode 'row' or 'column'; mode is {config.mode!r}")
    if config.target_parameters:
        raise UserError(
            f"reselection is for linear layers, not for fused experts, and target_parameters are {config.target_parameters}: pass "
            "target_parameters=[]"
        )
    if strategy not in RESELECTION_STRATEGIES:
        raise UserError(
            f"reselection.strategy is {strategy!r}; it must be one of {', '.join(map(repr, RESELECTION_STRATEGIES))}"
        )
    highest = _most_at_once(config)
    if budget is not None and budget < highest:
        raise UserError(f"reselection.budget is {budget}, below the {highest} {config.mode}s that are trained at once")


def _most_at_once(config: RocoftConfig) -> int:
    """The most rows or columns of a module that are trained at a time."""
    if isinstance(config.indices, dict):
        return max([len(index) for index in config.indices.values()], default=config.r)
    return max([config.r, *config.rank_pattern.values()]) if config.indices is None else len(config.indices)


def reselect(
    model: PeftModel,
    batches: Iterable[Batch] | None,
    *,
    strategy: str,
    budget: int | None = None,
    adapter_name: str = "default",
) -> list[Move]:
    """Settle the rows or columns that are trained now and choose others. The model computes what it did before.

    Args:
        model: with a RoCoFT adapter of mode "row" or "column".
        batches: as for `turnrow.select`; not needed for "cycle".
        strategy: "gradient" and "fisher" score all rows or columns with the adapter on, those trained now among them;
            "cycle" takes the r numbers that follow the ones trained now, and begins anew at the end.
        budget: as in `check_reselection`. Once so many were trained, the choice is among them.
        adapter_name: which adapter.

    Returns:
        What moved, for `move_optimizer_state`.

    Raises:
        UserError: as `check_reselection`; no batches, or batches without a loss.
    """
    config: Any = model.peft_config[adapter_name]
    check_reselection(config, strategy, budget)
    part = config.mode
    layers = _layers(model, adapter_name)
    scores: dict[str, Any] = {}
    if strategy != "cycle":
        if batches is None:
            raise UserError(f"reselection by {strategy!r} needs batches with labels")
        bases = {name: layer.get_base_layer() for name, layer in layers.items()}
        scores = gather(model, bases, batches, strategy, (part,))
    moves = []
    for name, layer in layers.items():
        now = layer.parts(adapter_name)[0].index
        size = layer.out_features if part == "row" else layer.in_features
        so_far = torch.cat([piece.index for piece in layer.parts(adapter_name)])
        allowed = choosable(config, name, part, size)
        if strategy == "cycle":
            chosen = _next_among(allowed, now, so_far, size, budget)
        elif scores[name].count == 0:
            continue
        else:
            affordable = _within_budget(scores[name].scores(part), so_far, len(now), budget)
            chosen = choose_by_score(strategy, affordable, len(now), among=allowed, module=name, part=part)
        moves.append(_move(layer, adapter_name, part, chosen.to(now.device)))
    return moves


def move_optimizer_state(optimizer: torch.optim.Optimizer, moves: Iterable[Move]) -> None:
    """Let the state of the optimizer follow the rows or columns that stay; for the others it begins at zero.

    Adam and AdamW correct their moments by one count of steps for the whole parameter. For fresh rows it would be too high, so that
    they took steps up to six times too large for hundreds of steps. The count is therefore set back to one, and the moments of what
    stays to what one step would have left that found their corrected values: for them the corrected moments are what they were,
    of a shorter memory; a fresh row begins as with a fresh optimizer, and rises to full steps from below.

    State without a count of steps moves as it is (SGD's momentum). Of other optimizers (8 bits, factored moments) what belongs to a row
    cannot be told, so that their state begins anew for the whole parameter.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for move in moves:
        state = optimizer.state.get(move.parameter)
        if not state:
            continue
        moments = {name: value for name, value in state.items() if name != "step"}
        by_row = all(_is_like(value, move.parameter) for value in moments.values())
        if by_row and "step" not in state:
            state |= {name: _taken(value, move.source, move.axis) for name, value in moments.items()}
        elif by_row and moments.keys() <= _ADAM.keys():
            for name, value in moments.items():
                beta = groups[move.parameter]["betas"][_ADAM[name]]
                state[name] = _taken(value, move.source, move.axis) * ((1 - beta) / (1 - beta ** float(state["step"])))
            state["step"] = torch.ones_like(state["step"])
        else:
            del optimizer.state[move.parameter]


_ADAM = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
"""What Adam and AdamW of torch keep beside their count of steps, and which of the betas each decays by."""


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()


def unite(model: PeftModel, adapter_name: str = "default") -> None:
    """Make one adapter of what is trained and what is settled: the model computes the same, and the config names the indices.

    The trained difference becomes a parameter of another size, so an optimizer that knew the old one is of no use any more.
    """
    config: Any = model.peft_config[adapter_name]
    indices = {}
    for name, layer in _layers(model, adapter_name).items():
        indices[name] = layer.unite_settled(adapter_name, config.mode)
    config.indices = indices


def _layers(model: PeftModel, adapter_name: str) -> dict[str, RocoftLinear]:
    base: Any = model.base_model
    return {
        name: module
        for name, module in base.model.named_modules()
        if isinstance(module, RocoftLinear) and module.parts(adapter_name)
    }


def _next_among(allowed: Tensor | None, now: Tensor, so_far: Tensor, size: int, budget: int | None) -> Tensor:
    """`_next`, counting only the numbers that are allowed."""
    if allowed is None:
        return _next(now, so_far, size, budget)
    allowed = allowed.to(now.device)
    place = torch.searchsorted
    return allowed[_next(place(allowed, now), place(allowed, so_far), len(allowed), budget)]


def _next(now: Tensor, so_far: Tensor, size: int, budget: int | None) -> Tensor:
    """The r numbers after the highest of `now`; at the end of the budget those that had their turn longest ago."""
    r = len(now)
    if budget is not None and len(so_far) + r > budget:
        known = so_far.sort().values
        start = int((known <= now.max()).sum())
        return known[(start + torch.arange(r, device=known.device)) % len(known)].sort().values
    return ((int(now.max()) + 1 + torch.arange(r)) % size).sort().values


def _within_budget(scores: Tensor, so_far: Tensor, r: int, budget: int | None) -> Tensor:
    """The scores, those below all others that the budget does not allow."""
    if budget is None or len(so_far) + r <= budget:
        return scores
    allowed = scores.new_full(scores.shape, -1.0)  # a score is a sum of magnitudes, so never negative
    return allowed.index_copy(0, so_far.to(scores.device), scores[so_far.to(scores.device)])


def _move(layer: RocoftLinear, adapter_name: str, part: str, chosen: Tensor) -> Move:
    axis = _AXIS[part]
    before = layer.parts(adapter_name)
    indices = torch.cat([piece.index for piece in before])
    deltas = torch.cat([piece.parameter.detach() for piece in before], dim=axis)
    match = chosen[:, None] == indices[None, :]  # (r, all so far)
    source = torch.where(match.any(1), match.to(torch.uint8).argmax(1), -1)
    staying = torch.zeros_like(indices, dtype=torch.bool)
    staying[source[source >= 0]] = True
    leaving = ~staying & (deltas.abs().amax(1 - axis) > 0)  # what never moved is forgotten
    layer.set_settled(adapter_name, part, indices[leaving], deltas.index_select(axis, leaving.nonzero().squeeze(1)))
    layer.set_index(adapter_name, part, chosen)
    parameter = layer.parts(adapter_name)[0].parameter
    with torch.no_grad():
        parameter.copy_(_taken(deltas, source, axis))
    trained = len(before[0].index)
    return Move(parameter, axis, torch.where(source < trained, source, -1))


def _taken(values: Tensor, source: Tensor, axis: int) -> Tensor:
    """values at `source` along `axis`, zero where the source is -1."""
    taken = values.index_select(axis, source.clamp(min=0))
    shape = [1] * taken.dim()
    shape[axis] = -1
    return taken * (source >= 0).view(shape).to(taken.dtype)
