"""The benchmark of a batch of many adapters on a tiny shape: the form of its file, and that it times what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import mixed_batch
from benchmarks.methods import sharing_copy
from benchmarks.mixed_batch import BASE, METHODS, markdown, serve
from benchmarks.shapes import SHAPES, build_model, target_names

WORK = ("prompt", "token", "decoding")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("results") / "result.json"
    sizes = ["--samples", "3", "--tokens", "4", "--cached", "5"]
    assert (
        mixed_batch.main(["--shape", "tiny-llama", *sizes, "--repeats", "2", "--threads", "1", "--output", str(file)])
        == 0
    )
    return json.loads(file.read_text())


def test_file_says_where_its_numbers_come_from(result: dict[str, Any]) -> None:
    assert (result["format"], result["benchmark"]) == (1, "mixed_batch")
    assert {"processor", "cores", "threads", "load_average"} <= result["machine"].keys()
    assert {"python", "torch", "transformers", "peft", "turnrow"} == result["versions"].keys()
    settings = result["settings"]
    assert (settings["samples"], settings["tokens"], settings["cached"], settings["dtype"]) == (3, 4, 5, "float32")
    assert result["shape"]["hidden"] == 64


def test_file_holds_every_method_and_kind_of_work_with_all_samples(result: dict[str, Any]) -> None:
    assert list(result["methods"]) == [BASE, *METHODS]
    for method in result["methods"].values():
        assert method["error"] <= 1e-4
        for work in WORK:
            for figure in ("seconds", "ratio"):
                assert len(method[work][figure]["samples"]) == 2
                low, high = method[work][figure]["quartiles"]
                assert low <= method[work][figure]["median"] <= high
    assert result["methods"][BASE]["prompt"]["ratio"]["samples"] == [1, 1]


def test_parameters_are_those_of_one_adapter(result: dict[str, Any]) -> None:
    methods = result["methods"]
    # Two layers of four 64 x 64, two 64 -> 192 and one 192 -> 64.
    outputs, inputs = 2 * (4 * 64 + 2 * 192 + 64), 2 * (4 * 64 + 2 * 64 + 192)
    assert methods["rows"]["parameters"] == 3 * inputs
    assert methods["columns"]["parameters"] == 3 * outputs
    assert methods["road_1"]["parameters"] == methods["road_peft"]["parameters"] == outputs
    assert methods["lora"]["parameters"] == 8 * (inputs + outputs)


@torch.no_grad()
def test_a_step_of_decoding_is_that_of_the_whole_sequence_and_leaves_the_cache() -> None:
    base = build_model(SHAPES["tiny-llama"], device="cpu", dtype=torch.float32, seed=0).eval()
    prompt, token = torch.randint(50, (3, 5)), torch.randint(50, (3, 1))
    for name in ("rows", "lora"):
        served = serve(METHODS[name], sharing_copy(base), target_names(base), 3)
        expected = served(torch.cat((prompt, token), 1))[:, -1:]
        with served.decoding(prompt, token) as step:
            for _ in range(2):
                torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-5)


def test_a_method_that_mixes_up_its_samples_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_model(SHAPES["tiny-llama"], device="cpu", dtype=torch.float32, seed=0).eval()
    served = serve(METHODS["rows"], base, target_names(base), 3)
    original = mixed_batch.Served.__call__
    monkeypatch.setattr(mixed_batch.Served, "__call__", lambda self, ids: original(self, ids).flip(0))
    with torch.no_grad(), pytest.raises(RuntimeError, match="rows: a sample in the batch is off the sample alone"):
        mixed_batch._error("rows", served, torch.randint(50, (3, 4)), 1e-4)


def test_show_prints_the_table_of_the_file(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    capsys.readouterr()
    assert mixed_batch.main(["--show", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == markdown(result).strip()
    assert all(method.title in printed for method in METHODS.values())
    assert "1 token a sample, 5 cached: at least 0.85" in printed


@pytest.mark.parametrize("option", ["--samples", "--tokens", "--cached", "--repeats", "--threads"])
def test_a_number_below_one_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        mixed_batch.main([option, "0"])
    assert f"{option} is 0, must be at least 1" in capsys.readouterr().err
