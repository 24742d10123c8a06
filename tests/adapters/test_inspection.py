"""inspect_adapter says what is in an adapter, of any method, without its base."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig

from turnrow import RocoftConfig
from turnrow.adapters import inspect_adapter
from turnrow.errors import UserError


def test_golden_rows(write, golden_rows):
    folder = write(*golden_rows)
    summary = inspect_adapter(folder)
    assert (summary.method, summary.base, summary.task_type) == ("ROCOFT", "two/layers", None)
    assert summary.settings["mode"] == "row"
    assert [module.name for module in summary.modules] == ["first", "second"]
    first, second = summary.modules
    assert (first.indices, second.indices) == ({"row": [2, 0]}, {"row": [1]})
    assert (first.parameters, second.parameters, summary.parameters) == (12, 4, 16)
    assert first.norms["rocoft_row"] == pytest.approx(math.sqrt(sum(i * i for i in range(12))))
    assert second.norms == {"rocoft_row": 5.0}
    assert summary.dtypes == {"float32": 2, "int64": 2}
    assert first.shape is None
    assert not summary.fingerprinted
    assert summary.file_bytes == (folder / "adapter_model.safetensors").stat().st_size


def test_road_scales_are_measured_from_one(write, golden_road):
    (module,) = inspect_adapter(write(*golden_road)).modules
    assert module.norms == {"road_theta": pytest.approx(0.5), "road_alpha": pytest.approx(1.0)}
    assert module.indices is None


def test_other_methods_of_peft(tmp_path, make_bert, train_a_little, save):
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    save(train_a_little(make_bert(), config), tmp_path, manifest=False)
    summary = inspect_adapter(tmp_path)
    assert summary.method == "LORA"
    assert [module.parameters for module in summary.modules] == [64, 64]
    assert summary.modules[0].norms.keys() == {"lora_A.weight", "lora_B.weight"}
    assert {entry.name: entry.parameters for entry in summary.saved} == {"classifier.weight": 32, "classifier.bias": 2}
    assert summary.parameters == 64 + 64 + 34


def test_manifest_adds_shapes_versions_and_provenance(tmp_path, make_llama, train_a_little, save):
    model = train_a_little(make_llama(), RocoftConfig(r=1, target_modules=["down_proj"]))
    save(model, tmp_path, metrics={"loss": 0.25})
    summary = inspect_adapter(tmp_path)
    assert summary.modules[0].shape == [16, 24]
    assert summary.fingerprinted
    assert "peft" in summary.versions
    assert summary.provenance == {"metrics": {"loss": 0.25}}
    json.dumps(summary.to_dict(), allow_nan=False)


def test_a_recipe_is_told_by_its_digest_in_old_manifests_too(tmp_path, make_llama, train_a_little, save):
    model = train_a_little(make_llama(), RocoftConfig(r=1, target_modules=["down_proj"]))
    save(model, tmp_path, recipe={"seed": 3})
    digest = inspect_adapter(tmp_path).recipe_sha256
    manifest = json.loads((tmp_path / "turnrow.json").read_text())
    assert digest == manifest["provenance"]["recipe_sha256"]

    def told(provenance):
        (tmp_path / "turnrow.json").write_text(json.dumps(manifest | {"provenance": provenance}))
        return inspect_adapter(tmp_path).recipe_sha256

    assert told({"recipe": {"seed": 3}}) == digest
    assert told({"recipe": {"seed": 3}, "recipe_sha256": "of another turnrow"}) == digest
    assert told({"recipe_sha256": digest}) == digest
    assert told({"recipe": {"seed": math.nan}}) is None
    assert told({"recipe": "by hand", "recipe_sha256": 3}) is None
    assert told({}) is None


def test_layer_10_comes_after_layer_2(write):
    tensors = {}
    for layer in (10, 2, 1):
        tensors[f"base_model.model.h.{layer}.q.rocoft_row"] = torch.ones(1, 2)
        tensors[f"base_model.model.h.{layer}.q.rocoft_row_index"] = torch.tensor([0])
    folder = write({"peft_type": "ROCOFT", "r": 1, "mode": "row", "bias": "none"}, tensors)
    assert [module.name for module in inspect_adapter(folder).modules] == ["h.1.q", "h.2.q", "h.10.q"]


def test_non_finite_values_are_reported_not_refused(write, golden_rows):
    config, tensors = golden_rows
    key = "base_model.model.first.rocoft_row"
    tensors[key][0, :3] = torch.nan
    summary = inspect_adapter(write(config, tensors))
    assert summary.non_finite == {key: 3}
    assert [module.non_finite for module in summary.modules] == [3, 0]
    assert math.isnan(summary.modules[0].norms["rocoft_row"])


def test_tensors_that_do_not_fit_are_an_error(write, golden_rows):
    config, tensors = golden_rows
    with pytest.raises(UserError, match="asks for r=9"):
        inspect_adapter(write(config | {"r": 9}, tensors))
