"""A RoCoFT adapter exported as LoRA is the same change, exactly, and keeps to what LoRA loaders accept."""

from __future__ import annotations

import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from turnrow import RocoftConfig
from turnrow.adapters import export_lora, skeleton
from turnrow.adapters.reading import read_adapter
from turnrow.errors import UserError


def read(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return json.loads((folder / "adapter_config.json").read_text()), tensors


def test_golden_rows(write, golden_rows, two_layers, tmp_path):
    config, tensors = read(export_lora(write(*golden_rows), tmp_path / "lora", base=two_layers))
    assert {name.removeprefix("base_model.model."): tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "first.lora_A.weight": (2, 6),
        "first.lora_B.weight": (4, 2),
        "second.lora_A.weight": (1, 4),
        "second.lora_B.weight": (4, 1),
    }
    assert tensors["base_model.model.first.lora_A.weight"].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert tensors["base_model.model.first.lora_B.weight"].tolist() == [[0, 1], [0, 0], [1, 0], [0, 0]]
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["bias"]) == (2, 2, "none")
    assert config["rank_pattern"] == config["alpha_pattern"] == {"second": 1}
    assert sorted(config["target_modules"]) == ["first", "second"]
    assert config["base_model_name_or_path"] == "two/layers"
    assert not config["use_rslora"]
    assert not config["use_dora"]


def test_golden_columns(write, golden_columns, two_layers, tmp_path):
    _, tensors = read(export_lora(write(*golden_columns), tmp_path / "lora", base=two_layers))
    assert tensors["base_model.model.first.lora_A.weight"].tolist() == [[0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert tensors["base_model.model.first.lora_B.weight"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


CASES = {
    "llama rows": ("make_llama", {"mode": "row"}, "CAUSAL_LM"),
    "llama columns": ("make_llama", {"mode": "column", "indices": [7, 2]}, "CAUSAL_LM"),
    "llama ranks": ("make_llama", {"rank_pattern": {"q_proj": 1, "layers.1.mlp.down_proj": 5}}, "CAUSAL_LM"),
    "llama rows and columns": ("make_llama", {"mode": "row+column", "r": 2}, "CAUSAL_LM"),
    "llama rows and columns by indices": (
        "make_llama",
        {"mode": "row+column", "indices": {"row": [3, 1], "column": [7, 2, 0]}},
        "CAUSAL_LM",
    ),
    "gpt2 rows and columns": ("make_gpt2", {"mode": "row+column", "target_modules": ["c_attn", "c_proj"]}, "CAUSAL_LM"),
    "gpt2 rows": ("make_gpt2", {"mode": "row", "target_modules": ["c_attn", "c_proj"]}, "CAUSAL_LM"),
    "gpt2 columns": ("make_gpt2", {"mode": "column", "target_modules": ["c_fc"]}, "CAUSAL_LM"),
    "bert with its classifier": ("make_bert", {"target_modules": ["query", "dense"]}, "SEQ_CLS"),
}


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_loads_it_with_a_change_of_every_weight_equal_to_ours(
    request, tmp_path, train_a_little, logits, case, save
):
    make, settings, task_type = CASES[case]
    make = request.getfixturevalue(make)
    ours = train_a_little(make(), RocoftConfig(task_type=task_type, **settings))
    expected = logits(ours)
    lora = PeftModel.from_pretrained(make(), export_lora(save(ours, tmp_path / "ours"), tmp_path / "lora"))
    modules = read_adapter(tmp_path / "ours").modules
    base = make()
    layers = dict(lora.get_base_model().named_modules())
    for name, tensors in modules.items():
        weight = base.get_submodule(name).weight
        change = torch.zeros_like(weight if not case.startswith("gpt2") else weight.T)
        free = torch.ones(len(change), dtype=torch.bool)
        if "rocoft_row" in tensors:
            change[tensors["rocoft_row_index"]] = tensors["rocoft_row"]
            free[tensors["rocoft_row_index"]] = False
        if "rocoft_column" in tensors:
            for column, values in zip(tensors["rocoft_column_index"], tensors["rocoft_column"].T, strict=True):
                change[free, column] = values
        found = layers[name].get_delta_weight("default")
        assert torch.equal(found.T if case.startswith("gpt2") else found, change)
        assert layers[name].scaling["default"] == 1
    assert {name for name, layer in layers.items() if hasattr(layer, "lora_A")} == modules.keys()
    torch.testing.assert_close(logits(lora), expected, rtol=0, atol=1e-6)


def test_sizes_come_from_the_manifest_or_from_a_base_on_the_meta_device(tmp_path, make_llama, train_a_little, save):
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    folder = save(train_a_little(base, RocoftConfig(task_type="CAUSAL_LM")), tmp_path / "ours")
    with_manifest = read(export_lora(folder, tmp_path / "a"))
    (folder / "turnrow.json").unlink()
    with pytest.raises(UserError, match=r"no turnrow\.json that says how large .* name the base model"):
        export_lora(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    meta = skeleton(read_adapter(folder), str(tmp_path / "base"))
    assert meta.device.type == "meta"
    with_base = read(export_lora(folder, tmp_path / "b", base=meta))
    assert with_base[0] == with_manifest[0]
    assert all(torch.equal(with_base[1][name], tensor) for name, tensor in with_manifest[1].items())


def test_golden_shape_of_conv1d_is_marked_for_lora(tmp_path, make_gpt2, train_a_little, save):
    model = train_a_little(make_gpt2(), RocoftConfig(target_modules=["c_attn"]))
    config, tensors = read(export_lora(save(model, tmp_path / "ours"), tmp_path / "lora"))
    assert config["fan_in_fan_out"] is True
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (48, 3)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_road_is_refused_because_it_has_full_rank(write, golden_road, tmp_path):
    with pytest.raises(UserError, match=r"RoAd adapter.*full rank.*turnrow merge"):
        export_lora(write(*golden_road), tmp_path / "out")


def test_entries_are_refused_because_they_have_full_rank(tmp_path, make_llama, train_a_little, save):
    model = train_a_little(make_llama(), RocoftConfig(mode="entry", density=0.1, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="changes single entries .* no LoRA holds it exactly"):
        export_lora(save(model, tmp_path / "ours"), tmp_path / "out")


def test_lora_is_refused_because_it_is_lora(tmp_path, make_llama, train_a_little, save):
    save(train_a_little(make_llama(), LoraConfig(target_modules=["q_proj"])), tmp_path / "lora", manifest=False)
    with pytest.raises(UserError, match="is a LoRA adapter already"):
        export_lora(tmp_path / "lora", tmp_path / "out")


def test_other_methods_are_refused(write, tmp_path):
    folder = write({"peft_type": "IA3"}, {"base_model.model.a.ia3_l": torch.ones(2, 1)})
    with pytest.raises(UserError, match="is a IA3 adapter: only ROCOFT"):
        export_lora(folder, tmp_path / "out")


def test_trained_biases_are_refused(tmp_path, make_bert, train_a_little, save):
    model = train_a_little(make_bert(), RocoftConfig(target_modules=["query"], bias="rocoft_only"))
    with pytest.raises(UserError, match=r"has trained biases \(the first in 'bert.*query'\).*bias='none'"):
        export_lora(save(model, tmp_path / "ours"), tmp_path / "out")


def test_other_saved_modules_are_refused(tmp_path, make_bert, train_a_little, save):
    config = RocoftConfig(target_modules=["query"], modules_to_save=["pooler"])
    with pytest.raises(UserError, match=r"'bert\.pooler\.dense\.(weight|bias)' trained whole.*classifier and score"):
        export_lora(save(train_a_little(make_bert(), config), tmp_path / "ours"), tmp_path / "out")


def test_non_finite_values_are_refused(write, golden_rows, two_layers, tmp_path):
    config, tensors = golden_rows
    tensors["base_model.model.second.rocoft_row"][0, 0] = torch.inf
    with pytest.raises(UserError, match=r"second.rocoft_row holds 1 NaN or infinite"):
        export_lora(write(config, tensors), tmp_path / "out", base=two_layers)


def test_full_out_folder_is_refused_and_kept(write, golden_rows, two_layers, tmp_path):
    folder = write(*golden_rows)
    with pytest.raises(UserError, match="is not empty"):
        export_lora(folder, folder, base=two_layers)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_nothing_is_left_of_an_export_that_failed(write, golden_rows, two_layers, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    folder = write(*golden_rows)
    monkeypatch.setattr("turnrow.adapters.lora.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_lora(folder, tmp_path / "out", base=two_layers)
    assert os.listdir(tmp_path) == ["adapter"]
