"""The step-cost benchmark on tiny shapes: the form of its file, and the relations in memory that do not depend on a clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from torch import nn

import turnrow
from benchmarks import step_cost
from benchmarks.methods import LIMIT, METHODS, find_method, sharing_copy
from benchmarks.rocoft_reference import ReferenceColumns, ReferenceRows
from benchmarks.shapes import SHAPES, build_model, target_names
from benchmarks.table import markdown

OURS = ("rows", "columns", "road_1", "road_2", "road_4")


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-bert"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("results") / "result.json"
    # Enough tokens for activations to weigh more than adapters, as they do at real sizes.
    arguments = ["--shape", request.param, "--batch", "4", "--sequence", "128"]
    assert step_cost.main([*arguments, "--repeats", "1", "--threads", "1", "--output", str(file)]) == 0
    return json.loads(file.read_text())


def test_file_says_where_its_numbers_come_from(result: dict[str, Any]) -> None:
    assert result["format"] == 1
    assert {"processor", "cores", "threads", "load_average"} <= result["machine"].keys()
    assert {"python", "torch", "transformers", "peft", "turnrow"} == result["versions"].keys()
    assert {"commit", "modified"} == result["commit"].keys()
    assert result["settings"]["batch"] * result["settings"]["sequence"] == 512
    assert result["settings"]["dtype"] == "float32"
    assert result["shape"]["hidden"] == 64


def test_file_holds_every_method_with_all_its_samples(result: dict[str, Any]) -> None:
    assert list(result["methods"]) == list(METHODS)
    for method in result["methods"].values():
        for figure in ("seconds", "ratio"):
            assert len(method[figure]["samples"]) == result["settings"]["repeats"]
            low, high = method[figure]["quartiles"]
            assert low <= method[figure]["median"] <= high
        assert method["saved_bytes"] > 0
        assert 0 < method["held_bytes"] <= method["peak_bytes"]


def test_the_limit_trains_nothing(result: dict[str, Any]) -> None:
    limit = result["methods"][LIMIT]
    assert limit["saved_ratio"] == 1
    assert limit["trained_parameters"] == limit["gradient_bytes"] == limit["adamw_state_bytes"] == 0


def test_columns_save_no_more_for_backward_than_the_frozen_model(result: dict[str, Any]) -> None:
    columns, limit = result["methods"]["columns"], result["methods"][LIMIT]
    targets = len(
        target_names(build_model(SHAPES[result["settings"]["shape"]], device="cpu", dtype=torch.float32, seed=0))
    )
    # Beyond the limit only r input features of every token and module.
    tokens = result["settings"]["batch"] * result["settings"]["sequence"]
    assert columns["saved_bytes"] - limit["saved_bytes"] <= targets * (3 * tokens * 4 + 256)


def test_rows_save_no_more_for_backward_than_lora(result: dict[str, Any]) -> None:
    assert result["methods"]["rows"]["saved_bytes"] <= result["methods"]["lora"]["saved_bytes"]


@pytest.mark.parametrize("method", ["rocoft_reference_rows", "rocoft_reference_columns"])
def test_rows_and_columns_save_less_than_the_papers_algorithm(result: dict[str, Any], method: str) -> None:
    ours = result["methods"][method.rpartition("_")[2]]
    assert ours["saved_bytes"] < result["methods"][method]["saved_bytes"]
    assert ours["trained_parameters"] == result["methods"][method]["trained_parameters"]


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_saves_far_less_for_backward_than_pefts(result: dict[str, Any], variant: str) -> None:
    ours, theirs = result["methods"][variant], result["methods"]["road_peft"]
    assert ours["saved_ratio"] - 1 < 0.5 * (theirs["saved_ratio"] - 1)


@pytest.mark.parametrize("method", OURS)
def test_nothing_is_hidden_from_the_saved_tensor_hooks(result: dict[str, Any], method: str) -> None:
    """What our forwards hold beyond the limit's is what autograd was told to save (and the loss's few bytes)."""
    ours, limit = result["methods"][method], result["methods"][LIMIT]
    assert ours["held_bytes"] - limit["held_bytes"] <= ours["saved_bytes"] - limit["saved_bytes"] + 65536


@pytest.mark.parametrize("method", OURS)
def test_gradients_and_optimizer_state_exist_only_for_what_is_trained(result: dict[str, Any], method: str) -> None:
    ours = result["methods"][method]
    assert ours["gradient_bytes"] == 4 * ours["trained_parameters"]
    assert 0 <= ours["adamw_state_bytes"] - 2 * ours["gradient_bytes"] < 1024


def test_show_prints_the_table_of_the_file(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    capsys.readouterr()
    assert step_cost.main(["--show", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == markdown(result).strip()
    assert all(method.title in printed for method in METHODS.values())


def test_a_method_that_does_not_fit_stays_in_the_table(result: dict[str, Any]) -> None:
    result = json.loads(json.dumps(result))
    result["methods"]["full"] = {"title": "full fine-tuning", "failed": "out of memory"}
    assert "| full fine-tuning | out of memory |" in markdown(result)


def test_all_methods_see_one_set_of_weights() -> None:
    base = build_model(SHAPES["tiny-llama"], device="cpu", dtype=torch.float32, seed=0)
    copy = sharing_copy(base)
    for (name, original), shared in zip(base.named_parameters(), copy.parameters(), strict=True):
        assert shared is not original, name
        assert shared.data_ptr() == original.data_ptr(), name


def test_pefts_row_is_pefts_own_layer_although_turnrow_is_imported() -> None:
    assert turnrow.__version__
    base = build_model(SHAPES["tiny-llama"], device="cpu", dtype=torch.float32, seed=0)
    model = METHODS["road_peft"].apply(base, target_names(base))
    layers = [module for module in model.modules() if hasattr(module, "road_theta")]
    assert len(layers) == 14
    assert all(type(layer).__module__ == "peft.tuners.road.layer" for layer in layers)
    assert model.peft_config["default"].peft_type == PeftType.ROAD


@pytest.mark.parametrize(("reference", "dim"), [(ReferenceRows, 0), (ReferenceColumns, 1)])
def test_the_papers_algorithm_equals_the_slice_of_a_full_gradient(reference: type[nn.Module], dim: int) -> None:
    linear, x = nn.Linear(7, 5), torch.randn(3, 7)
    expected = linear(x)
    expected.square().sum().backward()
    ours = reference(linear, r=2)
    result = ours(x)
    result.square().sum().backward()
    assert torch.equal(result, expected)
    torch.testing.assert_close(ours.trained.grad, linear.weight.grad.narrow(dim, 0, 2))


@pytest.mark.parametrize("option", ["--batch", "--sequence", "--repeats", "--threads"])
def test_a_number_below_one_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        step_cost.main([option, "0"])
    assert f"{option} is 0, must be at least 1" in capsys.readouterr().err


def test_a_rank_may_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    base = build_model(SHAPES["tiny-llama"], device="cpu", dtype=torch.float32, seed=0)
    targets = target_names(base)
    trained = {}
    for name in ("rows:1", "rows:5", "columns:5", "lora:2"):
        model = find_method(name).apply(sharing_copy(base), targets)
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained["rows:5"] == 5 * trained["rows:1"]
    for name in ("rows:0", "rows:x", "road_1:2", "lines"):
        with pytest.raises(SystemExit):
            step_cost.main(["--shape", "tiny-llama", "--methods", name])
        assert f"{name!r} is none of" in capsys.readouterr().err
