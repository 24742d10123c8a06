"""Models that FSDP2 (or DeepSpeed's ZeRO-3) shards over two processes train as whole ones do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from tests.torchrun import torchrun
from tests.tuners.models import build, configure, output, perturb
from turnrow.errors import UserError
from turnrow.tuners.road.layer import RoadLinear
from turnrow.tuners.rocoft.layer import RocoftLayer

# Three rows do not divide among two processes; GPT-2 stores its weights the other way round and has biases.
CASES = [
    "row:llama",
    "row+column:llama",
    "entry:llama",
    "road_2-blocks:llama",
    "row-bias:gpt2",
    "column:gpt2",
    "road_4:gpt2",
]
SLOW = [
    "road_1:llama",
    "row:gpt2",
    "column-all-biases:gpt2",
    "row-indices:llama",
    "road_1:gpt2",
    "road_2:llama",
    "row:roberta",
]

Found = list[dict[str, Any]]


def run(folder: Path, cases: list[str], engine: str = "fsdp2") -> Found:
    code, out, err = torchrun(str(Path(__file__).with_name("sharded_worker.py")), str(folder), engine, *cases)
    assert code == 0, f"{out}\n{err}"
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return run(folder, CASES)


def check(case: str, found: Found, folder: Path) -> None:
    for process in found:
        result = process[case]
        assert result["live"] == 0
        assert result["moved"] > 1e-4
        assert result["losses"] < 1e-6
        assert result["off"] < 1e-6
    saved = folder / case.replace(":", "-")
    expected, got = (load_file(path / "adapter_model.safetensors") for path in (saved / "expected", saved))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)
    by_torch = saved / "by torch" / "adapter_model.safetensors"
    assert not by_torch.exists() or by_torch.read_bytes() == (saved / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_the_saved_adapter_equal_those_of_one_process(case: str, found: Found, folder: Path) -> None:
    check(case, found, folder)


@pytest.mark.slow
def test_further_methods_equal_one_process(tmp_path: Path) -> None:
    found = run(tmp_path, SLOW)
    for case in SLOW:
        check(case, found, tmp_path)


@pytest.mark.slow
def test_zero3_equals_one_process(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    cases = ["row:llama", "row+column:llama", "entry:gpt2", "column:gpt2", "road_1:llama", "road_2:gpt2"]
    found = run(tmp_path, cases, "zero3")
    for case in cases:
        check(case, found, tmp_path)


@pytest.mark.parametrize("action", ["merge", "merge road", "live"])
def test_sharded_weights_are_not_touched_in_place(found: Found, action: str) -> None:
    for process in found:
        assert "the base weights are sharded over several processes" in process["refusals"][action]


@pytest.mark.parametrize("mark", ["fsdp", "zero3"])
@pytest.mark.parametrize("method", ["row", "road_1"])
def test_a_gathered_weight_is_not_written_to(mark: str, method: str) -> None:
    """Inside a forward it looks like a plain one; FSDP marks the layer, ZeRO-3 the weight."""
    base, inputs = build("llama")
    model = get_peft_model(base, configure(method, base))
    perturb(model)
    expected = output(model, inputs)
    layers = [module for module in model.modules() if isinstance(module, (RocoftLayer, RoadLinear))]
    with model.disable_adapter():  # restores the weights
        for layer in layers:
            if mark == "fsdp":
                layer.get_base_layer()._is_fsdp_managed_module = True
            else:
                layer.get_base_layer().weight.ds_id = 0
    weights = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    torch.testing.assert_close(output(model, inputs), expected)
    assert all(torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers, weights, strict=True))
    with pytest.raises(UserError, match="the base weights are sharded over several processes"):
        model.merge_adapter()


def test_biases_do_not_train_under_zero3() -> None:
    base, inputs = build("gpt2")
    model = get_peft_model(base, configure("row-bias", base))
    next(module for module in model.modules() if isinstance(module, RocoftLayer)).get_base_layer().bias.ds_id = 0
    with pytest.raises(UserError, match="ZeRO-3 does not let biases be trained"):
        model(**inputs)
