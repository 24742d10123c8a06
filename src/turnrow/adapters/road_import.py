"""Make an adapter of theta and alpha that some other program trained: the paper's order of pairs, or halves.

The file holds two tensors a module, ``<module>.theta`` and ``<module>.alpha`` (or peft's ``road_theta`` and ``road_alpha``), whose size
says the variant: one of each a pair (road_1), an output feature (road_2) or an entry of R (road_4). Which features make a pair no
file says; it is one of

    neighbours   2 i and 2 i + 1, as in the paper (arXiv:2409.00119, eq. 2): peft's group_size 2
    halves       j and j + out / 2, as LLaMA rotates: group_size = out, which peft must have in common for all modules
    G            j and j + G / 2 in each group of G features: group_size G

and within a group the values stand in the order of the features, for road_4 those of the cosines before those of the sines.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from turnrow.adapters.algebra.regrouping import check_group_size
from turnrow.adapters.algebra.road import Rotation, of_one_variant, road_adapter
from turnrow.adapters.derived import write_derived_adapter
from turnrow.adapters.fingerprint import fingerprint, weight_shape
from turnrow.adapters.folder import KEY_PREFIX, read_tensor_file
from turnrow.adapters.manifest import describe_base
from turnrow.adapters.rocoft_checks import describe
from turnrow.adapters.writing import check_new_folder
from turnrow.errors import AdapterError, UserError, near_matches
from turnrow.ops import pairs as equations

__all__ = ["Pairs", "RoadImport", "import_road"]

Pairs = Literal["neighbours", "halves"] | int

_NAMED: tuple[str, ...] = ("neighbours", "halves")
_KEY = re.compile(rf"(?:{re.escape(KEY_PREFIX)})?(?P<module>.+?)\.(?:road_)?(?P<kind>theta|alpha)(?:\.default)?")


@dataclass(frozen=True)
class RoadImport:
    """What was written."""

    path: Path
    """The folder of the adapter."""
    variant: equations.Variant
    group_size: int
    modules: int
    """How many modules it adapts."""


def import_road(
    file: str | os.PathLike[str],
    base: PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    pairs: Pairs,
    rename: Mapping[str, str] | None = None,
    task_type: str | None = None,
    base_name: str | None = None,
) -> RoadImport:
    """Write the thetas and alphas in a safetensors file as a RoAd adapter in peft's layout into the folder `out`.

    The numbers stay as they are; only where modules of several variants meet all become road_2, which holds each of them.

    Args:
        file: tensors ``<module>.theta`` (rad) and ``<module>.alpha``, floating-point vectors of out / 2, out or 2 out values.
        base: the model that they were trained on, with its weights, which the adapter is tied to.
        out: a new or empty folder.
        pairs: which features make a pair, see above.
        rename: what stands for other names in the names of modules; a name is one or more whole parts, such as ``wq`` or
            ``encoder.layers``. In the order given; an empty text takes the parts out.
        task_type: peft's, such as ``CAUSAL_LM``.
        base_name: folder or Hub id under which the base will be found; its own if None.

    Raises:
        AdapterError: the file is damaged or of another format; a tensor is not finite, of another name or size than these, or of a module
            that the base does not have.
        UserError: an argument is not allowed; the pairs have no group_size in common; `out` is not empty.
    """
    _check_pairs(pairs)
    check_new_folder(out)
    path = Path(file)
    _check_file(path)
    tensors = _by_module(path, rename or {})
    modules = {name: _module(path, name, base) for name in tensors}
    sizes = {name: _out_features(name, module) for name, module in modules.items()}
    group_size = _group_size(pairs, sizes)
    turns = {name: _rotation(path, name, own, sizes[name], group_size) for name, own in tensors.items()}
    settings, held = road_adapter(of_one_variant(turns), tensors.values())
    described = describe_base(base, has_head=False)
    described["name_or_path"] = base_name or described["name_or_path"]
    config = {
        "peft_type": "ROAD",
        "task_type": task_type,
        "base_model_name_or_path": described["name_or_path"],
        "modules_to_save": None,
        "inference_mode": True,
        **settings,
    }
    prints = {name: fingerprint(module, {}) for name, module in modules.items()}
    provenance = {
        "operation": "import",
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "pairs": pairs,
        "rename": dict(rename or {}),
    }
    write_derived_adapter(
        out,
        config,
        {f"{KEY_PREFIX}{name}.{key}": tensor for name, own in held.items() for key, tensor in own.items()},
        base=described,
        prints={name: print_ for name, print_ in prints.items() if print_ is not None},
        provenance=provenance,
    )
    return RoadImport(Path(out), settings["variant"], group_size, len(held))


def _check_pairs(pairs: Any) -> None:
    if pairs in _NAMED and isinstance(pairs, str):
        return
    if isinstance(pairs, str):
        raise UserError(
            f"pairs are {pairs!r}; they must be neighbours, halves, or the number of features in a group"
            f"{near_matches(pairs, _NAMED)}"
        )
    check_group_size(pairs)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise AdapterError(
            f"{path} is a folder: give a safetensors file. A folder that peft wrote needs no import, whatever its group_size"
        )
    if not path.is_file():
        raise AdapterError(f"there is no file {str(path)!r}")
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path} is no safetensors file: write the tensors with safetensors.torch.save_file(tensors, '{path.stem}.safetensors')"
        )


def _by_module(path: Path, rename: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """``{module of the base: {theta: tensor, alpha: tensor}}``"""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unused = set(rename)
    for key, tensor in read_tensor_file(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{path}: the tensor {key!r} is neither <module>.theta nor <module>.alpha (nor peft's road_theta, road_alpha), and "
                "nothing else can be imported: leave it out of the file"
            )
        name, used = _renamed(match["module"], rename)
        unused -= used
        if match["kind"] in found[name]:
            raise AdapterError(f"{path} holds {match['kind']} of {name!r} twice, the second as {key!r}")
        found[name][match["kind"]] = tensor
    if unused:
        raise UserError(f"rename has {min(unused)!r}, which no name in {path} has as a whole part")
    for name, own in found.items():
        if len(own) < 2:
            raise AdapterError(f"{path} holds {next(iter(own))} of {name!r} alone: theta and alpha belong together")
    return dict(found)


def _renamed(name: str, rename: Mapping[str, str]) -> tuple[str, set[str]]:
    """The name in the base, and what was replaced in it."""
    used: set[str] = set()
    parts = f".{name}."
    for old, new in rename.items():
        found = re.compile(rf"(?<=\.){re.escape(old)}\.")
        if found.search(parts):
            used.add(old)
            parts = found.sub((f"{new}." if new else "").replace("\\", r"\\"), parts)
    return parts.strip("."), used


def _module(path: Path, name: str, base: PreTrainedModel) -> nn.Module:
    named = dict(base.named_modules())
    if name not in named:
        raise AdapterError(
            f"{path}: the base, a {type(base).__name__}, has no module {name!r} (names are brought to the base's "
            f"by rename={{'old': 'new'}}, --rename OLD=NEW){near_matches(name, named)}"
        )
    if not isinstance(named[name], (nn.Linear, Conv1D)):
        raise AdapterError(
            f"{path}: {name!r} is a {type(named[name]).__name__} in the base; RoAd turns outputs of linear layers"
        )
    return named[name]


def _out_features(name: str, module: nn.Module) -> int:
    shape = weight_shape(module)
    assert shape is not None, f"{name} is a linear layer"
    return shape[0]


def _group_size(pairs: Pairs, sizes: Mapping[str, int]) -> int:
    if pairs == "neighbours":
        return 2
    if isinstance(pairs, int):
        return pairs
    of_size: dict[int, list[str]] = defaultdict(list)
    for name, size in sizes.items():
        of_size[size].append(name)
    if len(of_size) > 1:
        listed = "; ".join(
            f"{size} features in {len(names)} modules such as {names[0]!r}" for size, names in sorted(of_size.items())
        )
        raise UserError(
            f"pairs are 'halves', so that group_size is the width of the module, and an adapter of peft has one for all: here are {listed}. "
            "Put the modules of each width into a file of their own and import each; merged into the base one after the other "
            "(turnrow merge) they do what they did together"
        )
    return next(iter(of_size))


def _rotation(path: Path, name: str, own: Mapping[str, Tensor], out_features: int, group_size: int) -> Rotation:
    theta, alpha = own["theta"], own["alpha"]
    variants: tuple[equations.Variant, ...] = get_args(equations.Variant)
    sizes = {equations.parameter_size(variant, out_features): variant for variant in variants}
    if (
        any(t.ndim != 1 or not t.is_floating_point() for t in own.values())
        or len(theta) != len(alpha)
        or len(theta) not in sizes
    ):
        allowed = ", ".join(f"{size} ({variant})" for size, variant in sizes.items())
        raise AdapterError(
            f"{path}: theta and alpha of {name!r} are {describe(theta)} and {describe(alpha)}; with its {out_features} output features "
            f"they must be floating-point vectors of one size, {allowed}"
        )
    for kind, tensor in own.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: {kind} of {name!r} holds NaN or infinite values")
    if out_features % group_size:
        raise UserError(
            f"the {out_features} output features of {name!r} cannot be paired in groups of {group_size}: pairs must be another number, "
            "neighbours or halves"
        )
    return Rotation(sizes[len(theta)], group_size, theta.double(), alpha.double())
