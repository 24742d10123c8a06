"""Whatever is exported as LoRA keeps to the rules of servers, or is said to break them, rule by rule."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import RoadConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.tuners.models import build
from turnrow import RocoftConfig
from turnrow.adapters import (
    broken_rules,
    compose,
    export_lora,
    export_road_lora,
    extract_adapter,
    load_adapter,
    max_lora_rank,
    read_adapter,
)
from turnrow.adapters.fingerprint import WeightPrint
from turnrow.adapters.manifest import store_manifest
from turnrow.cli.main import main
from turnrow.errors import UserError

TARGETS = ["query", "value"]


@pytest.fixture
def trained(make_bert, train_a_little, save, tmp_path):
    """`trained(name, mode, ...)`: a RoCoFT adapter on the tiny BERT with a classifier of its own, or without one."""

    def trained(name, mode="row", *, head=True, **settings):
        config = RocoftConfig(
            mode=mode, target_modules=TARGETS, task_type="SEQ_CLS" if head else None, **({"r": 2} | settings)
        )
        return save(train_a_little(make_bert(), config), tmp_path / name)

    return trained


# One export of every kind, by what makes it: (trained, make_bert, tmp_path) -> folder of the LoRA.


def of_mode(mode, **settings):
    return lambda trained, make_bert, tmp_path: export_lora(trained("ours", mode, **settings), tmp_path / "lora")


def composed(trained, make_bert, tmp_path):
    """Rows and columns of several numbers, so that modules differ in rank."""
    first = trained("first", indices={"query": [1, 3], "value": [0]})
    second = trained("second", "column", indices=[2, 4, 5])
    both = compose([first, second], tmp_path / "both", saved_modules_of=first).path
    return export_lora(both, tmp_path / "lora")


def composed_without_head(trained, make_bert, tmp_path):
    pair = trained("first", indices=[1, 3]), trained("second", indices=[2, 3])
    return export_lora(compose(pair, tmp_path / "both", saved_modules_of=False).path, tmp_path / "lora")


def extracted(trained, make_bert, tmp_path):
    tuned = make_bert()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += torch.randn_like(parameter)
    done = extract_adapter(make_bert(), tuned, tmp_path / "ours", r=3, biases=False, task_type="SEQ_CLS")
    return export_lora(done.path, tmp_path / "lora")


def road_by_svd(trained, make_bert, tmp_path):
    config = RoadConfig(variant="road_2", group_size=4, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(make_bert(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "road" in name:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "road"), save_embedding_layers=False)
    return export_road_lora(tmp_path / "road", tmp_path / "lora", base=make_bert(), rank=4).path


EXPORTS = {
    "rows": of_mode("row"),
    "columns": of_mode("column"),
    "rows and columns": of_mode("row+column"),
    "rows without a head": of_mode("row", head=False),
    "ranks of their own": of_mode("row", rank_pattern={"query": 5}),
    "composed": composed,
    "composed without a head": composed_without_head,
    "extracted": extracted,
    "RoAd by SVD": road_by_svd,
}


@pytest.fixture(params=EXPORTS)
def export(request, trained, make_bert, tmp_path):
    return EXPORTS[request.param](trained, make_bert, tmp_path)


def test_every_export_keeps_every_rule(export, make_bert):
    """The rules once more, word by word, beside the code that checks them."""
    adapter = read_adapter(export)
    assert broken_rules(adapter) == []
    config, tensors = adapter.config, dict(adapter.tensors)
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] <= 512
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["bias"] == "none"
    assert not any(config.get(name) for name in ("lora_bias", "use_dora", "use_rslora", "target_parameters"))
    assert config["init_lora_weights"] is True
    assert set(config["modules_to_save"] or ()) <= {"classifier", "score"}
    assert config["target_modules"] == sorted(config["target_modules"])  # the same file every time
    base = make_bert()
    for module in config["target_modules"]:
        a, b = (tensors.pop(f"base_model.model.{module}.lora_{factor}.weight") for factor in "AB")
        weight, rank = base.get_submodule(module).weight, config["rank_pattern"].get(module, config["r"])
        assert (a.shape, b.shape) == ((rank, weight.shape[1]), (weight.shape[0], rank))
    assert all(name.startswith("base_model.model.classifier.") for name in tensors)
    load_adapter(make_bert(), export)  # and peft takes it


# --- every rule, broken ---------------------------------------------------------------------------------------------

KEY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_"
BROKEN = {
    "rank": ({"r": 513, "lora_alpha": 513}, {}, r"rank is at most 512 .* here r is 513"),
    "alpha": ({"lora_alpha": 16}, {}, "the scaling is 1 .* here lora_alpha is 16 and r is 2"),
    "alpha of a module": ({"rank_pattern": {"query": 1}}, {}, "here rank_pattern is {'query': 1} and alpha_pattern {}"),
    "bias": ({"bias": "lora_only"}, {}, "no biases are trained, and here bias is 'lora_only'"),
    "bias of B": ({"lora_bias": True}, {}, "here lora_bias is True"),
    "DoRA": ({"use_dora": True}, {}, "plain LoRA: .* here use_dora is set"),
    "scaling": ({"use_rslora": True}, {}, "plain LoRA: .* here use_rslora is set"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, {}, "here init_lora_weights is 'pissa_niter_4'"),
    "saved": ({"modules_to_save": ["classifier", "pooler"]}, {}, "none but .* here modules_to_save names 'pooler'"),
    "saved tensor": (
        {},
        {"base_model.model.bert.pooler.dense.bias": 16},
        r"here the file holds 'bert\.pooler\.dense\.bias'",
    ),
    "experts": (
        {"target_parameters": ["mlp.experts.down_proj"]},
        {},
        "no parameters of fused experts, and here target_p",
    ),
    "prefix": ({}, {f"{KEY[11:]}A.weight": (2, 16)}, r"tensors are named .* here the file holds 'model\.bert"),
    "other tensor": ({}, {f"{KEY}magnitude_vector": 16}, "here the file holds bert.*query.lora_magnitude_vector"),
    "one factor": ({}, {f"{KEY}A.weight": None}, r"here the file holds one factor of 'bert\S+query' alone"),
    "no target": ({"target_modules": ["value"]}, {}, r"here target_modules does not name 'bert\S+query'"),
    "shape": ({}, {f"{KEY}A.weight": (3, 16)}, r"lora_B \(out, rank\).*query' has \[3, 16\] and \[16, 2\], with r 2"),
    "above r": ({}, {f"{KEY}A.weight": (3, 16), f"{KEY}B.weight": (16, 3)}, r"a rank of at most r, .* with r 2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_named_with_what_breaks_it(case, trained, tmp_path):
    config, tensors, message = BROKEN[case]
    folder = export_lora(trained("ours"), tmp_path / "lora")
    held = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(held | config))
    file = load_file(folder / "adapter_model.safetensors") | {
        key: None if shape is None else torch.ones(shape) for key, shape in tensors.items()
    }
    save_file({key: tensor for key, tensor in file.items() if tensor is not None}, folder / "adapter_model.safetensors")
    (broken,) = broken_rules(read_adapter(folder))
    assert re.search(message, str(broken)), broken


def test_the_smallest_rank_a_server_must_allow():
    """vLLM's choices for max_lora_rank."""
    ranks = (1, 2, 8, 9, 16, 17, 33, 65, 129, 257, 321, 512, 513)
    expected = [1, 8, 8, 16, 16, 32, 64, 128, 256, 320, 512, 512, None]
    assert [max_lora_rank(rank) for rank in ranks] == expected


# --- from the shell -------------------------------------------------------------------------------------------------


def test_the_command_says_what_a_server_must_allow(trained, make_bert, tmp_path, capsys):
    assert main(["export-lora", "--adapter", str(trained("ours", r=9)), "--out", str(tmp_path / "lora")]) == 0
    assert "vLLM takes it with max_lora_rank 16 or more\n" in capsys.readouterr().out
    make_bert().save_pretrained(tmp_path / "base")
    road_by_svd(None, make_bert, tmp_path / "other")
    arguments = [
        "--adapter",
        str(tmp_path / "other" / "road"),
        "--base",
        str(tmp_path / "base"),
        "--out",
        str(tmp_path / "near"),
    ]
    assert main(["export-lora", *arguments, "--rank", "2"]) == 0
    assert "vLLM takes it with max_lora_rank 8 or more\n" in capsys.readouterr().out


def test_the_command_names_the_rank_that_no_server_allows(write, tmp_path, capsys):
    """As an extraction of all changed rows has it."""
    config = {"peft_type": "ROCOFT", "r": 600, "mode": "row", "target_modules": ["first"], "bias": "none"}
    key = "base_model.model.first.rocoft_row"
    folder = write(config, {key: torch.ones(600, 3), f"{key}_index": torch.arange(600)})
    store_manifest(folder, {}, {"first": WeightPrint((600, 3), False, None)}, {})
    assert main(["export-lora", "--adapter", str(folder), "--out", str(tmp_path / "lora")]) == 0
    out = capsys.readouterr().out
    assert "vLLM refuses it: the rank is at most 512 (the largest max_lora_rank), and here r is 600\n" in out


def test_the_command_names_experts(tmp_path, capsys):
    base, _ = build("mixtral")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, RocoftConfig(r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "ours"), save_embedding_layers=False)
    arguments = ["--adapter", str(tmp_path / "ours"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "lora")]
    assert main(["export-lora", *arguments]) == 0
    out = capsys.readouterr().out
    assert "vLLM refuses it: it adapts modules, no parameters of fused experts, and here target_parameters names" in out
    assert "vLLM takes it" not in out
    assert out.count("vLLM") == 1


@pytest.mark.parametrize("export_it", [export_lora, export_road_lora])
def test_heads_that_no_server_takes_are_refused_beforehand(export_it, make_bert, train_a_little, save, tmp_path):
    settings = {"target_modules": TARGETS, "modules_to_save": ["pooler"]}
    is_road = export_it is export_road_lora
    config = RoadConfig(group_size=4, **settings) if is_road else RocoftConfig(**settings)
    model, more = train_a_little(make_bert(), config), {"base": make_bert(), "rank": 1} if is_road else {}
    with pytest.raises(
        UserError, match=r"'bert\.pooler\.dense\.\w+' trained whole, and LoRA servers take only classifier"
    ):
        export_it(save(model, tmp_path / "ours"), tmp_path / "lora", **more)
    assert not (tmp_path / "lora").exists()
