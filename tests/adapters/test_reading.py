"""An adapter folder is read as data; whatever is wrong with it is named."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch

from turnrow.adapters import read_adapter
from turnrow.errors import UserError

ROW = "base_model.model.first.rocoft_row"
INDEX = "base_model.model.first.rocoft_row_index"


def test_reads_config_and_tensors_without_a_manifest(write, golden_rows):
    config, tensors = golden_rows
    adapter = read_adapter(write(config, tensors))
    assert adapter.config == config
    assert adapter.manifest is None
    assert adapter.method == "ROCOFT"
    assert adapter.tensors.keys() == tensors.keys()
    assert all(torch.equal(adapter.tensors[key], tensors[key]) for key in tensors)


def test_tensors_are_sorted_by_module_and_the_rest_is_kept_apart(write, golden_rows):
    config, tensors = golden_rows
    tensors["base_model.model.classifier.weight"] = torch.ones(2, 4)
    adapter = read_adapter(write(config, tensors))
    assert {name: sorted(held) for name, held in adapter.modules.items()} == {
        "first": ["rocoft_row", "rocoft_row_index"],
        "second": ["rocoft_row", "rocoft_row_index"],
    }
    assert list(adapter.saved_modules) == ["classifier.weight"]


def test_lora_adapters_are_read_too(write):
    tensors = {f"base_model.model.a.b.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    adapter = read_adapter(write({"peft_type": "LORA", "r": 2}, tensors))
    assert adapter.modules["a.b"].keys() == {"lora_A.weight", "lora_B.weight"}


# --- the folder ---------------------------------------------------------------------------------------------------


def test_missing_folder_says_how_to_get_one_from_the_hub():
    with pytest.raises(UserError, match=r"no adapter folder 'user/name'.*hf download user/name"):
        read_adapter("user/name")


def test_a_file_instead_of_the_folder(write, golden_rows):
    with pytest.raises(UserError, match=r"is a file: give the folder that holds adapter_config\.json"):
        read_adapter(write(*golden_rows) / "adapter_model.safetensors")


def test_missing_config_lists_what_is_there(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"has no adapter_config\.json \(it holds notes\.txt\)"):
        read_adapter(tmp_path)


def test_missing_config_points_to_the_adapter_in_a_folder_inside(write, golden_rows):
    folder = write(*golden_rows)
    with pytest.raises(UserError, match=rf"did you mean {re.escape(str(folder))}\?"):
        read_adapter(folder.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"r": 1,\n nonsense', r"adapter_config\.json, line 2, column 2: not valid JSON"),
        ("[1, 2]", r"holds a JSON list, an object"),
        ("[" * 100_000, r"nested too deeply"),
        ('{"r": 1}', r"has no 'peft_type'.*keys: r"),
        ('{"peft_type": "ROCOF"}', r"unknown peft_type 'ROCOF'; did you mean 'ROCOFT'"),
        ('{"peft_type": ["x"]}', r"unknown peft_type \['x'\]; known are .*LORA"),
    ],
)
def test_unusable_config_is_named(write, golden_rows, text, message):
    folder = write(*golden_rows)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_adapter(folder)


def test_config_that_is_no_text(write, golden_rows):
    folder = write(*golden_rows)
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"adapter_config\.json is not UTF-8 text"):
        read_adapter(folder)


# --- the weights file ---------------------------------------------------------------------------------------------


class _Bomb:
    exploded = False

    def __reduce__(self):
        return (setattr, (_Bomb, "exploded", True))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "weights.ckpt"])
def test_pickle_is_refused_unopened_with_reason_and_way_out(write, golden_rows, name):
    folder = write(*golden_rows)
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(UserError, match=rf"{name} is a pickle file.*any code.*weights_only=True.*save_file"):
        read_adapter(folder)
    assert not _Bomb.exploded


def test_pickle_under_the_name_of_a_safetensors_file_is_refused_unopened(write, golden_rows):
    folder = write(*golden_rows)
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(UserError, match="truncated, damaged or no safetensors file"):
        read_adapter(folder)
    assert not _Bomb.exploded


def test_missing_weights_list_what_is_there(write, golden_rows):
    folder = write(*golden_rows)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "training_args.bin").touch()
    with pytest.raises(
        UserError, match=r"has no adapter_model\.safetensors \(it holds adapter_config\.json, training_"
    ):
        read_adapter(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_named(write, golden_rows, keep):
    path = write(*golden_rows) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors \([\d,]+ bytes\) is truncated, damaged"):
        read_adapter(path.parent)


def test_git_lfs_pointer_is_named(write, golden_rows):
    folder = write(*golden_rows)
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=r"Git LFS pointer.*git lfs pull"):
        read_adapter(folder)


def test_file_without_tensors(write, golden_rows):
    with pytest.raises(UserError, match="holds no tensors"):
        read_adapter(write(golden_rows[0], {}))


# --- tensors against the configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({INDEX: None}, r"module 'first': the tensor 'rocoft_row_index' is missing"),
        ({ROW: None}, r"module 'first': the tensor 'rocoft_row' is missing"),
        ({INDEX: torch.tensor([2, 2])}, r"'first': rocoft_row_index holds 2 twice"),
        ({INDEX: torch.tensor([2, -1])}, r"'first': rocoft_row_index holds -1, out of range"),
        ({INDEX: torch.tensor([2])}, r"rocoft_row_index has 1 entries for the 2 rows"),
        ({INDEX: torch.tensor([2.0, 0.0])}, r"must be a vector of int64, got float32 \[2\]"),
        ({ROW: torch.zeros(12)}, r"rocoft_row must be a floating-point matrix, got float32 \[12\]"),
        (
            {ROW: torch.zeros(3, 6), INDEX: torch.arange(3)},
            r"'first': the file holds 3 rows, the configuration asks for r=2",
        ),
        (
            {"base_model.model.first.rocoft_column": torch.zeros(4, 2)},
            r"unexpected tensor 'rocoft_column' for mode 'row'",
        ),
        ({"base_model.model.first.rocoft_bias": torch.zeros(4)}, r"rocoft_bias is in the file, .* bias='none'"),
        ({"first.rocoft_row": torch.zeros(2, 6)}, r"'first.rocoft_row' does not begin with 'base_model.model.'"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_named(write, golden_rows, changes, message):
    config, tensors = golden_rows
    changed = {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        read_adapter(write(config, changed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "rows"}, "mode is 'rows', allowed are 'row', 'column', 'row.column', 'entry'"),
        ({"mode": ["row"]}, r"mode is \['row'\], allowed"),
        ({"mode": "column"}, "unexpected tensor 'rocoft_row' for mode 'column'"),
        ({"r": 4}, "module 'first': the file holds 2 rows, the configuration asks for r=4"),
        ({"rank_pattern": {"second": 2}}, "module 'second': the file holds 1 rows, the configuration asks for r=2"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern .* is unusable"),
        ({"rank_pattern": 7}, "rank_pattern 7 is unusable"),
    ],
)
def test_configuration_that_does_not_fit_the_tensors_is_named(write, golden_rows, changes, message):
    config, tensors = golden_rows
    with pytest.raises(UserError, match=message):
        read_adapter(write(config | changes, tensors))


def test_explicit_indices_decide_the_rank(write, golden_rows):
    config, tensors = golden_rows
    adapter = read_adapter(write(config | {"r": 3, "indices": {"first": [2, 0], "second": [1]}}, tensors))
    assert len(adapter.modules["first"]["rocoft_row"]) == 2


def test_bias_alone_needs_bias_all(write, golden_rows):
    config, tensors = golden_rows
    tensors["base_model.model.norm.rocoft_bias"] = torch.zeros(4)
    assert "norm" in read_adapter(write(config | {"bias": "all"}, tensors, "all")).modules
    with pytest.raises(UserError, match="module 'norm': the tensor 'rocoft_row' is missing"):
        read_adapter(write(config | {"bias": "rocoft_only"}, tensors, "only"))


def test_adapter_without_tensors_of_its_method(write, golden_rows):
    with pytest.raises(UserError, match=r"holds no ROCOFT tensors, only classifier\.weight"):
        read_adapter(write(golden_rows[0], {"base_model.model.classifier.weight": torch.ones(2, 2)}))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"variant": "road_3"}, {}, "variant is 'road_3', allowed are 'road_1', 'road_2', 'road_4'"),
        ({"group_size": 3}, {}, "group_size is 3, an even number"),
        ({"group_size": 6}, {}, "means 4 output features, no multiple of group_size 6"),
        ({"variant": "road_4"}, {}, "means 1 output features, no multiple of group_size 2"),
        ({}, {"road_alpha": None}, "must be road_theta and road_alpha, the file has road_theta"),
        ({}, {"road_alpha": torch.ones(3)}, "vectors of one size"),
    ],
)
def test_road_tensors_that_do_not_fit_are_named(write, golden_road, config, tensors, message):
    changed = golden_road[1] | {f"base_model.model.first.{name}": tensor for name, tensor in tensors.items()}
    changed = {key: tensor for key, tensor in changed.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        read_adapter(write(golden_road[0] | config, changed))


def test_non_finite_values_are_read_and_counted(write, golden_rows):
    config, tensors = golden_rows
    tensors[ROW][0, :2] = torch.tensor([torch.nan, torch.inf])
    assert read_adapter(write(config, tensors)).non_finite() == {ROW: 2}


def test_manifest_of_a_newer_format_asks_for_an_upgrade(write, golden_rows):
    folder = write(*golden_rows)
    (folder / "turnrow.json").write_text(json.dumps({"format_version": 99, "versions": {"turnrow": "9.9"}}))
    with pytest.raises(UserError, match=r"format 99 by turnrow 9\.9, this turnrow reads up to 1: upgrade"):
        read_adapter(folder)
