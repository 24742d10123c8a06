"""The fingerprint of a base weight: the same base in any dtype is one base, a changed one is another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from turnrow.adapters.fingerprint import SAMPLES, WeightPrint, fingerprint, weight_shape
from turnrow.errors import UserError


def linear(out_features=96, in_features=64, scale=0.02) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=scale)
    return layer


def test_golden_positions():
    """The rule is part of the format: these are the positions of every file that was ever written."""
    layer = nn.Linear(100, 100, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(10_000.0).reshape(100, 100))  # the value at (i, j) is 100 i + j
    sample = fingerprint(layer, {}).sample
    assert sample[:4].tolist() == [7556.0, 5013.0, 2670.0, 127.0]
    assert len(set(sample.tolist())) == SAMPLES


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [3.0, 0.02, 1e-6])
def test_one_checkpoint_in_any_two_dtypes_is_one_base(trained, loaded, scale):
    checkpoint = linear(scale=scale)
    before = fingerprint(copy.deepcopy(checkpoint).to(trained), {})
    assert before.difference(fingerprint(copy.deepcopy(checkpoint).to(loaded), {})) is None


def test_rounding_there_and_back_is_one_base():
    checkpoint = linear()
    before = fingerprint(checkpoint, {})
    assert before.difference(fingerprint(copy.deepcopy(checkpoint).bfloat16().float(), {})) is None


def test_another_initialisation_is_another_base():
    assert "32 of 32 sampled weights differ" in fingerprint(linear(), {}).difference(fingerprint(linear(), {}))


@pytest.mark.parametrize("part", ["row", "column"])
def test_a_change_of_the_adapter_s_own_rows_or_columns_alone_is_seen(part):
    """The base with this very adapter merged into it is the likeliest wrong base."""
    index = torch.tensor([7, 3, 50])
    layer = linear(768, 768)
    before = fingerprint(layer, {f"rocoft_{part}_index": index})
    with torch.no_grad():
        (layer.weight if part == "row" else layer.weight.T)[index] += 0.01
    assert before.difference(fingerprint(layer, {f"rocoft_{part}_index": index})) is not None


def test_light_fine_tuning_shows_somewhere_in_a_model():
    differences = []
    for _ in range(12):
        layer = linear()
        before = fingerprint(layer, {})
        with torch.no_grad():
            layer.weight += torch.randn_like(layer.weight) * 1e-4
        differences.append(before.difference(fingerprint(layer, {})))
    assert any(differences)


def test_another_shape_is_named():
    difference = fingerprint(linear(8, 4), {}).difference(fingerprint(linear(8, 6), {}))
    assert difference == "its weight is 8 x 6 here and was 8 x 4"


def test_nan_in_the_weight_differs_from_a_number():
    layer = linear()
    before = fingerprint(layer, {})
    nn.init.constant_(layer.weight, torch.nan)
    assert "first is nan here" in before.difference(fingerprint(layer, {}))


def test_conv1d_is_seen_as_out_by_in():
    conv, dense = Conv1D(12, 8), nn.Linear(8, 12)
    with torch.no_grad():
        dense.weight.copy_(conv.weight.T)
    index = {"rocoft_row_index": torch.tensor([11])}  # a row that the stored (8, 12) weight does not have
    print_ = fingerprint(conv, index)
    assert print_.shape == weight_shape(conv) == (12, 8)
    assert print_.transposed
    assert print_.difference(fingerprint(dense, index)) is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_packed_weights_are_compared_by_shape_only(dtype):
    layer = linear(8, 4)
    packed = nn.Linear(4, 8)
    packed.weight = nn.Parameter(torch.zeros(16, 1).to(dtype), requires_grad=False)  # packed into another shape
    assert fingerprint(packed, {}) == WeightPrint((8, 4), False, None)
    assert fingerprint(layer, {}).difference(fingerprint(packed, {})) is None
    assert fingerprint(linear(9, 4), {}).difference(fingerprint(packed, {})) is not None


def test_meta_weights_are_compared_by_shape_only():
    assert fingerprint(nn.Linear(4, 8, device="meta"), {}).sample is None


def test_modules_without_weight_have_none():
    assert fingerprint(nn.Dropout(), {}) is None


def test_survives_json_bit_for_bit():
    before = fingerprint(linear(), {})
    after = WeightPrint.from_dict(before.to_dict(), "here")
    assert torch.equal(after.sample, before.sample)
    assert (after.shape, after.transposed) == (before.shape, before.transposed)


@pytest.mark.parametrize(
    "damage",
    [
        {"sample": "no base64!"},
        {"sample": "AAAA"},
        {"sample": 3},
        {"shape": [4]},
        {"shape": ["4", 4]},
        {"shape": None},
        {"transposed": "no"},
        {"sample": "AAAAAA=="},
    ],
)
def test_damaged_entry_is_named(damage):
    with pytest.raises(UserError, match="entry x is damaged"):
        WeightPrint.from_dict(fingerprint(linear(4, 4), {}).to_dict() | damage, "entry x")


def test_missing_part_is_named():
    with pytest.raises(UserError, match="entry x is damaged: KeyError 'sample'"):
        WeightPrint.from_dict({"shape": [4, 4], "transposed": False}, "entry x")
