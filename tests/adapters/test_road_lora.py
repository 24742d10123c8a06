"""The LoRA nearest to a RoAd adapter: as near as the rank allows, and as far off as it says."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, RoadConfig

from turnrow import RocoftConfig
from turnrow.adapters import export_road_lora, load_adapter
from turnrow.cli.main import main
from turnrow.errors import UserError


@pytest.fixture
def road(make_llama, train_a_little, save, tmp_path):
    config = RoadConfig(variant="road_2", group_size=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return save(train_a_little(make_llama(), config), tmp_path / "road")


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_error_is_what_it_says_and_no_lora_is_nearer(rank, road, make_llama, tmp_path):
    export = export_road_lora(road, tmp_path / "lora", base=make_llama(), rank=rank)
    base = make_llama().state_dict()
    turned = load_adapter(make_llama(), road).merge_and_unload().state_dict()
    near = PeftModel.from_pretrained(make_llama(), str(tmp_path / "lora")).merge_and_unload().state_dict()
    assert len(export.errors) == 14
    assert export.biases == {}
    for name, (rest, change) in export.errors.items():
        key = f"{name}.weight"
        delta = turned[key] - base[key]
        assert torch.linalg.vector_norm(delta).item() == pytest.approx(change, rel=1e-4)
        assert torch.linalg.vector_norm(turned[key] - near[key]).item() == pytest.approx(rest, rel=1e-3, abs=1e-5)
        least = torch.linalg.svdvals(delta)[rank:].square().sum().sqrt().item()
        assert rest == pytest.approx(least, rel=1e-3, abs=1e-5)
    assert export.relative_error < (1e-5 if rank == 16 else 1)


def test_large_weights_by_random_projection(road, make_llama, tmp_path, monkeypatch):
    exact = export_road_lora(road, tmp_path / "exact", base=make_llama(), rank=2)
    monkeypatch.setattr("turnrow.adapters.road_lora._EXACT_SIZE", 1)
    random = export_road_lora(road, tmp_path / "random", base=make_llama(), rank=2)
    assert random.relative_error == pytest.approx(exact.relative_error, rel=1e-3)


def test_biases_are_said_to_be_lost(make_gpt2, train_a_little, save, tmp_path, capsys):
    config = RoadConfig(group_size=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    base = make_gpt2()
    with torch.no_grad():
        for block in base.transformer.h:
            block.attn.c_attn.bias.fill_(1.0)
    base.save_pretrained(tmp_path / "base")
    road = save(train_a_little(base, config), tmp_path / "road")
    arguments = [
        "export-lora",
        "--adapter",
        str(road),
        "--base",
        str(tmp_path / "base"),
        "--out",
        str(tmp_path / "lora"),
    ]
    assert main([*arguments, "--rank", "16"]) == 0
    out = capsys.readouterr().out
    assert "LoRA of rank 16 for 2 modules" in out
    assert "it leaves out 0.0% of the change" in out
    assert "the turns of 2 biases, which no LoRA holds" in out
    assert main(arguments) == 2
    assert "--rank" in capsys.readouterr().err


def test_bad_input(road, make_llama, train_a_little, save, tmp_path):
    with pytest.raises(UserError, match="rank is 0; it must be a whole number"):
        export_road_lora(road, tmp_path / "lora", base=make_llama(), rank=0)
    with pytest.raises(UserError, match="the first module that differs is"):
        export_road_lora(road, tmp_path / "lora", base=make_llama(seed=7), rank=1)
    rows = save(train_a_little(make_llama(), RocoftConfig(task_type="CAUSAL_LM")), tmp_path / "rows")
    with pytest.raises(UserError, match="is a ROCOFT adapter, a ROAD adapter is needed"):
        export_road_lora(rows, tmp_path / "lora", base=make_llama(), rank=1)
    assert main(["export-lora", "--adapter", str(rows), "--out", str(tmp_path / "lora"), "--rank", "2"]) == 2
    assert not (tmp_path / "lora").exists()
