"""Every method on every kind of quantized base: identity at the start, training, disabling, merging, saving, loading."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import turnrow
from tests.tuners.models import METHODS, ROCOFT, build, configure, identical, output, perturb
from tests.tuners.quantized_models import BACKENDS, SIZES, build_quantized, packed, quantized_layers
from turnrow import RocoftConfig, count_parameters
from turnrow.errors import UserError
from turnrow.tuners import _quantized, _quantized_model
from turnrow.tuners.road import RoadLinear
from turnrow.tuners.rocoft import RocoftLinear

FOUR_BITS = ("nf4", "nf4-double", "torchao-int4", "hqq")
MERGE_WARNING = "merging has rounded 6 quantized weights anew: relative error"
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kind = pytest.mark.parametrize(
    ("backend", "method"),
    [
        (backend, method)
        for backend in BACKENDS
        for method in ("row", "column-all-biases", "row+column-indices", "entry", "road_1", "road_4")
        if method == "row" or backend != "nf4-double"
    ],
)


def config_for(method, **fields):
    """Of the six linear layers at the bottom: gradients come to them through layers that are quantized and nothing else."""
    config = configure(method, build("roberta", SIZES)[0], **fields)
    config.target_modules = {name for name in config.target_modules if "layer.0." in name}
    return config


def train(model, inputs, steps=2):
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**inputs).loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable)
        assert any(p.grad.abs().sum() > 0 for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@every_kind
def test_life_of_an_adapter(backend, method, tmp_path):
    base, inputs = build_quantized("roberta", backend)
    reference, before = output(base, inputs), packed(base)
    model = get_peft_model(base, config_for(method))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(output(model, inputs), reference)

    train(model, inputs)
    output(model, inputs)  # evaluated in between
    train(model, inputs)
    adapted = output(model, inputs)
    assert not torch.allclose(adapted, reference, rtol=0, atol=1e-5)
    assert identical(packed(model), before)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), reference)

    weights = {name: module.weight for name, module in quantized_layers(model).items() if hasattr(module, "weight")}
    values = [layer.dense_values() for layer in model.modules() if isinstance(layer, (RocoftLinear, RoadLinear))]
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        model.merge_adapter()
    assert not identical(packed(model), before)
    torch.testing.assert_close(output(model, inputs), adapted, rtol=0, atol=3e-2 if backend in FOUR_BITS else 3e-3)
    model.unmerge_adapter()
    assert identical(packed(model), before)
    again = [layer.dense_values() for layer in model.modules() if isinstance(layer, (RocoftLinear, RoadLinear))]
    assert all(torch.equal(*pair) for pair in zip(values, again, strict=True))
    layers = quantized_layers(model)
    assert all(layers[name].weight is weight for name, weight in weights.items())
    assert all(m.quant_state is m.weight.quant_state for n, m in layers.items() if "layer.0" in n and "nf4" in backend)
    assert torch.equal(output(model, inputs), adapted)
    train(model, inputs, steps=1)

    trained = output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_quantized("roberta", backend)[0], tmp_path).eval()
    assert torch.equal(output(loaded, inputs), trained)
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        merged = loaded.merge_and_unload()
    assert packed(merged).keys() == before.keys()

    unloaded = model.unload()
    assert identical(packed(unloaded), before)
    assert torch.equal(output(unloaded, inputs), reference)


def with_dense_weights(architecture, model):
    """The model with the weights that the quantized `model` computes with, in layers of torch."""
    dense, _ = build(architecture, SIZES)
    for name, module in quantized_layers(model).items():
        layer = RocoftLinear(module, "default", RocoftConfig(r=1), name)
        with torch.no_grad():
            dense.get_submodule(name).weight.copy_(layer.dense_values())
    return dense


@every_kind
def test_gradients_are_those_of_the_dequantized_model(backend, method):
    model, inputs = build_quantized("roberta", backend)
    dense = with_dense_weights("roberta", model)
    gradients = []
    for base in (model, dense):
        adapted = get_peft_model(base, config_for(method)).train()
        perturb(adapted)
        torch.manual_seed(3)  # dropout
        outputs = adapted(**inputs)
        outputs.loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad} | {"y": outputs.logits})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_backend
@pytest.mark.parametrize("method", ["row+column", "road_2"])
def test_the_cost_of_a_merge_is_what_the_weights_have_lost(backend, method):
    model, _ = build_quantized("roberta", backend)
    model = get_peft_model(model, config_for(method))
    perturb(model)
    dense = get_peft_model(with_dense_weights("roberta", model), config_for(method))
    perturb(dense)
    dense.merge_adapter()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (RocoftLinear, RoadLinear))}
    before = {name: layer.dense_values() for name, layer in layers.items()}
    with pytest.warns(UserWarning, match=MERGE_WARNING) as warned:
        model.merge_adapter()
    costs = {name: layer.merge_cost for name, layer in layers.items()}
    assert len(costs) == 6
    for name, cost in costs.items():
        wanted = dense.get_submodule(name).dense_values()
        error = torch.dist(layers[name].dense_values(), wanted)
        torch.testing.assert_close(torch.tensor(cost.error), error, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(torch.tensor(cost.relative), error / wanted.norm(), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(
            torch.tensor(cost.of_change), error / torch.dist(wanted, before[name]), rtol=1e-2, atol=0
        )
        assert 0 < cost.relative < (0.2 if backend in FOUR_BITS else 0.01)
    said = next(w for w in warned if MERGE_WARNING in str(w.message))
    assert said.filename == __file__
    assert str(max(costs.values(), key=lambda cost: cost.relative)) in str(said.message)


@every_backend
def test_two_adapters_are_merged_at_once_and_taken_out_again(backend):
    model, inputs = build_quantized("roberta", backend)
    before = packed(model)
    model = get_peft_model(model, config_for("row"))
    model.add_adapter("second", config_for("column-indices"))
    perturb(model)
    model.base_model.set_adapter(["default", "second"])
    both = output(model, inputs)
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        model.base_model.merge_adapter(["default", "second"])
    torch.testing.assert_close(output(model, inputs), both, rtol=0, atol=3e-2 if backend in FOUR_BITS else 3e-3)
    model.unmerge_adapter()
    assert identical(packed(model), before)
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        model.base_model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match=MERGE_WARNING), pytest.warns(UserWarning, match="additionally merging second"):
        model.base_model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert identical(packed(model), before)
    assert torch.equal(output(model, inputs), both)


@every_backend
@pytest.mark.parametrize("method", ["row+column", "road_1"])
def test_over_a_bfloat16_base_training_is_in_float32(backend, method):
    model, inputs = build_quantized("roberta", backend, dtype=torch.bfloat16)
    before = packed(model)
    model = get_peft_model(model, config_for(method))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train(model, inputs)
    assert output(model, inputs).dtype == torch.bfloat16
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        model.merge_adapter()
    model.unmerge_adapter()
    assert identical(packed(model), before)


@every_backend
def test_moving_a_merged_model_moves_what_unmerging_puts_back(backend):
    model, inputs = build_quantized("roberta", backend)
    before = packed(model)
    model = get_peft_model(model, config_for("row-bias"))
    perturb(model)
    adapted = output(model, inputs)
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        model.merge_adapter()
    model.to("cpu")
    model.unmerge_adapter()
    assert identical(packed(model), before)
    assert torch.equal(output(model, inputs), adapted)


@every_backend
@pytest.mark.parametrize("method", ["row", "column-all-biases"])
def test_counts_are_those_of_the_dense_model(backend, method):
    if backend == "hqq":
        pytest.skip("HQQ keeps biases as plain attributes, which nobody counts")
    model = get_peft_model(build_quantized("roberta", backend)[0], config_for(method))
    assert count_parameters(model) == count_parameters(get_peft_model(build("roberta", SIZES)[0], config_for(method)))


@every_backend
def test_linear_layers_of_any_kind_are_found(backend):
    if backend == "hqq":
        pytest.skip("HQQ's layers are no torch.nn.Linear, which is what peft takes for 'all-linear'")
    model, _ = build_quantized("llama", backend)
    model = get_peft_model(model, RocoftConfig(r=2))
    assert sum(isinstance(m, RocoftLinear) for m in model.modules()) == 14


@every_backend
def test_a_weight_that_cannot_hold_the_sum_stays_as_it_was(backend):
    model, inputs = build_quantized("roberta", backend)
    before, reference = packed(model), output(model, inputs)
    model = get_peft_model(model, config_for("row"))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))
    with pytest.raises(ValueError, match="merged weight has values that .* cannot hold"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert identical(packed(model), before)
    assert torch.equal(output(model.unload(), inputs), reference)


@every_backend
@pytest.mark.parametrize("method", ["row", "road_1"])
def test_an_adapter_that_is_not_cast_up_stays_trainable(backend, method):
    model, inputs = build_quantized("roberta", backend)
    model = get_peft_model(model, config_for(method), autocast_adapter_dtype=False)
    assert all(p.is_floating_point() for p in model.parameters() if p.requires_grad)
    train(model, inputs)


@every_backend
def test_a_copy_of_a_merged_model_unmerges_by_itself(backend):
    import copy

    model, inputs = build_quantized("roberta", backend)
    before = packed(model)
    model = get_peft_model(model, config_for("column"))
    perturb(model)
    adapted = output(model, inputs)
    with pytest.warns(UserWarning, match=MERGE_WARNING):
        model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert identical(packed(twin), before)
    assert torch.equal(output(twin, inputs), adapted)
    assert not identical(packed(model), before)


def test_torchao_weights_without_a_recipe_train_but_do_not_merge():
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao, by pip install 'turnrow[quantized]'")
    model, inputs = build("roberta")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    model = get_peft_model(model, config_for("row"))
    train(model, inputs)
    with pytest.raises(UserError, match="quantized by torchao, into which nothing can be merged; .*from_pretrained"):
        model.merge_adapter()


@pytest.mark.parametrize("method", ["column", "road_2"])
def test_a_quantization_that_cuts_gradients_is_refused_in_training(method):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao, by pip install 'turnrow[quantized]'")
    model, inputs = build("llama")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    reference = output(model, inputs)
    model = get_peft_model(model, configure(method, model))
    torch.testing.assert_close(output(model, inputs), reference)
    with pytest.raises(UserError, match="no gradient goes through this weight quantized by torchao"):
        model(**inputs)


class PatchedLinear(nn.Module):
    """A linear layer of a backend that computes and no more, as GPTQ, AWQ and AQLM are to peft; it knows some by name."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().to(torch.int8))
        self.inner = [linear]

    def forward(self, x):
        return self.inner[0](x)


@pytest.mark.parametrize("method", ["row", "column", "row+column", "entry", "road_1", "road_4"])
def test_a_backend_that_only_computes_trains_but_does_not_merge(monkeypatch, method, tmp_path):
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    monkeypatch.setattr(
        _quantized,
        "resolve_quantization_backend",
        lambda layer: ForwardOnlyQuantizationBackend("sealed") if isinstance(layer, PatchedLinear) else None,
    )

    def sealed():
        model, inputs = build("llama")
        for layer in model.model.layers:
            layer.mlp.up_proj = PatchedLinear(layer.mlp.up_proj)
        return model, inputs

    base, inputs = sealed()
    reference = output(base, inputs)
    model = get_peft_model(base, METHODS[method](target_modules=["up_proj", "q_proj"]))
    train(model, inputs)
    adapted = output(model, inputs)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UserError, match=r"module 'model.layers.0.mlp.up_proj' has a weight quantized by sealed"):
            merge()
    assert torch.equal(output(model, inputs), adapted)  # not even the dense layer was merged
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(sealed()[0], tmp_path).eval(), inputs), adapted)
    torch.testing.assert_close(output(model.unload(), inputs), reference)


def test_other_modules_are_refused_with_the_kinds_that_are_taken():
    with pytest.raises(UserError, match=re.escape("(bitsandbytes, torchao, HQQ and others). 1 of 1 targets")):
        get_peft_model(build("roberta")[0], RocoftConfig(target_modules=["word_embeddings"]))


@pytest.mark.parametrize("method", ["row", "road_1"])
def test_4_bit_weights_are_never_packed_for_the_cpu(method):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, by pip install 'turnrow[quantized]'")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=False)
            self.second = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=False)

        def forward(self, x):
            return self.second(self.first(x))

    model = Two().to("cpu").eval()
    x = torch.randn(4, 64)
    reference = model(x)
    for layer in (model.first, model.second):
        layer.support_avx512bf16_for_cpu = True  # as on a CPU that can
    # and as it leaves a weight after a forward in evaluation
    weight = model.second.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert weight.quant_state.packing_format_for_cpu

    model = get_peft_model(model, METHODS[method](target_modules=["first"]))
    with torch.no_grad():  # were the flag still set, this forward would pack the weights
        torch.testing.assert_close(model(x), reference, rtol=0, atol=2e-2)  # its scales were bfloat16 for a while
    assert not any(getattr(p.quant_state, "packing_format_for_cpu", False) for p in (model.first.weight, weight))
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_dense_layers_ask_no_backend(monkeypatch):
    def never(*_):
        raise AssertionError("importing torchao and bitsandbytes takes seconds")

    monkeypatch.setattr(_quantized, "resolve_quantization_backend", never)
    model, inputs = build("llama")
    output(get_peft_model(model, ROCOFT["row"](target_modules=["q_proj"])), inputs)


@every_backend
@pytest.mark.parametrize("method", ["row+column", "column-all-biases", "road_1"])
def test_a_batch_of_several_adapters(backend, method):
    model, inputs = build_quantized("roberta", backend)
    del inputs["labels"]
    model = get_peft_model(model, config_for(method))
    model.add_adapter("second", config_for(method))
    model.set_adapter("second")
    perturb(model)
    expected = []
    for sample, name in enumerate(("default", "second")):
        model.set_adapter(name)
        expected.append(output(model, inputs)[sample])
    got = output(model, inputs | {"adapter_names": ["default", "second"]})
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-5 if "int8" not in backend else 3e-3)


@every_backend
@pytest.mark.parametrize("strategy", ["wanda_max", "gradient"])
def test_rows_are_selected_as_in_the_dequantized_model(backend, strategy):
    model, inputs = build_quantized("roberta", backend)
    dense = with_dense_weights("roberta", model)
    chosen = []
    for base in (model, dense):
        adapted = get_peft_model(base, config_for("row", selection=strategy))
        selection = turnrow.select(adapted, [inputs])
        chosen.append({(c.module, c.part): set(c.index.tolist()) for c in selection.chosen})
    assert chosen[0].keys() == chosen[1].keys()
    # int8 of bitsandbytes rounds the inputs too when it evaluates, so rows of nearly equal score may change places
    same = sum(len(rows & chosen[1][key]) for key, rows in chosen[0].items())
    assert same >= (16 if backend == "int8" else 18)


@every_backend
def test_beside_lora_in_a_mixed_model(backend):
    if not backend.startswith("torchao"):
        pytest.skip("peft's mixed models take LoRA over no other quantization")
    model, inputs = build_quantized("roberta", backend)
    before = packed(model)
    config = config_for("road_1")
    model = get_peft_model(model, config, adapter_name="turn", mixed=True)
    model.add_adapter("sum", LoraConfig(r=2, target_modules=config.target_modules, init_lora_weights=False))
    model.set_adapter(["turn", "sum"])
    perturb(model)
    train(model, inputs)
    assert identical(packed(model), before)


def test_weights_that_bitsandbytes_reads_back_wrongly_are_named(monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    right = functional.dequantize_4bit
    _quantized_model._is_misread.cache_clear()
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args, **kw: right(*args, **kw).roll(1))
    config = RocoftConfig(r=2, target_modules=["query"])
    get_peft_model(build_quantized("roberta", "nf4")[0], config)  # whole blocks are not asked about
    narrow, _ = build("roberta")
    query = narrow.roberta.encoder.layer[0].attention.self
    import bitsandbytes

    query.query = bitsandbytes.nn.Linear4bit(16, 16, quant_type="nf4")
    query.query.to("cpu")
    with pytest.warns(UserWarning, match=r"rows of 16 values, as that of 'roberta.encoder.layer.0.*query'"):
        get_peft_model(narrow, config)
    _quantized_model._is_misread.cache_clear()
