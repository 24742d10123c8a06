"""The weights of a model as safetensors files in a folder: found by name, read one at a time, written back in place.

The format (https://github.com/huggingface/safetensors): eight bytes, little-endian, the length of a JSON header; the header,
``{name: {"dtype", "shape", "data_offsets"}}``; the data, which the offsets count from. A large model has several files and
``model.safetensors.index.json``, whose `weight_map` says which file holds which tensor.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from turnrow.adapters.folder import read_json_object
from turnrow.errors import UserError

__all__ = [
    "INDEX_NAME",
    "Checkpoint",
    "Header",
    "copy_with_header",
    "read_checkpoint",
    "read_tensor",
    "write_index",
    "write_tensor",
]

INDEX_NAME = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LARGEST_HEADER = 100 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """The header of one file."""

    path: Path
    tensors: dict[str, dict[str, Any]]
    """By name: dtype, shape and data_offsets."""
    metadata: dict[str, str] | None
    start: int
    """Where the data begins, in bytes."""

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, of a kind that torch has."""
        return _DTYPES[self.tensors[name]["dtype"]]

    @property
    def data_bytes(self) -> int:
        """Length of the data."""
        return max((entry["data_offsets"][1] for entry in self.tensors.values()), default=0)


@dataclass(frozen=True)
class Checkpoint:
    """All files of a model."""

    folder: Path
    headers: dict[str, Header]
    """By file name."""
    is_sharded: bool
    """Whether an index says which file holds what."""

    @property
    def files(self) -> dict[str, str]:
        """The file that holds each tensor."""
        return {name: file for file, header in self.headers.items() for name in header.tensors}


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the headers of the model in `folder`; None where it has no safetensors files.

    Raises:
        UserError: a file is missing, damaged, or named outside the folder.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} is damaged: 'weight_map' is missing or no object of file names")
        names = sorted(set(weight_map.values()))
        outside = next((name for name in names if Path(name).name != name), None)
        if outside is not None:
            raise UserError(f"{index} names the file {outside!r}, which is not in its folder")
        return Checkpoint(folder, {name: _read_header(folder / name) for name in names}, is_sharded=True)
    if (folder / _SINGLE).is_file():
        return Checkpoint(folder, {_SINGLE: _read_header(folder / _SINGLE)}, is_sharded=False)
    return None


def read_tensor(header: Header, name: str) -> Tensor:
    """Read one tensor."""
    entry = header.tensors[name]
    begin, end = entry["data_offsets"]
    buffer = bytearray(end - begin)
    with header.path.open("rb") as file:
        file.seek(header.start + begin)
        if file.readinto(buffer) != len(buffer):
            raise UserError(f"{header.path} is truncated: {name!r} is not whole")
    dtype, shape = header.dtype(name), entry["shape"]
    return torch.frombuffer(buffer, dtype=dtype).view(shape) if buffer else torch.empty(shape, dtype=dtype)


def write_tensor(header: Header, name: str, tensor: Tensor) -> None:
    """Write one tensor in the place where the file has it, in its own dtype and shape."""
    with header.path.open("r+b") as file:
        file.seek(header.start + header.tensors[name]["data_offsets"][0])
        file.write(_bytes(tensor))


def copy_with_header(
    header: Header,
    target: Path,
    *,
    rename: Mapping[str, str] | None = None,
    drop: Collection[str] = (),
    add: Mapping[str, Tensor] | None = None,
) -> Header:
    """Copy a file, with other names, without some tensors, with further ones; return the header of the copy.

    Args:
        header: of the file to copy.
        target: where to.
        rename: new names of tensors, by the old ones; the others keep theirs.
        drop: tensors to leave out.
        add: tensors to append.
    """
    rename, add = rename or {}, add or {}
    if not (rename or drop or add):
        shutil.copyfile(header.path, target)
        return Header(target, header.tensors, header.metadata, header.start)
    ordered = sorted(header.tensors.items(), key=lambda item: item[1]["data_offsets"])
    kept = {name: entry for name, entry in ordered if name not in drop}
    tensors: dict[str, dict[str, Any]] = {}
    end = 0
    for name, entry in kept.items():
        begin, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        tensors[rename.get(name, name)] = {**entry, "data_offsets": [begin, end]}
    for name, tensor in add.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        tensors[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    metadata = {} if header.metadata is None else {"__metadata__": header.metadata}
    text = json.dumps({**metadata, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned to eight bytes
    with header.path.open("rb") as source, target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for entry in kept.values():
            begin, end = entry["data_offsets"]
            source.seek(header.start + begin)
            _copy_bytes(source, file, end - begin)
        for tensor in add.values():
            file.write(_bytes(tensor))
    return Header(target, tensors, header.metadata, 8 + len(text))


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        chunk = source.read(min(count, 1 << 20))
        if not chunk:
            raise UserError(f"{source.name} ended while it was copied")
        target.write(chunk)
        count -= len(chunk)


def _read_header(path: Path) -> Header:
    if not path.is_file():
        raise UserError(f"the model in {path.parent} has no file {path.name}, which its index names")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise UserError(f"{path} ({size:,} bytes) is truncated, damaged or no safetensors file")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None)
            tensors = {name: _checked(entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged: its header is no list of tensors ({error})") from error
    found = Header(path, tensors, metadata, 8 + length)
    if found.start + found.data_bytes != size:
        raise UserError(
            f"{path} is truncated or damaged: {size:,} bytes, its header says {found.start + found.data_bytes:,}"
        )
    return found


def _checked(entry: Any) -> dict[str, Any]:
    begin, end = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("a size is no whole number")
    if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{dtype} {shape} in {end - begin} bytes")
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_index(folder: Path, headers: Mapping[str, Header]) -> None:
    """Write the index of the files in `folder`."""
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    total = sum(e["data_offsets"][1] - e["data_offsets"][0] for h in headers.values() for e in h.tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / INDEX_NAME).write_text(text + "\n", encoding="utf-8")
