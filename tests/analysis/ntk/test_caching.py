"""A cached result is found when everything is the same, and only then."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.analysis.ntk.models import case
from turnrow.analysis.ntk import CausalLabelWords, Full, LoRA, Rows, kernels, tangent_kernels
from turnrow.errors import UserError

WANTED = {"rows": Rows(), "lora": LoRA(r=2)}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every batch that the model is run on."""
    seen: list[int] = []
    original = kernels.FactorPass.add
    monkeypatch.setattr(kernels.FactorPass, "add", lambda self, batch: (seen.append(1), original(self, batch))[1])
    return seen


def test_the_second_time_nothing_is_computed(tmp_path: Path, passes: list[int]) -> None:
    made = case("llama")
    first = tangent_kernels(made.model, made.train, WANTED, made.outputs, made.other, cache=tmp_path)
    assert len(passes) == 3
    second = tangent_kernels(
        made.model, made.train, WANTED, made.outputs, made.other, cache=tmp_path, block_bytes=10**6
    )
    assert len(passes) == 3
    for name in WANTED:
        np.testing.assert_array_equal(first[name].train, second[name].train)
        np.testing.assert_array_equal(first[name].other, second[name].other)
        assert first[name].parameters == second[name].parameters
    np.testing.assert_array_equal(first.train_outputs, second.train_outputs)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]  # and nothing temporary


def test_whatever_changes_is_computed_anew(tmp_path: Path, passes: list[int]) -> None:
    made = case("llama")
    model = copy.deepcopy(made.model)

    def run(**changed) -> None:
        request = {"model": model, "batches": made.train, "kernels": WANTED, "outputs": made.outputs} | changed
        tangent_kernels(**request, cache=tmp_path)

    run()
    other_data = copy.deepcopy(made.train)
    other_data[0]["input_ids"][0, 0] += 1
    for changed in (
        {"batches": other_data},
        {"outputs": CausalLabelWords([4, 5, 7])},
        {"kernels": {"rows": Rows(rows=2), "lora": LoRA(r=2)}},
        {"kernels": {"rows": Rows(), "lora": LoRA(r=2, seed=1)}},
        {"other_batches": made.other},
    ):
        before = len(passes)
        run(**changed)
        assert len(passes) > before, changed
    before = len(passes)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-12
    run()
    assert len(passes) > before
    before = len(passes)
    run()
    assert len(passes) == before


def test_a_damaged_file_is_made_anew(tmp_path: Path, passes: list[int]) -> None:
    made = case("llama")
    first = tangent_kernels(made.model, made.train, {"full": Full()}, made.outputs, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    second = tangent_kernels(made.model, made.train, {"full": Full()}, made.outputs, cache=tmp_path)
    np.testing.assert_array_equal(first["full"].train, second["full"].train)
    assert len(passes) == 4
    tangent_kernels(made.model, made.train, {"full": Full()}, made.outputs, cache=tmp_path)
    assert len(passes) == 4


def test_outputs_that_cannot_be_named_are_refused(tmp_path: Path) -> None:
    made = case("llama")
    with pytest.raises(UserError, match="`cache_key`"):
        tangent_kernels(
            made.model, made.train, WANTED, lambda model, batch: model(**batch).logits[:, -1, :2], cache=tmp_path
        )
    assert not list(tmp_path.iterdir())
