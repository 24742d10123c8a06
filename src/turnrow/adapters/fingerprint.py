"""A cheap fingerprint of the base weights an adapter was trained on: is this model that base?

Of each adapted weight W (out x in) we keep its shape and 32 values at fixed positions. The i-th position of n is

    row = floor(out * frac(i / p)),  column = floor(in * frac(i / p^2)),  i = 1..n,  p = 1.32471795724...

the R2 sequence, which spreads over a rectangle without falling into its rows or columns
(M. Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences", 2018). For a RoCoFT adapter, half of the
values come from the whole weight and half from its own rows, columns or entries, where an adapter merged into the base shows. Of
experts whose weights are fused in one, the i-th value is taken from expert floor(E * frac(i / phi)), phi = 1.618....

Two weights are taken for the same when every value agrees to within what rounding can do to it,

    |a - b| <= 2^-7 max(|a|, |b|) + 2^-24,

twice the unit roundoff of bfloat16, plus the spacing of the smallest float16: the same checkpoint in float32, bfloat16
and float16 is one base. Values are kept and not a hash of them, because rounding twice (float32 to bfloat16, against
float32 to float16) may end in neighbouring numbers. A further fine-tuned base is told apart as soon as one small
weight among the 32 of a module moves by more than 0.8 % of itself. Quantized, sharded and meta weights have no values
to compare: for them only the shape counts.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from turnrow.errors import AdapterError
from turnrow.ops.experts import FusedWeight, fused_weights

__all__ = ["WeightPrint", "fingerprint", "fingerprint_of_values", "is_plain", "named_weights", "weight_shape"]

SAMPLES = 32
_PLASTIC = 1.32471795724474602596
_GOLDEN = (1 + math.sqrt(5)) / 2
_RELATIVE, _ABSOLUTE = 2.0**-7, 2.0**-24


@dataclass(frozen=True)
class WeightPrint:
    """What is kept of one base weight."""

    shape: tuple[int, ...]
    """(out, in), also for transformers' Conv1D, whose stored weight is (in, out); (E, out, in) for fused experts."""

    transposed: bool
    """The weight is stored as (in, out), as in a Conv1D, or (E, in, out)."""

    sample: torch.Tensor | None
    """(32,) float32, the values at the fixed positions; None for a weight that cannot be read as plain numbers."""

    own: Mapping[str, torch.Tensor] | None = None
    """By index tensor of RoCoFT (``rocoft_row_index``): the rows, columns or entries that half of the sample is from. None for those
    of the adapter itself; one that was combined from others keeps those of the first."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; the sample is the base64 of little-endian float32."""
        sample = None if self.sample is None else _encode(self.sample)
        own = {} if self.own is None else {"own": {name: index.tolist() for name, index in self.own.items()}}
        return {"shape": list(self.shape), "transposed": self.transposed, "sample": sample, **own}

    @classmethod
    def from_dict(cls, value: Any, where: str) -> WeightPrint:
        """Read what `to_dict` wrote.

        Raises:
            AdapterError: something is missing or of another kind; `where` names the place.
        """
        try:
            shape = tuple(value["shape"])
            transposed, text = value["transposed"], value["sample"]
            sample = None if text is None else _decode(text)
            own = value.get("own")
            if own is not None:
                own = {str(name): torch.tensor(index, dtype=torch.int64) for name, index in own.items()}
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError, RuntimeError, binascii.Error) as error:
            raise AdapterError(f"{where} is damaged: {type(error).__name__} {error}") from error
        if not all(isinstance(size, int) and size > 0 for size in shape) or not isinstance(transposed, bool):
            raise AdapterError(f"{where} is damaged: shape {value['shape']!r}, transposed {transposed!r}")
        if sample is not None and (len(shape) not in (2, 3) or len(sample) != SAMPLES):
            raise AdapterError(
                f"{where} is damaged: {len(sample)} values for a weight of shape {list(shape)}, {SAMPLES} are expected"
            )
        return cls(shape, transposed, sample, own)

    def difference(self, other: WeightPrint, *, of_one_adapter: bool = True) -> str | None:
        """Say in words how `other` differs from this one beyond rounding; None if it does not.

        Args:
            of_one_adapter: both samples are from the same places. Those for two adapters share only their first half, which is from
                the whole weight.
        """
        if self.shape != other.shape:
            return f"its weight is {_by(other.shape)} here and was {_by(self.shape)}"
        if self.sample is None or other.sample is None:
            return None
        count = SAMPLES if of_one_adapter else SAMPLES // 2
        mine, others = self.sample[:count], other.sample[:count]
        close = (mine - others).abs() <= _RELATIVE * torch.maximum(mine.abs(), others.abs()) + _ABSOLUTE
        wrong = (~(close | (mine == others))).nonzero().flatten().tolist()
        if not wrong:
            return None
        here, there = others[wrong[0]].item(), mine[wrong[0]].item()
        return f"{len(wrong)} of {count} sampled weights differ beyond rounding, the first is {here:.6g} here and was {there:.6g}"


def named_weights(model: torch.nn.Module) -> dict[str, torch.nn.Module | FusedWeight]:
    """The modules of `model` by name, and its fused weights of experts by the names of the parameters."""
    found: dict[str, torch.nn.Module | FusedWeight] = dict(model.named_modules())
    for name, module in model.named_modules():
        found |= {f"{name}.{weight}": fused for weight, fused in fused_weights(module).items()}
    return found


def fingerprint(module: torch.nn.Module | FusedWeight, parameters: Mapping[str, torch.Tensor]) -> WeightPrint | None:
    """Take the fingerprint of a base module, which must hold its original weight at this moment.

    Args:
        module: a linear layer (or another module with a `weight`), or a fused weight, without adapter.
        parameters: the adapter's tensors for this module; an index tensor of RoCoFT says which rows or columns are its own.

    Returns:
        The fingerprint, or None if the module has no weight.
    """
    shape, weight = weight_shape(module), getattr(module, "weight", None)
    if shape is None:
        return None
    transposed = module.transposed if isinstance(module, FusedWeight) else isinstance(module, Conv1D)
    if not isinstance(weight, torch.Tensor) or not is_plain(weight) or not weight.numel():
        return WeightPrint(shape, transposed, None)
    if weight.ndim not in (2, 3) or weight.ndim != len(shape):
        return WeightPrint(shape, transposed, None)
    view = weight.detach().mT if transposed else weight.detach()
    return fingerprint_of_values(view, parameters, transposed=transposed)


def fingerprint_of_values(
    weight: torch.Tensor, parameters: Mapping[str, torch.Tensor], *, transposed: bool
) -> WeightPrint:
    """As `fingerprint`, of a weight without its module.

    Args:
        weight: (out, in), or (E, out, in) of fused experts.
        transposed: it is stored the other way round.
    """
    return WeightPrint(tuple(weight.shape), transposed, _sample(weight, parameters))


def weight_shape(module: torch.nn.Module | FusedWeight) -> tuple[int, ...] | None:
    """The shape of a module's weight as (out, in), whatever way it is stored or packed; None if it has no weight.

    That of a fused weight is (E, out, in).
    """
    if isinstance(module, FusedWeight):
        return module.shape
    weight = getattr(module, "weight", None)
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape[::-1])
    # a quantized weight is packed into another shape than the matrix it stands for, or goes by another name
    out_features, in_features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(out_features, int) and isinstance(in_features, int):
        return out_features, in_features
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else None


def _encode(sample: torch.Tensor) -> str:
    return base64.b64encode(sample.numpy().astype("<f4").tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    return torch.from_numpy(values.astype(np.float32))


def is_plain(weight: torch.Tensor) -> bool:
    """Whether the elements are the weights themselves: not packed, scaled, sharded or absent."""
    plain_type = type(weight) in (torch.Tensor, torch.nn.Parameter)
    return plain_type and weight.is_floating_point() and weight.element_size() >= 2 and not weight.is_meta


def _sample(weight: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if weight.ndim == 3:
        # each value as it would be in the fingerprint of its expert alone
        experts = [int(len(weight) * (i / _GOLDEN % 1)) for i in range(1, SAMPLES + 1)]
        of_expert = {
            e: _sample(weight[e], {name: tensor[e] for name, tensor in parameters.items()}) for e in set(experts)
        }
        return torch.stack([of_expert[e][i] for i, e in enumerate(experts)])
    rows, columns = range(weight.shape[0]), range(weight.shape[1])
    positions = [_position(i, rows, columns) for i in range(1, SAMPLES // 2 + 1)]
    rest = range(SAMPLES // 2 + 1, SAMPLES + 1)
    if "rocoft_entry_index" in parameters:
        own = parameters["rocoft_entry_index"].tolist()
        positions += [divmod(own[int(len(own) * (i / _PLASTIC % 1))], weight.shape[1]) for i in rest]
    else:
        own_rows = parameters["rocoft_row_index"].tolist() if "rocoft_row_index" in parameters else None
        own_columns = parameters["rocoft_column_index"].tolist() if "rocoft_column_index" in parameters else None
        for i in rest:
            in_rows = own_columns is None or (own_rows is not None and i % 2)  # with both trained by turns
            positions.append(_position(i, own_rows or rows, columns) if in_rows else _position(i, rows, own_columns))
    at = torch.tensor(positions, device=weight.device)
    return weight[at[:, 0], at[:, 1]].float().cpu()


def _position(i: int, rows: Any, columns: Any) -> tuple[int, int]:
    return rows[int(len(rows) * (i / _PLASTIC % 1))], columns[int(len(columns) * (i / _PLASTIC**2 % 1))]


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
