"""A quantized base through a run: loaded, trained, evaluated again, merged."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertModel, RobertaConfig, RobertaModel

from tests.training.conftest import tiny_config
from tests.training.test_resume import WEIGHTS, CrashError, crash
from turnrow.adapters import quantization as adapters_quantization
from turnrow.cli.main import main
from turnrow.errors import UserError
from turnrow.tasks import make_task
from turnrow.training import evaluate_adapter, load_saved, train
from turnrow.training.base import load_base
from turnrow.training.quantization import QUANTIZATIONS, check_quantization

DOUBLE = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
every_kind = pytest.mark.parametrize("kind", [*QUANTIZATIONS, pytest.param(DOUBLE, id="nf4-double")])


def needs_package(kind):
    package = "torchao" if "torchao" in kind else "bitsandbytes"
    pytest.importorskip(package, reason=f"needs {package}, by pip install 'turnrow[quantized]'")


@pytest.fixture
def base(tmp_path, tiny_tokenizer):
    """A BERT whose layers have whole groups of inputs."""
    folder = tmp_path / "wide"
    config = tiny_config(len(tiny_tokenizer))
    config.hidden_size = config.intermediate_size = 64
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def task():
    task = make_task(name="classification", text=["sentence"], label="label")
    task.labels = [0, 1]
    return task


@every_kind
@pytest.mark.filterwarnings("ignore:merging has rounded")
def test_a_run_is_evaluated_again_to_the_last_digit_and_merged(kind, base, films, make_recipe, tmp_path, capsys):
    needs_package(kind)
    stars = {"name": "regression", "text": ["sentence"], "label": "stars"}
    result = train(make_recipe(model=base, task=stars, quantization=kind))
    assert evaluate_adapter(result.adapter, str(films / "test.jsonl"), quiet=True) == result.metrics["after"]
    assert result.metrics["after"] != result.metrics["before"]
    manifest = json.loads((result.adapter / "turnrow.json").read_text())
    assert manifest["base"]["quantization"]["quant_method"] == ("torchao" if "torchao" in kind else "bitsandbytes")
    assert manifest["provenance"]["recipe"]["quantization"] == kind

    assert main(["merge", "--adapter", str(result.adapter), "--out", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "rounded 13 quantized weights anew: relative error" in said
    assert "of the adapter's change" in said
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.is_quantized
    assert merged.classifier.weight.dtype == torch.float32

    assert main(["merge", "--adapter", str(result.adapter), "--out", str(tmp_path / "dense"), "--dequantize"]) == 0
    assert "rounded" not in capsys.readouterr().out
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    assert not getattr(dense, "is_quantized", False)
    adapted = load_saved(result.adapter).model
    ids = torch.arange(5, 15)[None]
    wanted, lossless, rounded = (m.eval()(input_ids=ids).logits for m in (adapted, dense, merged))
    torch.testing.assert_close(lossless, wanted, rtol=0, atol=1e-5 if kind != "int8" else 3e-3)
    torch.testing.assert_close(rounded, wanted, rtol=0, atol=0.2)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao_int4"])
def test_a_resumed_run_ends_with_the_same_weights(kind, base, make_recipe, monkeypatch, tmp_path):
    needs_package(kind)
    changes = {"model": base, "quantization": kind, "training": {"save_steps": 3, "eval_strategy": "no"}}
    whole = train(make_recipe(**changes, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        crash(patch, 6)
        with pytest.raises(CrashError):
            train(make_recipe(**changes))
    resumed = train(make_recipe(**changes), resume=True)
    assert resumed.metrics["resumed_from_step"] == 3
    assert (resumed.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()


@pytest.mark.parametrize("method", [{"name": "road", "group_size": 8}, {"name": "lora", "r": 2}, {"name": "head"}])
def test_other_methods_train_on_it_too(method, base, films, make_recipe):
    needs_package("nf4")
    result = train(make_recipe(model=base, quantization="nf4", method=method, training={"max_steps": 2}))
    assert evaluate_adapter(result.adapter, str(films / "test.jsonl"), quiet=True) == result.metrics["after"]


@every_kind
def test_what_is_trained_whole_is_never_quantized(kind, tmp_path, tiny_tokenizer, task):
    needs_package(kind)
    # the head of RoBERTa is two layers, and the last parameter of the model is a bias
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(vocab_size=len(tiny_tokenizer), **sizes)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), task, quantization=kind)
    assert loaded.new_modules == ("classifier",)
    for name, module in loaded.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            plain = type(module) is torch.nn.Linear and type(module.weight) is torch.nn.Parameter
            assert plain == name.startswith("classifier."), name


def test_unknown_names_and_values_are_refused(make_recipe):
    with pytest.raises(UserError, match="quantization is 'nf5'; did you mean 'nf4'.*quantization_config"):
        make_recipe(quantization="nf5")
    with pytest.raises(UserError, match="quantization is 4; allowed are nf4, int8, torchao_int8, torchao_int4"):
        check_quantization(4)
    with pytest.raises(UserError, match="method full trains every weight, and quantized ones cannot be trained"):
        make_recipe(quantization="nf4", method={"name": "full"})


def test_a_mapping_is_checked_by_transformers(base, task):
    with pytest.raises(UserError, match="quant_method 'bitsandbyte'; did you mean 'bitsandbytes'"):
        load_base(base, task, quantization={"quant_method": "bitsandbyte"})
    with pytest.raises(UserError, match="needs one of load_in_4bit: true and load_in_8bit: true"):
        load_base(base, task, quantization={"quant_method": "bitsandbytes"})
    needs_package("nf4")
    with pytest.raises(UserError, match="quantization .*'bnb_4bit_compute_dtype': 3.*ValueError"):
        load_base(base, task, quantization={"load_in_4bit": True, "bnb_4bit_compute_dtype": 3})


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_missing_package_names_the_extra(monkeypatch, base, task, kind):
    monkeypatch.setattr(adapters_quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'turnrow\[quantized\]'"):
        load_base(base, task, quantization=kind)


def test_layers_that_no_group_divides_are_refused(tiny_base, task):
    needs_package("torchao_int4")
    with pytest.raises(UserError, match="cannot be quantized by torchao: .*a multiple of the group: 32"):
        load_base(str(tiny_base), task, quantization="torchao_int4")


def test_what_serves_for_inference_only_is_refused(base, task):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao, by pip install 'turnrow[quantized]'")
    from transformers import TorchAoConfig

    kind = TorchAoConfig(torchao.Int8DynamicActivationIntxWeightConfig(torch.int4)).to_dict()
    with pytest.raises(UserError, match="quantization by torchao serves for inference only, says transformers"):
        load_base(base, task, quantization=kind)
