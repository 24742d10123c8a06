"""Merging file by file gives what merging in a model gives, bit for bit, and comes undone."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, RoadConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel

from tests.tuners.models import build
from turnrow import RocoftConfig
from turnrow.adapters import load_adapter, load_base, merge_adapter, read_adapter, skeleton
from turnrow.adapters.streaming import (
    ORIGINALS_NAME,
    merge_files,
    plan_merge,
    store_originals,
    unmerge_files,
    why_not_stream,
)
from turnrow.cli.main import main
from turnrow.errors import AdapterError, UserError

METHODS = {
    "rows": RocoftConfig(indices=[4, 1], bias="rocoft_only"),
    "columns": RocoftConfig(mode="column", indices=[4, 1]),
    "both": RocoftConfig(mode="row+column", indices={"row": [4, 1], "column": [0, 3, 2]}),
    "entries": RocoftConfig(mode="entry", density=0.2, selection="random"),
    "road_1": RoadConfig(variant="road_1", group_size=4, target_modules="all-linear"),
    "road_4": RoadConfig(variant="road_4", group_size=2, target_modules="all-linear"),
}
ALL_METHODS = pytest.mark.parametrize("method", METHODS)


def weights_in(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_files(mine, others):
    mine, others = weights_in(mine), weights_in(others)
    assert mine.keys() == others.keys()
    for name, tensor in others.items():
        assert mine[name].dtype == tensor.dtype
        assert torch.equal(mine[name], tensor), name


@pytest.fixture
def case(make_bert, make_llama, make_gpt2, train_a_little, save, tmp_path):
    """`case(kind, config, dtype)`: folders of a base in several files and of an adapter on it."""

    def case(kind, config, dtype=torch.float32):
        make, task = {
            "bert": (make_bert, "SEQ_CLS"),
            "llama": (make_llama, "CAUSAL_LM"),
            "gpt2": (make_gpt2, "CAUSAL_LM"),
        }[kind]
        make().to(dtype).save_pretrained(tmp_path / "base", max_shard_size="6KB")
        config = copy.deepcopy(config)
        config.task_type = task
        if kind == "llama" and config.peft_type == "ROCOFT":
            config.bias = "none"  # it has no biases
        model = train_a_little(make().to(dtype), config)
        return tmp_path / "base", save(model, tmp_path / "adapter")

    return case


@ALL_METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_the_files_are_those_of_merging_in_a_model(kind, dtype, method, case, tmp_path):
    base, adapter = case(kind, METHODS[method], dtype)
    assert len(list(base.glob("*.safetensors"))) > 1
    result = merge_files(adapter, base, tmp_path / "streamed")
    expected = merge_adapter(load_base(read_adapter(adapter), str(base)), adapter, tmp_path / "merged")
    assert_same_files(tmp_path / "streamed", tmp_path / "merged")
    assert list(result.changes) == sorted(result.changes)
    for name, (change, before) in expected.changes.items():
        assert result.changes[name] == (pytest.approx(change, rel=1e-4), pytest.approx(before, rel=1e-4))
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == dtype


def test_experts_and_one_file(tmp_path, save):
    base, _ = build("gpt_oss")
    base.save_pretrained(tmp_path / "base")
    config = RocoftConfig(r=2, mode="row+column", task_type="CAUSAL_LM", init_weights=False)
    from peft import get_peft_model

    adapter = save(get_peft_model(build("gpt_oss")[0], config), tmp_path / "adapter")
    reason = why_not_stream(read_adapter(adapter), tmp_path / "base")
    assert reason is None
    merge_files(adapter, tmp_path / "base", tmp_path / "streamed")
    merge_adapter(load_base(read_adapter(adapter), str(tmp_path / "base")), adapter, tmp_path / "merged")
    assert_same_files(tmp_path / "streamed", tmp_path / "merged")


@pytest.mark.parametrize("labels", [2, 5])
def test_a_base_without_a_head_or_with_another_gets_the_adapter_s(labels, make_bert, train_a_little, save, tmp_path):
    config = RocoftConfig(indices=[1], task_type="SEQ_CLS")
    adapter = save(train_a_little(make_bert(labels=3), config), tmp_path / "adapter")
    plain = make_bert(labels=labels)
    if labels == 2:
        encoder = BertModel(plain.config)
        encoder.load_state_dict(plain.bert.state_dict())
        encoder.save_pretrained(tmp_path / "base")  # names without the prefix "bert."
    else:
        plain.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    merge_files(adapter, tmp_path / "base", tmp_path / "streamed", check_base=False)
    merged = load_adapter(make_bert(labels=3), adapter, check_base=False).merge_and_unload()
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name


@pytest.mark.parametrize("method", ["rows", "columns", "both", "entries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_with_its_originals_an_adapter_comes_out_again_bit_for_bit(method, dtype, case, tmp_path, capsys):
    base, adapter = case("llama", METHODS[method], dtype)
    arguments = ["merge", "--base", str(base), "--adapter", str(adapter)]
    assert main([*arguments, "--keep-base", "--out", str(tmp_path / "merged")]) == 0
    assert (adapter / ORIGINALS_NAME).is_file()
    arguments = ["merge", "--base", str(tmp_path / "merged"), "--adapter", str(adapter)]
    assert main([*arguments, "--unmerge", "--out", str(tmp_path / "back")]) == 0
    assert "took" in capsys.readouterr().out
    for file in base.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="does not hold this adapter: 'model.layers.0"):
        unmerge_files(adapter, base, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_cannot_be_taken_out_again_is_refused(case, tmp_path, make_bert, train_a_little, save):
    base, adapter = case("llama", RocoftConfig(r=1))
    with pytest.raises(UserError, match=f"has no {ORIGINALS_NAME}"):
        unmerge_files(adapter, base, tmp_path / "out")
    road = save(train_a_little(make_bert(), RoadConfig(target_modules=["query"], group_size=4)), tmp_path / "road")
    with pytest.raises(UserError, match="is a ROAD adapter"):
        store_originals(road, base)
    head = save(train_a_little(make_bert(), RocoftConfig(task_type="SEQ_CLS")), tmp_path / "head")
    with pytest.raises(UserError, match=r"also changes 'classifier\.bias', whole"):
        store_originals(head, base)


def test_one_plan_serves_the_originals_and_the_merge(case, tmp_path, monkeypatch):
    base, adapter = case("llama", METHODS["both"])
    built = []
    monkeypatch.setattr(
        "turnrow.adapters.streaming.skeleton", lambda *arguments: built.append(arguments) or skeleton(*arguments)
    )
    arguments = ["merge", "--base", str(base), "--adapter", str(adapter), "--keep-base"]
    assert main([*arguments, "--out", str(tmp_path / "merged")]) == 0
    assert len(built) == 1
    merge_files(adapter, base, tmp_path / "again")
    assert_same_files(tmp_path / "merged", tmp_path / "again")
    plan = plan_merge(read_adapter(adapter), base)
    with pytest.raises(UserError, match=r"the plan is for \S+adapter and \S+base, not for \S+adapter and \S+merged"):
        merge_files(adapter, tmp_path / "merged", tmp_path / "out", plan=plan)
    assert not (tmp_path / "out").exists()


def test_another_base_is_named_and_nothing_is_written(case, make_llama, tmp_path):
    _, adapter = case("llama", RocoftConfig(r=1))
    make_llama(seed=8).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"the first module that differs is 'model\.layers\.0"):
        merge_files(adapter, tmp_path / "other", tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "base", "other"]
    merge_files(adapter, tmp_path / "other", tmp_path / "out", check_base=False)


def test_why_a_base_cannot_be_streamed(case, make_bert, train_a_little, save, tmp_path):
    base, adapter = case("llama", RocoftConfig(r=1))
    assert "is no folder" in why_not_stream(read_adapter(adapter), "some/hub-id")
    assert "has no safetensors files" in why_not_stream(read_adapter(adapter), adapter)
    lora = save(train_a_little(make_bert(), LoraConfig(task_type="SEQ_CLS")), tmp_path / "lora", manifest=False)
    assert "LORA" in why_not_stream(read_adapter(lora), base)
    manifest = json.loads((adapter / "turnrow.json").read_text())
    manifest["base"]["quantization"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (adapter / "turnrow.json").write_text(json.dumps(manifest))
    assert "is quantized while it is loaded" in why_not_stream(read_adapter(adapter), base)
    with pytest.raises(UserError, match="cannot be merged file by file: "):
        merge_files(adapter, "some/hub-id", tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder, file: file.write_bytes(file.read_bytes()[:-4]), "is truncated or damaged"),
        (lambda folder, file: file.write_bytes(b"\xff" * 100), "is truncated, damaged or no safetensors file"),
        (lambda folder, file: file.unlink(), "has no file model-0000"),
        (
            lambda folder, file: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"x": "../y"}})
            ),
            r"names the file '\.\./y', which is not in its folder",
        ),
    ],
)
def test_a_damaged_base_is_refused(spoil, message, case, tmp_path):
    base, adapter = case("llama", RocoftConfig(r=1))
    spoil(base, min(base.glob("*.safetensors")))
    with pytest.raises(UserError, match=message):
        merge_files(adapter, base, tmp_path / "out")


def test_a_killed_merge_leaves_no_model(case, tmp_path):
    base, adapter = case("llama", RocoftConfig(r=1))
    code = (
        "import sys, time, turnrow.adapters.streaming as s\n"
        "write = s.write_tensor\n"
        "def slow(*a):\n    write(*a); print('writing', flush=True); time.sleep(30)\n"
        "s.write_tensor = slow\n"
        "s.merge_files(*sys.argv[1:])"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, adapter, base, out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert "writing" in process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    merge_files(adapter, base, out)
