"""An adapter takes the place of another in a model that is compiled and running: the same tensors, other values, at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tuners.mixed import BASE, mixed
from tests.tuners.models import build, identical, output, snapshot
from tests.tuners.swapping import CONFIGS, LINEAR, inputs_for, load, network, save, save_pair
from turnrow import RoadConfig, RocoftConfig, hotswap_adapter, swap_gate
from turnrow.adapters import load_adapter, write_manifest
from turnrow.errors import AdapterError, UserError
from turnrow.tuners import hotswap

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

METHODS = pytest.mark.parametrize("method", CONFIGS)
SOME = pytest.mark.parametrize("method", ["row", "row+column", "road_1"])


@pytest.fixture
def pair(tmp_path):
    """`pair(method)`: folders of two adapters of one shape, which change other rows, columns or entries by other values."""

    return lambda method: save_pair(tmp_path, method)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def x():
    return torch.randn(2, 5, 16)


@pytest.fixture
def network_pair(tmp_path):
    """As `pair`, for a network that compiles at once."""

    return lambda method: save_pair(tmp_path, method, None)


def _config(model, name: str = "default"):
    return {key: set(v) if isinstance(v, list) else v for key, v in model.peft_config[name].to_dict().items()}


def _tensors(model):
    return {
        name: (id(tensor), tensor.data_ptr())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if "rocoft_" in name or "road_" in name or "modules_to_save" in name
    }


# --- the values ------------------------------------------------------------------------------------------------------


@METHODS
def test_a_swapped_model_computes_what_a_freshly_loaded_one_does(method, pair):
    old, new = pair(method)
    model, inputs = load(old), inputs_for()
    before = output(model, inputs)  # RoCoFT's weights are live from now on
    places = _tensors(model)
    hotswap_adapter(model, new)
    fresh = load(new)
    after = output(model, inputs)
    assert torch.equal(after, output(fresh, inputs))
    assert not torch.allclose(after, before, atol=1e-4)
    assert _tensors(model) == places
    assert _config(model) == _config(fresh)
    hotswap_adapter(model, old)
    assert torch.equal(output(model, inputs), before)


@METHODS
def test_the_base_stays_as_it_was(method, pair):
    old, new = pair(method)
    model, inputs = load(old), inputs_for()
    base = snapshot(model)
    output(model, inputs)
    hotswap_adapter(model, new)
    output(model, inputs)
    with model.disable_adapter():
        assert identical(snapshot(model), base)


def test_bias_and_settings_of_every_kind_are_swapped(tmp_path):
    configs = [RocoftConfig(r=2, bias="all", selection="random", selection_seed=seed) for seed in (1, 2)]
    old, new = (save(tmp_path / str(seed), config, seed, "gpt2") for seed, config in enumerate(configs))
    model, inputs = load(old, "gpt2"), inputs_for("gpt2")
    output(model, inputs)
    hotswap_adapter(model, new)
    fresh = load(new, "gpt2")
    assert torch.equal(output(model, inputs), output(fresh, inputs))
    assert _config(model) == _config(fresh)


@pytest.mark.parametrize("method", ["row", "road_2"])
def test_a_head_is_swapped_along(method, tmp_path):
    settings = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    configs = {"row": lambda: RocoftConfig(r=2, **settings), "road_2": lambda: RoadConfig(group_size=4, **settings)}
    old, new = (save(tmp_path / str(seed), configs[method](), seed, "roberta") for seed in (1, 2))
    model, inputs = load(old, "roberta"), inputs_for("roberta")
    output(model, inputs)
    hotswap_adapter(model, new)
    fresh = load(new, "roberta")
    assert torch.equal(output(model, inputs), output(fresh, inputs))
    assert torch.equal(model.classifier.out_proj.weight, fresh.classifier.out_proj.weight)
    assert _config(model) == _config(fresh)


@pytest.mark.parametrize("mode", ["row", "column", "entry"])
def test_experts_are_swapped(mode, tmp_path):
    size = {"density": 0.05} if mode == "entry" else {"r": 2}
    old, new = (
        save(tmp_path / s, RocoftConfig(mode=mode, selection=s, **size), len(s), "mixtral") for s in ("first", "last")
    )
    model, inputs = load(old, "mixtral"), inputs_for("mixtral")
    before = output(model, inputs)
    hotswap_adapter(model, new)
    fresh = load(new, "mixtral")
    assert torch.equal(output(model, inputs), output(fresh, inputs))
    assert not torch.equal(output(model, inputs), before)
    assert _config(model) == _config(fresh)


def test_a_swapped_adapter_is_saved_as_the_new_one(pair, tmp_path):
    old, new = pair("row+column")
    model = load(old)
    output(model, inputs_for())
    hotswap_adapter(model, new)
    model.save_pretrained(str(tmp_path / "saved"))
    write_manifest(tmp_path / "saved", model)
    saved, given = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "saved", new))
    assert identical(saved, given)
    assert torch.equal(output(load(tmp_path / "saved"), inputs_for()), output(load(new), inputs_for()))


@SOME
def test_an_adapter_that_is_not_active_is_swapped(method, pair):
    old, new = pair(method)
    model, inputs = load(old), inputs_for()
    model.load_adapter(str(old), adapter_name="other")
    before = output(model, inputs)
    hotswap_adapter(model, new, "other")
    assert torch.equal(output(model, inputs), before)
    model.set_adapter("other")
    assert torch.equal(output(model, inputs), output(load(new), inputs))


@SOME
def test_a_mixed_batch_sees_the_new_adapter(method, pair):
    old, new = pair(method)
    model, names = load(old), ["default", "other", BASE]
    model.load_adapter(str(old), adapter_name="other")
    inputs = {"input_ids": inputs_for()["input_ids"][:1].repeat(3, 1)}
    first = mixed(model, inputs, names)
    assert torch.equal(first[0], first[1])
    hotswap_adapter(model, new, "other")
    swapped = mixed(model, inputs, names)
    fresh = load(old)
    fresh.load_adapter(str(new), adapter_name="other")
    assert torch.equal(swapped, mixed(fresh, inputs, names))
    assert torch.equal(swapped[[0, 2]], first[[0, 2]])
    assert not torch.equal(swapped[1], first[1])


@SOME
def test_an_adapter_that_was_loaded_in_inference_mode_is_swapped(method, pair):
    old, new = pair(method)
    inputs = inputs_for()
    with torch.inference_mode():
        model = load(old)
        output(model, inputs)
        hotswap_adapter(model, new)
    hotswap_adapter(model, old)
    hotswap_adapter(model, new)
    with torch.inference_mode():
        assert torch.equal(output(model, inputs), output(load(new), inputs))


def test_an_adapter_in_training_keeps_its_parameters_and_trains_on_from_the_new_values(pair):
    old, new = pair("row+column")
    model = load_adapter(build("llama")[0], old, is_trainable=True)
    inputs = build("llama")[1]
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(**inputs).loss.backward()
    hotswap_adapter(model, new)
    assert not model.peft_config["default"].inference_mode
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    fresh = load_adapter(build("llama")[0], new, is_trainable=True)
    expected = fresh(**inputs).loss
    expected.backward()
    assert torch.equal(loss, expected)
    assert all(
        p is q and torch.equal(p.grad, f.grad)
        for p, q, f in zip(
            (p for p in model.parameters() if p.requires_grad),
            parameters,
            (p for p in fresh.parameters() if p.requires_grad),
            strict=True,
        )
    )


@SOME
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_swap_between_a_forward_and_its_backward_is_an_error_and_not_a_wrong_gradient(method, trained, pair):
    old, new = pair(method)
    model = load_adapter(build("llama")[0], old, is_trainable=trained)
    model.get_input_embeddings().weight.requires_grad_(True)
    inputs = build("llama")[1]
    loss = model(**inputs).loss
    hotswap_adapter(model, new)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert torch.equal(output(model, inputs), output(load(new), inputs))


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["row", "row+column", "entry", "road_1", "road_2-blocks"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_is_not_compiled_again(method, network_pair, x):
    old, new = network_pair(method)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network(old), backend=counter, fullgraph=True)
    swap_gate(compiled)
    before = compiled(x)
    hotswap_adapter(compiled, new)
    with torch.compiler.set_stance("fail_on_recompile"):
        after = compiled(x)
    assert counter.frame_count == 1
    assert torch.equal(after, torch.compile(network(new), backend="aot_eager", fullgraph=True)(x))
    assert not torch.allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("inside", [True, False], ids=["base-model", "peft-model"])
@pytest.mark.usefixtures("fresh_compiler")
def test_nor_is_one_that_is_compiled_in_place(inside, network_pair, x):
    old, new = network_pair("row+column")
    model, counter = network(old), CompileCounterWithBackend("aot_eager")
    (model.get_base_model() if inside else model).compile(backend=counter, fullgraph=True)
    swap_gate(model)
    model(x)
    hotswap_adapter(model, new)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(model(x), network(new)(x))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_nor_is_a_transformer(pair):
    old, new = pair("row+column")
    inputs, counter = inputs_for(), CompileCounterWithBackend("eager")
    compiled = torch.compile(load(old), backend=counter, fullgraph=True)
    output(compiled, inputs)
    hotswap_adapter(compiled, new)
    with torch.compiler.set_stance("fail_on_recompile"):
        after = output(compiled, inputs)
    assert counter.frame_count == 1
    torch.testing.assert_close(after, output(load(new), inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_swap_between_a_compiled_forward_and_its_backward_is_an_error(network_pair, x):
    old, new = network_pair("row+column")
    compiled = torch.compile(network(old, is_trainable=True), backend="aot_eager", fullgraph=True)
    loss = compiled(x).square().mean()
    hotswap_adapter(compiled, new)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- refused ---------------------------------------------------------------------------------------------------------


def _rows(**fields):
    return RocoftConfig(**{"r": 2, "target_modules": LINEAR, **fields})


@pytest.mark.parametrize(
    ("loaded", "new", "message"),
    [
        (_rows(), CONFIGS["road_1"](0), "its method is ROAD, that of the loaded one ROCOFT"),
        (_rows(), _rows(mode="column"), "its mode is 'column', that of the loaded one 'row'"),
        (
            CONFIGS["road_1"](0),
            CONFIGS["road_2"](0),
            "its variant is 'road_2', that of the loaded one 'road_1'",
        ),
        (
            CONFIGS["road_1"](0),
            RoadConfig(variant="road_1", group_size=8, target_modules=LINEAR),
            "its group_size is 8, that of the loaded one 4",
        ),
        (
            _rows(),
            _rows(r=3),
            r"its '.*q_proj\.rocoft_row' is float32 \[3, 16\], that of the loaded one float32 \[2, 16\]",
        ),
        (
            CONFIGS["road_2-blocks"](0),
            RoadConfig(variant="road_2", group_size=4, target_modules=LINEAR, blocks="::4"),
            "its '.*road_theta' is float32 .*, that of the loaded one float32",
        ),
        (_rows(), _rows(target_modules=["q_proj"]), "it has no '.*v_proj.rocoft_row', which the loaded one has"),
        (
            _rows(target_modules=["q_proj"]),
            _rows(),
            "it has '.*rocoft_row.*', which the loaded one has not",
        ),
        (_rows(), _rows(modules_to_save=["lm_head"]), "it has 'lm_head.weight', which the loaded one has not"),
        (_rows(modules_to_save=["lm_head"]), _rows(), "it has no 'lm_head.weight', which the loaded one has"),
    ],
)
def test_an_adapter_of_another_shape_is_refused_and_the_first_difference_named(loaded, new, message, tmp_path):
    model = load(save(tmp_path / "loaded", loaded, 1))
    folder = save(tmp_path / "new", new, 2)
    before = output(model, inputs_for())
    with pytest.raises(AdapterError, match=f"cannot take the place of 'default': {message}"):
        hotswap_adapter(model, folder)
    assert torch.equal(output(model, inputs_for()), before)


def test_trained_biases_are_part_of_the_shape(tmp_path):
    model = load(save(tmp_path / "loaded", RocoftConfig(r=2), 1, "gpt2"), "gpt2")
    with pytest.raises(AdapterError, match=r"it has '.*rocoft_bias', which the loaded one has not"):
        hotswap_adapter(model, save(tmp_path / "new", RocoftConfig(r=2, bias="rocoft_only"), 2, "gpt2"))


def test_so_is_what_reselection_has_settled(pair):
    old, new = pair("row")
    model = load(old)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    free = next(i for i in range(16) if i not in layer.rocoft_row_index["default"])
    layer.set_settled("default", "row", torch.tensor([free]), torch.ones(1, 16))
    with pytest.raises(AdapterError, match=r"it has no '.*q_proj.rocoft_row_settled', which the loaded one has"):
        hotswap_adapter(model, new)


def test_an_adapter_of_another_base_is_refused_before_anything_is_touched(pair):
    old, new = pair("row")
    other = build("llama")[0]
    nn.init.normal_(other.model.layers[1].self_attn.v_proj.weight)
    write_manifest(new, get_peft_model(other, CONFIGS["row"](2)))
    model, inputs = load(old), inputs_for()
    before = output(model, inputs)
    held = snapshot(model)
    with pytest.raises(AdapterError, match=r"the first module that differs is 'model.layers.1.self_attn.v_proj'"):
        hotswap_adapter(model, new)
    assert identical(snapshot(model), held)
    assert torch.equal(output(model, inputs), before)
    hotswap_adapter(model, new, check_base=False)
    assert torch.equal(output(model, inputs), output(load_adapter(build("llama")[0], new, check_base=False), inputs))


def _damage(folder: Path, change) -> None:
    """Change the tensors in a folder, which has no manifest then that would tell."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "turnrow.json").unlink()


def test_what_loading_refuses_a_swap_refuses_too(pair):
    old, new = pair("row")
    model, inputs, diverged = load(old), inputs_for(), shutil.copytree(old, new.parent / "diverged")
    before = output(model, inputs)
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    _damage(new, lambda tensors: tensors[f"{first}.rocoft_row_index"].fill_(0)[:1].fill_(99))
    with pytest.raises(AdapterError, match=r"rocoft_row_index holds 99, out of range: allowed is 0 to 15"):
        hotswap_adapter(model, new)
    _damage(diverged, lambda tensors: tensors[f"{first}.rocoft_row"].fill_(torch.nan))
    with pytest.raises(AdapterError, match=r"rocoft_row holds 32 NaN or infinite values"):
        hotswap_adapter(model, diverged)
    (new / "adapter_model.safetensors").rename(new / "adapter_model.bin")
    with pytest.raises(AdapterError, match="is a pickle file"):
        hotswap_adapter(model, new)
    with pytest.raises(AdapterError, match="no adapter folder"):
        hotswap_adapter(model, new / "nowhere")
    assert torch.equal(output(model, inputs), before)


@SOME
def test_a_merged_adapter_is_refused(method, pair):
    old, new = pair(method)
    model = load(old)
    model.merge_adapter()
    with pytest.raises(UserError, match=r"'default' is merged into the weight of .* call unmerge_adapter\(\) first"):
        hotswap_adapter(model, new)
    model.unmerge_adapter()
    hotswap_adapter(model, new)


def test_models_and_names_that_cannot_be_meant_are_refused(pair):
    old, new = pair("row")
    model = load(old)
    with pytest.raises(UserError, match="no adapter 'defalt' is loaded; did you mean 'default'"):
        hotswap_adapter(model, new, "defalt")
    with pytest.raises(UserError, match="needs a PeftModel, .* got LlamaForCausalLM"):
        hotswap_adapter(model.get_base_model(), new)
    lora = get_peft_model(build("llama")[0], LoraConfig(target_modules=LINEAR))
    for refused in (lambda: hotswap_adapter(lora, new), lambda: swap_gate(lora)):
        with pytest.raises(
            UserError, match="those of this model are of LoraModel; for LoRA there is peft.utils.hotswap"
        ):
            refused()


def test_an_offloaded_adapter_is_refused(pair):
    old, new = pair("row")
    model = load(old)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.rocoft_row["default"] = nn.Parameter(layer.rocoft_row["default"].to("meta"), requires_grad=False)
    with pytest.raises(UserError, match=r"q_proj.rocoft_row' of adapter 'default' is sharded or offloaded"):
        hotswap_adapter(model, new)


# --- interrupted -----------------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_the_old_adapter_whole(method, error, pair, monkeypatch):
    old, new = pair(method)
    model, inputs, write = load(old), inputs_for(), hotswap._write
    before, config = output(model, inputs), _config(model)

    def half(tensors, values):
        monkeypatch.setattr(hotswap, "_write", write)
        write(tensors[: len(tensors) // 2], values[: len(tensors) // 2])
        raise error

    monkeypatch.setattr(hotswap, "_write", half)
    with pytest.raises(error):
        hotswap_adapter(model, new)
    assert torch.equal(output(model, inputs), before)
    assert _config(model) == config
    hotswap_adapter(model, new)
    assert torch.equal(output(model, inputs), output(load(new), inputs))


def test_ctrl_c_once_more_while_the_old_values_are_put_back_changes_nothing(pair, monkeypatch):
    old, new = pair("row")
    model, inputs, write, calls = load(old), inputs_for(), hotswap._write, []
    before = output(model, inputs)

    def interrupted(tensors, values):
        calls.append(len(calls))
        if len(calls) < 4:
            write(tensors[: len(calls)], values[: len(calls)])
            raise KeyboardInterrupt
        write(tensors, values)

    monkeypatch.setattr(hotswap, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hotswap_adapter(model, new)
    assert torch.equal(output(model, inputs), before)
