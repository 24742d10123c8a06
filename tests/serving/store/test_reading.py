"""Which adapters are served, and why others are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.serving_models import model_of, write_adapter
from turnrow import RocoftConfig
from turnrow.errors import AdapterError
from turnrow.serving.layers import served_layers
from turnrow.serving.store.reading import Reader


@pytest.fixture(scope="module")
def reader() -> Reader:
    model = model_of("llama")
    return Reader(model, served_layers(model), torch.float32)


@pytest.fixture
def altered(adapters, tmp_path) -> Callable[..., Path]:
    """`altered(name, config={...}, tensors=change)`: a copy of an adapter with something wrong, and without its manifest."""

    def make(name: str, config: dict[str, Any] | None = None, tensors: Any = None) -> Path:
        folder = tmp_path / name
        shutil.copytree(adapters("llama")[name], folder)
        (folder / "turnrow.json").unlink()
        if config is not None:
            held = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**held, **config}))
        if tensors is not None:
            changed = tensors(load_file(folder / "adapter_model.safetensors"))
            save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def change_first(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    def of(tensors: dict) -> dict:
        key = next(key for key in tensors if key.endswith(ending))
        return {**tensors, key: change(tensors[key]).contiguous()}

    return of


def test_every_method_is_read(adapters, reader):
    for name, folder in adapters("llama").items():
        assert reader.look(folder) in ("ROCOFT", "ROAD", "LORA")
        parts = reader.read(folder)
        assert {part.kind.partition(":")[0] for own in parts.values() for part in own} == {
            "rows": {"rows"},
            "rows-5": {"rows"},
            "columns": {"columns"},
            "both": {"rows", "columns"},
            "entries": {"entries"},
            "road1": {"turn"},
            "road1-halves": {"shears"},
            "road2": {"shears"},
            "road4": {"shears", "blocks"},  # shears where they are not too steep
            "lora": {"lora"},
            "lora-rs": {"lora"},
        }[name], name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_dora": True}, "use_dora is set, and only plain LoRA is served"),
        ({"bias": "all"}, "bias is 'all', and biases trained beside LoRA are not served"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"lora_alpha": "8"}, "the lora_alpha of 'model.layers.0.mlp.down_proj' is '8'; it must be a number"),
        ({"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern has '\(a\+\)\+\$', a regular expression"),
        ({"alpha_pattern": 3}, "alpha_pattern is 3; it must be an object"),
    ],
)
def test_lora_that_is_not_plain_is_refused(altered, reader, setting, message):
    with pytest.raises(AdapterError, match=message):
        reader.read(altered("lora", setting))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lora", change_first("lora_A.weight", lambda t: t[:, :-1]), "do not fit its weight of 16 x 24"),
        ("lora", change_first("lora_B.weight", lambda t: t[:, :-1]), r"lora_A \[4, 24\] and lora_B \[16, 3\]"),
        ("lora", change_first("lora_A.weight", lambda t: t * float("nan")), "holds 96 NaN or infinite values"),
        ("rows", change_first("rocoft_row", lambda t: t[:, :-1]), "the weight is 16 x 24"),
        ("rows", change_first("rocoft_row", lambda t: t + float("inf")), "NaN or infinite values"),
        ("road1", change_first("road_theta", lambda t: t[:-2]), "must be floating-point vectors of one size"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(altered, reader, name, change, message):
    with pytest.raises(AdapterError, match=message):
        reader.read(altered(name, tensors=change))


def test_a_module_trained_whole_is_refused(altered, reader):
    def more(tensors: dict) -> dict:
        return {**tensors, "base_model.model.model.norm.weight": torch.ones(16)}

    with pytest.raises(AdapterError, match="'model.norm.weight' trained whole, which cannot differ within a batch"):
        reader.read(altered("rows", {"modules_to_save": ["norm"]}, more))


def test_another_base_is_refused_by_its_fingerprint(adapters):
    other = model_of("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    folder = adapters("llama")["rows"]
    with pytest.raises(AdapterError, match=r"belongs to another base.* is 'model.layers.1.mlp.up_proj'"):
        Reader(other, served_layers(other), torch.float32).read(folder)
    assert Reader(other, served_layers(other), torch.float32, check_base=False).read(folder)


def test_an_adapter_of_another_architecture_is_refused_at_a_look(adapters, reader):
    with pytest.raises(AdapterError, match="this LlamaForCausalLM has no module 'transformer.h.0.attn.c_attn'"):
        reader.look(adapters("gpt2")["rows"])


def test_a_method_that_is_not_served_is_refused_at_a_look(altered, reader):
    with pytest.raises(AdapterError, match="is a IA3 adapter; served are ROCOFT, ROAD, LORA"):
        reader.look(altered("rows", {"peft_type": "IA3"}))


def test_an_altered_file_is_refused(adapters, reader, tmp_path):
    folder = shutil.copytree(adapters("llama")["rows"], tmp_path / "rows")
    save_file(
        change_first("rocoft_row", lambda t: t + 1)(load_file(folder / "adapter_model.safetensors")),
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(AdapterError, match="was altered"):
        reader.read(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="truncated, damaged or no safetensors file"):
        reader.look(folder)


def test_values_too_large_for_the_models_dtype_are_refused(altered):
    model = model_of("llama").half()
    folder = altered("rows", tensors=change_first("rocoft_row", lambda t: t + 1e6))
    with pytest.raises(AdapterError, match="hold values that float16, the dtype of the model, cannot hold"):
        Reader(model, served_layers(model), torch.float16).read(folder)


def test_an_embedding_is_not_served(reader, tmp_path):
    from peft import LoraConfig

    folder = write_adapter("llama", LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path / "e", seed=1)
    with pytest.raises(AdapterError, match="'model.embed_tokens', which does not see the tokens of a request"):
        reader.look(folder)


def test_the_crossing_of_rows_and_columns_belongs_to_the_rows(tmp_path, reader):
    config = RocoftConfig(mode="row+column", r=2, target_modules=["o_proj"])
    parts = reader.read(write_adapter("llama", config, tmp_path / "both", seed=1))
    columns = next(part for part in parts["model.layers.0.self_attn.o_proj"] if part.kind == "columns")
    assert columns.tensors[0].shape == (2, 16)
    assert (columns.tensors[0][:, :2] == 0).all()
