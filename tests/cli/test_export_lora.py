"""`turnrow export-lora` writes an adapter that stock peft loads as LoRA."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from turnrow import RocoftConfig
from turnrow.adapters import write_manifest
from turnrow.cli.main import main


@pytest.fixture
def model(tmp_path):
    """A trained model; `base` and `adapter` lie in tmp_path."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, RocoftConfig(r=2, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    write_manifest(tmp_path / "adapter", model)
    return model


@pytest.mark.parametrize("manifest", [True, False])
def test_exported_adapter_computes_the_same_under_stock_peft(model, tmp_path, capsys, manifest):
    arguments = ["export-lora", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "lora")]
    if not manifest:
        (tmp_path / "adapter" / "turnrow.json").unlink()
        assert main(arguments) == 2
        assert "--base" in capsys.readouterr().err
        arguments += ["--base", str(tmp_path / "base")]
    assert main(arguments) == 0
    assert "LoRA of rank 2 for 7 modules, scaling 1" in capsys.readouterr().out
    lora = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    tokens = torch.arange(8).reshape(1, 8)
    torch.testing.assert_close(lora(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
