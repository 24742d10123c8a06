"""Every method on every architecture: identity at the start, training, disabling, merging, saving, loading, two adapters."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tests.tuners.models import (
    ARCHITECTURES,
    METHODS,
    ROCOFT,
    build,
    configure,
    has_biases,
    identical,
    output,
    perturb,
    snapshot,
)
from turnrow import RocoftConfig

CASES = [
    pytest.param(architecture, method, id=f"{architecture}-{method}")
    for architecture in ARCHITECTURES
    for method in METHODS
    if has_biases(architecture) or "bias" not in method
]
every_case = pytest.mark.parametrize(("architecture", "method"), CASES)


def _trained(model, inputs, steps=2):
    """A few real optimizer steps; returns the model in evaluation mode."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(steps):
        model(**inputs).loss.backward()
        # The only parameters without a gradient: biases of modules that the model has but does not use.
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert all(n.endswith("rocoft_bias.default") for n in unused)
        assert len(unused) < len(trainable) / 10
        assert all(torch.isfinite(p.grad).all() for p in trainable if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@every_case
def test_life_of_an_adapter(architecture, method, tmp_path):
    base, inputs = build(architecture)
    before, reference = snapshot(base), output(base, inputs)
    model = get_peft_model(base, configure(method, base))
    torch.testing.assert_close(output(model, inputs), reference)  # identity at the start

    _trained(model, inputs)
    adapted = output(model, inputs)
    assert not torch.allclose(adapted, reference, atol=1e-4)

    with model.disable_adapter():
        assert torch.equal(output(model, inputs), reference)
        assert identical(snapshot(model), before)

    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(output(model, inputs), adapted, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(architecture)[0], tmp_path).eval()
    torch.testing.assert_close(output(loaded, inputs), adapted, rtol=1e-5, atol=1e-5)

    merged = loaded.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), adapted, rtol=1e-4, atol=1e-5)
    assert snapshot(merged).keys() == before.keys()

    unloaded = model.unload()
    torch.testing.assert_close(output(unloaded, inputs), reference)
    if method in ROCOFT:
        assert identical(snapshot(unloaded), before)


@pytest.mark.parametrize("method", ROCOFT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "take_off", ["disable", "switch", "delete", "unmerge", "unload", "state_dict", "exception", "cast"]
)
def test_taking_rocoft_off_leaves_the_base_bit_identical(method, dtype, take_off):
    base, inputs = build("roberta", dtype=dtype)
    before = snapshot(base)
    model = get_peft_model(base, configure(method, base))
    model.add_adapter("other", RocoftConfig(target_modules=["query"]))
    perturb(model)
    live = output(model, inputs)
    assert not identical(snapshot(model), before)  # the weights were live: without this the test proves nothing

    if take_off == "disable":
        model.base_model.disable_adapter_layers()
    elif take_off == "switch":
        model.set_adapter("other")
    elif take_off == "delete":
        model.set_adapter("other")
        output(model, inputs)
        model.set_adapter("default")
        output(model, inputs)
        with pytest.warns(UserWarning, match="was active which is now deleted"):
            model.delete_adapter("default")
    elif take_off == "unmerge":
        model.merge_adapter()
        assert torch.equal(output(model, inputs), live)
        model.unmerge_adapter()
    elif take_off == "unload":
        model = model.unload()
    elif take_off == "state_dict":
        model.state_dict()
    elif take_off == "cast":
        model.to(torch.float64).to(dtype)
    elif take_off == "exception":
        model.base_model.model.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), model.disable_adapter():
            output(model, inputs)
        model.base_model.disable_adapter_layers()
    assert identical(snapshot(model), before)


def test_an_exception_in_mid_forward_loses_nothing():
    base, inputs = build("llama")
    before = snapshot(base)
    model = get_peft_model(base, configure("row", base))
    perturb(model)
    hook = base.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    hook.remove()
    assert not identical(snapshot(model), before)  # the first layer went live, the second did not
    assert identical(snapshot(model.unload()), before)


def test_an_exception_while_the_weight_is_written_loses_nothing(monkeypatch):
    from turnrow.ops import rows

    base, inputs = build("llama")
    before = snapshot(base)
    model = get_peft_model(base, configure("row", base))
    perturb(model)
    real = rows.put_

    def interrupted(weight, index, values):
        real(weight, index[:1], values[:1])  # one row of three
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "put_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    monkeypatch.setattr(rows, "put_", real)
    assert identical(snapshot(model.unload()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_what_was_trained(method, dtype):
    model, inputs = build("roberta", dtype=dtype)
    model = get_peft_model(model, configure(method, model))
    perturb(model)
    adapted = output(model, inputs)
    merged = output(model.merge_and_unload(safe_merge=True), inputs)
    if method in ROCOFT and "bias" not in method:
        assert torch.equal(merged, adapted)  # the live weight is the merged weight, in any dtype
    else:
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.03}
        torch.testing.assert_close(merged, adapted, **tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_before_and_after_training(method):
    model, inputs = build("llama")
    model = get_peft_model(
        model, configure({"row-bias": "row", "column-all-biases": "column"}.get(method, method), model)
    )
    perturb(model)
    with torch.inference_mode():
        first = model(**inputs).logits
    torch.testing.assert_close(first.clone(), output(model, inputs), rtol=0, atol=0)
    _trained(model, inputs)
    with torch.inference_mode():
        second = model(**inputs).logits
    torch.testing.assert_close(second.clone(), output(model, inputs), rtol=0, atol=0)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_safe_merge_refuses_broken_values_and_changes_nothing(method):
    model, _ = build("roberta")
    model = get_peft_model(model, configure(method, model))
    before = snapshot(model)
    parameter = next(p for n, p in model.named_parameters() if "rocoft_" in n or "road_" in n)
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert identical(snapshot(model), before)


def test_road_with_a_scale_of_zero_can_still_be_unmerged():
    model, inputs = build("roberta")
    model = get_peft_model(model, configure("road_1", model))
    before = snapshot(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "road_alpha" in n)[0] = 0.0
    adapted = output(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), adapted)
    model.unmerge_adapter()
    after = snapshot(model)
    for name in before:
        torch.testing.assert_close(after[name], before[name])


@pytest.mark.parametrize("method", METHODS)
def test_two_adapters_keep_apart(method):
    model, inputs = build("roberta")
    reference = output(model, inputs)
    model = get_peft_model(model, configure(method, model))
    perturb(model)
    first = output(model, inputs)
    model.add_adapter("second", configure(method, build("roberta")[0]))
    torch.testing.assert_close(output(model, inputs), first, rtol=0, atol=0)
    model.set_adapter("second")
    torch.testing.assert_close(output(model, inputs), reference)
    model.set_adapter("default")
    torch.testing.assert_close(output(model, inputs), first)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".second" in n} == set()


@pytest.mark.parametrize("mode", ["row", "column", "row+column", "entry"])
def test_overlay_agrees_with_live(mode):
    def adapted(overlay: bool):
        model, inputs = build("llama")
        model = get_peft_model(model, configure(mode, model))
        for module in model.modules():
            if hasattr(module, "weight_is_shared"):
                module.weight_is_shared = overlay
        perturb(model)
        model(**inputs).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return output(model, inputs), gradients, model

    live_output, live_gradients, live_model = adapted(False)
    overlay_output, overlay_gradients, overlay_model = adapted(True)
    torch.testing.assert_close(live_output, overlay_output)
    assert len(live_gradients) == len(overlay_gradients) == 14 * len(mode.split("+"))
    for live, overlay in zip(live_gradients, overlay_gradients, strict=True):
        torch.testing.assert_close(live, overlay)
    base = snapshot(build("llama")[0])
    assert identical(snapshot(overlay_model), base)
    assert not identical(snapshot(live_model), base)


@pytest.mark.parametrize("mode", ["row", "column", "row+column", "entry"])
def test_several_active_adapters_add_up(mode):
    model, inputs = build("llama")
    base = snapshot(model)
    model = get_peft_model(model, configure(mode, model))
    model.add_adapter("second", configure("column" if mode == "row" else "row", build("llama")[0]))
    perturb(model)
    model.base_model.set_adapter(["default", "second"])
    both = output(model, inputs)
    assert identical(snapshot(model), base)  # overlay: no weight is touched
    model.base_model.merge_adapter(["default", "second"])
    torch.testing.assert_close(output(model, inputs), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert identical(snapshot(model), base)


def test_a_layer_wrapped_for_its_bias_still_shows_what_models_read_of_it():
    model, _ = build("roberta")
    model = get_peft_model(model, configure("column-all-biases", model))
    norm = model.base_model.model.roberta.encoder.layer[0].output.LayerNorm
    assert type(norm).__name__ == "RocoftBias"
    assert norm.normalized_shape == (16,)
    assert norm.eps == model.config.layer_norm_eps
    with pytest.raises(AttributeError, match="nothing"):
        norm.nothing  # noqa: B018


def test_init_weights_false_starts_away_from_the_base():
    model, inputs = build("llama")
    reference = output(model, inputs)
    model = get_peft_model(model, configure("row", model, init_weights=False))
    assert not torch.allclose(output(model, inputs), reference, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), reference)


def test_tied_weights_are_not_changed_in_place():
    model, inputs = build("gpt2")  # its head is tied to the embedding
    embedding = model.transformer.wte.weight.detach().clone()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(model, RocoftConfig(r=2, target_modules=["lm_head", "c_attn"]))
    perturb(model)
    reference = output(model, inputs)
    assert torch.equal(model.base_model.model.transformer.wte.weight, embedding)
    model.base_model.disable_adapter_layers()
    assert not torch.allclose(output(model, inputs), reference)


def test_a_state_dict_of_the_whole_model_loads_into_another():
    model, inputs = build("llama")
    model = get_peft_model(model, configure("row", model))
    perturb(model)
    adapted = output(model, inputs)
    state = model.state_dict()  # while the weights are live: W0 and delta, not W0 + delta and delta
    other, _ = build("llama")
    other = get_peft_model(other, configure("row", other))
    output(other, inputs)
    other.load_state_dict(state)
    assert torch.equal(output(other, inputs), adapted)
    assert torch.equal(output(model, inputs), adapted)


def test_deepcopy_of_a_live_model_is_independent():
    import copy

    model, inputs = build("llama")
    before = snapshot(model)
    model = get_peft_model(model, configure("column", model))
    perturb(model)
    adapted = output(model, inputs)
    twin = copy.deepcopy(model)
    assert identical(snapshot(model.unload()), before)
    assert torch.equal(output(twin, inputs), adapted)
    assert identical(snapshot(twin.unload()), before)


def test_chosen_indices_are_in_the_file_and_come_back(tmp_path):
    from safetensors.torch import load_file

    model, inputs = build("llama")
    config = RocoftConfig(
        indices={"q_proj": [9, 4], "layers.1.self_attn.q_proj": [3]}, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(model, config)
    perturb(model)
    adapted = output(model, inputs)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    assert tensors[f"{prefix}.0.self_attn.q_proj.rocoft_row_index"].tolist() == [9, 4]
    assert tensors[f"{prefix}.1.self_attn.q_proj.rocoft_row_index"].tolist() == [3]
    assert tensors[f"{prefix}.0.self_attn.v_proj.rocoft_row_index"].tolist() == [0, 1, 2]
    loaded = PeftModel.from_pretrained(build("llama")[0], tmp_path)
    assert torch.equal(output(loaded, inputs), adapted)


def test_data_written_past_the_version_counter_is_seen_while_training():
    model, inputs = build("llama")
    model = get_peft_model(model, configure("row", model))
    before = output(model, inputs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)  # as some averaging callbacks do
    assert not torch.allclose(output(model, inputs), before)


def test_every_layer_tells_its_features_as_those_of_peft_do():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 2))
    model = get_peft_model(model, RocoftConfig(r=1, bias="all", target_modules=["4"]))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(3, 4), (4, 4), (4, 6), (6, 2)]
