"""`turnrow inspect` shows what is in an adapter, as tables and as JSON."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from turnrow.adapters.manifest import recipe_sha256, store_manifest
from turnrow.cli.main import main


@pytest.fixture
def adapter(tmp_path):
    """Rows 2 and 0 of a module `first` and a classifier; `adapter(changes)` sets single values of the rows."""

    def make(changes=None):
        row = torch.zeros(2, 6)
        row[0, 0], row[1, 1] = 3.0, 4.0
        for place, value in (changes or {}).items():
            row[place] = value
        prefix = "base_model.model"
        tensors = {
            f"{prefix}.first.rocoft_row": row,
            f"{prefix}.first.rocoft_row_index": torch.tensor([2, 0]),
            f"{prefix}.classifier.weight": torch.ones(2, 4),
        }
        config = {"peft_type": "ROCOFT", "r": 2, "mode": "row", "bias": "none", "task_type": "SEQ_CLS"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/[base]"}))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


def test_table_tells_method_base_indices_and_norm(adapter, capsys):
    assert main(["inspect", str(adapter())]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in lines if re.search(r"\S {2,}", line))
    assert facts["method"] == "ROCOFT"
    assert facts["settings"] == "r=2, mode=row, bias=none"
    assert facts["base"] == "org/[base]"
    assert facts["trained values"] == "20 in 1 modules and 1 parameters saved whole"
    assert facts["checked on loading"] == "sizes only (no turnrow.json)"
    (first,) = (line.split() for line in lines if line.strip().startswith("first "))
    assert first == ["first", "row", "2", "0", "12", "5", "float32"]


def test_the_digest_of_a_recipe_is_shown_once(adapter, capsys):
    folder = adapter()
    store_manifest(folder, {}, {}, {"recipe": {"seed": 3}, "metrics": {"accuracy": 0.5}})
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^recipe +sha256 {recipe_sha256({'seed': 3})} *$", out, re.MULTILINE)
    assert "provenance: recipe_sha256" not in out
    assert re.search(r"^provenance: metrics +\{", out, re.MULTILINE)


def test_json_is_the_whole_summary(adapter, capsys):
    assert main(["inspect", "--json", str(adapter())]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["method"] == "ROCOFT"
    (module,) = summary["modules"]
    assert (module["name"], module["indices"], module["norms"]) == ("first", {"row": [2, 0]}, {"rocoft_row": 5.0})
    assert summary["saved"][0]["name"] == "classifier.weight"


def test_non_finite_values_are_shown_and_give_status_1(adapter, capsys):
    folder = str(adapter({(0, 5): torch.nan}))
    assert main(["inspect", folder]) == 1
    assert "not finite: 1 values of base_model.model.first.rocoft_row" in capsys.readouterr().out
    assert main(["inspect", folder, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["modules"][0]["norms"] == {"rocoft_row": None}


def test_pickle_is_an_error_with_status_2(adapter, capsys):
    folder = adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert main(["inspect", str(folder)]) == 2
    assert "adapter_model.bin is a pickle file" in capsys.readouterr().err
