"""Adapters whose files were damaged or made to lie: each loads as a valid adapter or is refused by `AdapterError`.

Every case takes a good adapter, changes something in one of its three files by a random choice with a seed, and loads it.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from turnrow import RoadConfig, RocoftConfig
from turnrow.adapters import inspect_adapter, load_adapter, write_manifest
from turnrow.errors import AdapterError

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "turnrow.json"

BAD_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 10**9, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e308, "", "a", "row", "road_2", "all-linear", ".*",
    "(a+)+$", "(.*)*first", "[", "../../etc/passwd", "/etc/passwd", "first", "\u0000", "\U0001f600", "a" * 2000, [], [0], [1, 1], [-1], [10**12],
    [[0]], ["first"], ["../x"], ["("], [None], {}, {"first": [0]}, {"first": 2}, {"(a+)+$": 1}, {"row": [0]}, {"": []}, {"first": {"row": [0]}},
    {"a": {"b": {"c": []}}},
]  # fmt: skip


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 12)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def base():
    torch.manual_seed(0)
    return TwoLayers()


TARGETS = ["first", "second"]
KINDS = {
    "rows": RocoftConfig(r=2, target_modules=TARGETS, bias="rocoft_only", init_weights=False),
    "ranks": RocoftConfig(r=2, rank_pattern={"sec.*": 3}, target_modules=TARGETS, mode="column", init_weights=False),
    "both": RocoftConfig(
        mode="row+column", indices={"first": {"row": [1], "column": [0, 3]}, "second": {"row": [2, 0], "column": [5]}},
        target_modules=TARGETS, init_weights=False,
    ),
    "entries": RocoftConfig(mode="entry", density=0.2, selection="random", target_modules=TARGETS, init_weights=False),
    "saved": RocoftConfig(r=1, target_modules=["first"], modules_to_save=["second"], init_weights=False),
    "road": RoadConfig(variant="road_1", group_size=4, target_modules=TARGETS, init_weights=False),
    "road_4": RoadConfig(variant="road_4", group_size=2, target_modules=TARGETS, init_weights=False),
    "blocks": RoadConfig(
        variant="road_2", group_size=2, blocks={"first": "1::2", "second": [0, 1]}, train=["angle"], target_modules=TARGETS,
        init_weights=False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """By kind: the bytes of the three files."""
    contents = {}
    for kind, config in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        model = get_peft_model(base(), copy.deepcopy(config))
        model.save_pretrained(str(folder), save_embedding_layers=False)
        write_manifest(folder, model)
        contents[kind] = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG, MANIFEST)}
    return contents


def flip_bytes(data, chance):
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def cut(data, chance):
    return data[: chance.randrange(len(data))]


def grow(data, chance):
    place = chance.randrange(len(data) + 1)
    return data[:place] + bytes(chance.randrange(256) for _ in range(chance.choice([1, 8, 1000]))) + data[place:]


def lie_in_json(data, chance):
    try:
        value = json.loads(data)
    except ValueError:
        return data
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        holder = value
        while True:
            if not isinstance(holder, (dict, list)) or not holder:
                break
            key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if isinstance(holder[key], (dict, list)) and holder[key] and chance.random() < 0.7:
                holder = holder[key]
                continue
            kind = chance.random()
            if kind < 0.2 and isinstance(holder, dict):
                del holder[key]
            elif kind < 0.3 and isinstance(holder, dict):
                holder[chance.choice(["x", "../x", "rocoft_row", "first", "auto_mapping", "use_dora"])] = holder[key]
            else:
                holder[key] = copy.deepcopy(chance.choice(BAD_VALUES))
            break
    return json.dumps(value).encode()


def lie_in_header(data, chance):
    """A header of safetensors that says something else of the same data, its length put right most of the time."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    entry = header[chance.choice(names)]
    lie = chance.randrange(7)
    if lie == 0:
        entry["shape"] = chance.choice(
            [[], [0], [2**40, 2**40], [1] * 20, [-1], [len(data)], [8, 2], [2, 8], [3, 8], [2**63]]
        )
    elif lie == 1:
        entry["dtype"] = chance.choice(["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X", ""])
    elif lie == 2:
        entry["data_offsets"] = chance.choice([[0, 2**60], [8, 0], [0, 0], [-1, 4], [0, len(data)], [0]])
    elif lie == 3:
        name = chance.choice(names)
        header[chance.choice([f"../{name}", name.upper(), f"{name}.x", "", "base_model.model.third.rocoft_row"])] = (
            header.pop(name)
        )
    elif lie == 4:
        name, other = chance.choice(names), chance.choice(names)
        header[name], header[other] = header[other], header[name]
    elif lie == 5:
        header["__metadata__"] = chance.choice([{}, {"format": "np"}, {"format": 1}, [], "pt"])
    else:
        header[chance.choice(names)] = chance.choice(BAD_VALUES)
    text = json.dumps(header).encode()
    said = len(text) if chance.random() < 0.9 else chance.choice([0, 1, len(text) - 1, 2**40, 2**64 - 1])
    return struct.pack("<Q", said) + text + data[8 + size :]


def lie_in_values(data, chance):
    """Other numbers in the place of eight bytes of the tensors, such as an index out of range or a NaN."""
    size = struct.unpack("<Q", data[:8])[0]
    start = 8 + size
    place = start + 8 * chance.randrange((len(data) - start) // 8)
    numbers = [struct.pack("<q", n) for n in (-1, 0, 1, 7, 8, 100, 2**40, 2**62)]
    numbers += [struct.pack("<ff", n, n) for n in (float("nan"), float("inf"), 3e38, 0.0)]
    return data[:place] + chance.choice(numbers) + data[place + 8 :]


CHANGES = {
    WEIGHTS: [flip_bytes, cut, grow, lie_in_header, lie_in_header, lie_in_values, lie_in_values],
    CONFIG: [flip_bytes, cut, lie_in_json, lie_in_json, lie_in_json],
    MANIFEST: [flip_bytes, cut, lie_in_json, lie_in_json],
}


def try_case(number, good, folder):
    """Make and load case `number`; whether it was loaded."""
    chance = random.Random(number)
    files = dict(good[chance.choice(sorted(good))])
    print(f"case {number}")  # shown where it fails
    if chance.random() < 0.7:
        del files[MANIFEST]  # it would notice every change of the weights
    name = chance.choice(sorted(files))
    files[name] = chance.choice(CHANGES[name])(files[name], chance)
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        inspect_adapter(folder)
        model = load_adapter(base(), folder)
    except AdapterError:
        return False
    with torch.no_grad():
        assert model(torch.ones(2, 8)).shape == (2, 12)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        merged = model.merge_and_unload()
        assert merged(torch.ones(2, 8)).isfinite().all()
    return True


def run_cases(numbers, good, folder):
    warnings.simplefilter("ignore")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = 0
    for number in numbers:
        loaded += try_case(number, good, folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024, f"loading files of a few kilobytes took {grown / 1024:.0f} MiB"
    return loaded / len(numbers)


def test_500_damaged_adapters_load_whole_or_are_refused(good, tmp_path):
    share = run_cases(range(500), good, tmp_path)
    assert 0.02 < share < 0.7  # the cases neither all pass nor all fail at the door


@pytest.mark.slow
def test_10000_damaged_adapters_load_whole_or_are_refused(good, tmp_path):
    run_cases(range(500, 10_500), good, tmp_path)
