"""Adapters of fused experts on disk: fingerprints, checks, inspection, merging and export."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tuners.models import MIXTURES, build, output, perturb
from turnrow import RocoftConfig
from turnrow.adapters import export_lora, inspect_adapter, load_adapter, merge_adapter, write_manifest
from turnrow.adapters.fingerprint import SAMPLES, WeightPrint, fingerprint, named_weights, weight_shape
from turnrow.adapters.reading import read_adapter
from turnrow.cli.main import main
from turnrow.errors import UserError
from turnrow.tuners.rocoft import RocoftExpertWeight

EXPERTS = "model.layers.{}.mlp.experts.{}"


@pytest.fixture
def trained(tmp_path):
    """`trained(architecture, **config)`: an adapter in tmp_path / "ours" with its manifest, and the model with it."""

    def make(architecture="mixtral", **fields):
        base, inputs = build(architecture)
        model = get_peft_model(base, RocoftConfig(**({"r": 2, "task_type": "CAUSAL_LM"} | fields)))
        perturb(model, 0.1)
        output(model, inputs)  # live: the manifest must see the original weights all the same
        model.save_pretrained(str(tmp_path / "ours"), save_embedding_layers=False)
        write_manifest(tmp_path / "ours", model)
        return model, inputs

    return make


@pytest.mark.parametrize("mode", ["row", "column", "row+column", "entry"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_it_loads_onto_its_base_and_no_other(trained, architecture, mode, tmp_path):
    model, inputs = trained(architecture, mode=mode, density=0.1 if mode == "entry" else None)
    loaded = load_adapter(build(architecture)[0], tmp_path / "ours").eval()
    assert torch.equal(output(loaded, inputs), output(model, inputs))

    load_adapter(build(architecture, dtype=torch.bfloat16)[0], tmp_path / "ours")  # the same checkpoint, rounded
    other, _ = build(architecture)
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.mul_(1.1)
    with pytest.raises(
        UserError, match=r"first module that differs is 'model.layers.1.mlp.experts.down_proj': \d+ of 32"
    ):
        load_adapter(other, tmp_path / "ours")
    merged, _ = build(architecture)
    merged = load_adapter(merged, tmp_path / "ours").merge_and_unload()
    with pytest.raises(UserError, match="differs is 'model.layers.0.self_attn.q_proj'"):
        load_adapter(merged, tmp_path / "ours")


def test_the_fingerprint_reaches_all_experts_and_what_is_their_own():
    weights = named_weights(build("gpt_oss")[0])
    fused = weights[EXPERTS.format(0, "gate_up_proj")]
    assert weight_shape(fused) == (4, 48, 16)
    index = torch.tensor([[7, 3], [1, 40], [0, 2], [47, 46]])
    before = fingerprint(fused, {"rocoft_row_index": index})
    assert (before.shape, before.transposed, len(before.sample)) == ((4, 48, 16), True, SAMPLES)
    assert WeightPrint.from_dict(before.to_dict(), "here").difference(before) is None
    for expert in range(4):
        changed = copy.deepcopy(fused)
        changed.matrices(values=True)[expert, index[expert]] += 0.1
        assert before.difference(fingerprint(changed, {"rocoft_row_index": index})) is not None


def test_a_base_of_other_experts_is_refused(trained, tmp_path):
    from transformers import MixtralForCausalLM

    model, _ = trained()
    config = copy.deepcopy(model.config)
    config.num_local_experts = 5
    with pytest.raises(
        UserError,
        match=r"experts.\w+': rocoft_row is float32 \[4, 2, \d+\], its first dimension must be that of the 5 experts",
    ):
        load_adapter(MixtralForCausalLM(config), tmp_path / "ours", check_base=False)
    (tmp_path / "ours" / "turnrow.json").unlink()
    with pytest.raises(UserError, match=r"has no module 'model.layers.0.mlp.experts.down_proj'"):
        load_adapter(build("llama")[0], tmp_path / "ours")


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("rocoft_row_index", lambda t: t.index_fill(1, torch.tensor([1]), 99), "holds 99, out of range: allowed is 0 to 47"),
        ("rocoft_row_index", lambda t: torch.cat((t[:3], t[:1, :1].expand(1, 2))), "holds 0 twice"),
        ("rocoft_row_index", lambda t: t[:3].contiguous(), "rocoft_row is float32 [4, 2, 16], its first dimension must be that of the 3 experts"),
        ("rocoft_row_index", lambda t: t[0].clone(), "rocoft_row must be a floating-point matrix, got float32 [4, 2, 16]"),
        ("rocoft_row", lambda t: t[:, :1].contiguous(), "rocoft_row_index has 2 entries for the 1 rows of rocoft_row"),
        ("rocoft_row", lambda t: t[:, :, :5].contiguous(), "rocoft_row is float32 [2, 5], the weight is 48 x 16"),
        ("rocoft_row", lambda t: t.sum(2), "rocoft_row must be a floating-point matrix"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(trained, tmp_path, tensor, change, message):
    trained()
    folder = tmp_path / "ours"
    tensors = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{EXPERTS.format(1, 'gate_up_proj')}.{tensor}"
    tensors[key] = change(tensors[key])
    (folder / "turnrow.json").unlink()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=re.escape(message)):
        load_adapter(build("mixtral")[0], folder)


def test_inspection_counts_and_shows_the_experts(trained, tmp_path, capsys):
    own = [[0, 5], [7, 1], [2, 3], [15, 4]]
    model, _ = trained(indices={"layers.1.mlp.experts.down_proj": own})
    summary = inspect_adapter(tmp_path / "ours")
    assert summary.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    entries = {entry.name: entry for entry in summary.modules}
    down = entries[EXPERTS.format(1, "down_proj")]
    assert down.shape == [4, 16, 24]
    assert down.indices == {"row": own}
    assert down.parameters == 4 * 2 * 24
    assert main(["inspect", str(tmp_path / "ours")]) == 0
    shown = capsys.readouterr().out
    assert "row 0 1 in each of 4 experts" in shown
    assert "row 0 5 in the first of 4 experts" in shown
    assert "4 x 16 x 24" in shown


@pytest.mark.parametrize("architecture", MIXTURES)
def test_merged_equals_unmerged_and_is_a_plain_model(trained, architecture, tmp_path):
    from transformers import AutoModelForCausalLM

    model, inputs = trained(architecture)
    base, _ = build(architecture)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    result = merge_adapter(base, tmp_path / "ours", tmp_path / "merged")
    assert set(result.changes) == set(read_adapter(tmp_path / "ours").modules)
    name = EXPERTS.format(0, "down_proj")
    change = (dict(base.named_parameters())[name] - before[name]).norm().item()
    held = [before[key].norm().item() for key in (name, f"{name}_bias") if key in before]
    assert result.changes[name] == pytest.approx((change, math.hypot(*held)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(output(merged, inputs), output(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["row", "column", "row+column"])
@pytest.mark.parametrize("architecture", [*MIXTURES, "llama4"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft's, of fused weights
def test_stock_peft_loads_the_export_with_a_change_of_every_expert_equal_to_ours(trained, architecture, mode, tmp_path):
    model, inputs = trained(architecture, mode=mode, rank_pattern={"experts.down_proj": 3})
    base, _ = build(architecture)
    lora = PeftModel.from_pretrained(base, export_lora(tmp_path / "ours", tmp_path / "lora", base=base)).eval()
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, RocoftExpertWeight)}
    compared = 0
    for name, module in lora.get_base_model().named_modules():
        if not isinstance(module, ParamWrapper):
            continue
        layer = layers[f"{name.replace('.base_layer', '')}.{module.parameter_name}"]
        found = module.get_delta_weight("default")
        changed = torch.zeros(layer.base_layer.shape)
        for part in layer.parts("default"):
            part.ops.put_(changed, part.index, part.ops.keep(changed, part.index) + part.delta().detach())
        assert torch.equal(found.mT if layer.base_layer.transposed else found, changed)
        compared += 1
    assert compared == len(layers) == 4
    torch.testing.assert_close(output(lora, inputs), output(model, inputs), rtol=1e-4, atol=1e-5)


def test_the_export_of_experts_needs_the_base_and_says_so(trained, tmp_path, capsys):
    model, inputs = trained("mixtral", target_modules=[], target_parameters=["experts.down_proj"])
    arguments = ["export-lora", "--adapter", str(tmp_path / "ours"), "--out", str(tmp_path / "lora")]
    assert main(arguments) == 2
    assert "trains fused experts ('model.layers.0.mlp.experts.down_proj')" in capsys.readouterr().err
    base, _ = build("mixtral")
    base.save_pretrained(tmp_path / "base")
    assert main([*arguments, "--base", str(tmp_path / "base")]) == 0
    assert "LoRA of rank 2 for 2 modules" in capsys.readouterr().out
    lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    torch.testing.assert_close(output(lora, inputs), output(model, inputs), rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_not_plain_has_no_sample():
    fused = next(
        iter(w for n, w in named_weights(nn.Sequential(build("mixtral")[0])).items() if n.endswith("down_proj"))
    )
    fused.module.to("meta")
    assert fingerprint(fused, {}) == WeightPrint((4, 16, 24), False, None)
