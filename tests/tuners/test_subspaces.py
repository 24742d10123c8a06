"""An adapter that owns a part of every layer: it trains that part and nothing else, alone or beside others."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.tuners.models import build, output, perturb
from turnrow import RoadConfig, RocoftConfig, count_parameters, select
from turnrow.adapters import compose, inspect_adapter, load_adapter
from turnrow.errors import AdapterError, UserError
from turnrow.ops import pairs
from turnrow.ops.subspace import subspace
from turnrow.tuners import reselect

VARIANTS = ("road_1", "road_2", "road_4")


def _road(**fields) -> RoadConfig:
    return RoadConfig(**{"group_size": 4, "target_modules": ["q_proj", "up_proj"]} | fields)


def _train(model, inputs, steps=3):
    # a decay that would show wherever it reached
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_touches_the_own_pairs_alone(variant, tmp_path):
    base, inputs = build("llama")
    model = get_peft_model(base, _road(variant=variant, blocks=":50%"))
    whole = get_peft_model(build("llama")[0], _road(variant=variant))
    assert 2 * count_parameters(model).trainable == count_parameters(whole).trainable
    tensors = _saved(_train(model, inputs), tmp_path)
    assert {key: t.shape for key, t in tensors.items()} == {
        k: t.shape for k, t in _saved(whole, tmp_path / "whole").items()
    }
    for key, values in tensors.items():
        layer = base.get_submodule(key.removeprefix("base_model.model.").rpartition(".")[0])
        places = pairs.places(variant, 4, subspace(":50%", layer.out_features // 2, where="", what=""))
        rest = 0 if key.endswith("theta") else 1
        outside = values.index_fill(0, places, rest)
        assert torch.equal(outside, torch.full_like(values, rest)), key
        assert (values[places] != rest).any(), key


def test_the_outputs_of_other_pairs_stay():
    base, _ = build("llama")
    layer = base.model.layers[0].self_attn.q_proj
    h = layer(torch.randn(5, 16, generator=torch.Generator().manual_seed(0))).detach()
    model = get_peft_model(base, _road(blocks="1::2", group_size=2))
    perturb(model)
    z = (
        model.base_model.model.model.layers[0]
        .self_attn.q_proj(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
        .detach()
    )
    own = torch.arange(16).view(-1, 2)[1::2].flatten()
    others = torch.arange(16).view(-1, 2)[::2].flatten()
    torch.testing.assert_close(z[:, others], h[:, others], rtol=1e-6, atol=1e-7)
    assert (z[:, own] != h[:, own]).all()


@pytest.mark.parametrize(
    "blocks", ["1::2", [0, 3], {"q_proj": ":50%"}, {"layers.1.self_attn.q_proj": "::3", "up_proj": "50%:"}]
)
def test_a_saved_adapter_comes_back_and_peft_alone_reads_it(blocks, tmp_path):
    base, inputs = build("llama")
    model = _train(get_peft_model(base, _road(variant="road_2", blocks=blocks)), inputs)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    for loaded in (
        PeftModel.from_pretrained(build("llama")[0], tmp_path),
        PeftModel.from_pretrained(build("llama")[0], tmp_path, low_cpu_mem_usage=True),
        load_adapter(build("llama")[0], tmp_path),
    ):
        assert torch.equal(output(loaded.eval(), inputs), expected)
    more = PeftModel.from_pretrained(build("llama")[0], tmp_path, is_trainable=True)
    assert count_parameters(more).trainable == count_parameters(model).trainable
    assert inspect_adapter(tmp_path).parameters == count_parameters(model).trainable
    # a library that knows neither blocks nor train
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.pop("blocks") == blocks
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(output(PeftModel.from_pretrained(build("llama")[0], tmp_path).eval(), inputs), expected)


def test_a_config_says_only_what_is_set(tmp_path):
    _road().save_pretrained(tmp_path)
    assert not {"blocks", "train"} & json.loads((tmp_path / "adapter_config.json").read_text()).keys()


def test_two_tasks_are_trained_at_once_each_on_its_half():
    base, inputs = build("llama")
    model = get_peft_model(base, _road(blocks=":50%"), adapter_name="first")
    model.add_adapter("second", _road(blocks="50%:"))
    model.base_model.set_adapter(["first", "second"])
    alone = get_peft_model(build("llama")[0], _road(blocks=":50%"), adapter_name="first")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    of_one = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.5)
    one = {name: value[:1] for name, value in inputs.items()}
    for _ in range(2):
        model(**inputs, adapter_names=["first", "second"]).loss.backward()
        alone(**one).loss.backward()
        optimizer.step(), optimizer.zero_grad()
        # the loss of a batch is the mean over the tokens of both samples
        for parameter in alone.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
        of_one.step(), of_one.zero_grad()
    trained = {name: p for name, p in model.named_parameters() if ".first" in name}
    for name, parameter in alone.named_parameters():
        if ".first" in name:
            torch.testing.assert_close(trained[name], parameter, rtol=1e-4, atol=1e-6)
    # both together are one rotation of all pairs: their order does not matter
    together = output(model.eval(), inputs)
    model.base_model.set_adapter(["second", "first"])
    torch.testing.assert_close(output(model, inputs), together)


@pytest.mark.parametrize(("train", "stays", "rest"), [(["angle"], "road_alpha", 1), ("scale", "road_theta", 0)])
def test_angles_or_scales_alone_are_learned(train, stays, rest, tmp_path):
    base, inputs = build("llama")
    model = get_peft_model(base, _road(variant="road_2", train=train))
    assert all(stays not in name for name, p in model.named_parameters() if p.requires_grad)
    model.add_adapter("other", _road(blocks="::2", train=train))
    for change in (
        lambda: model.set_adapter("other"),
        lambda: model.set_adapter("default"),
        lambda: model.set_requires_grad("default"),
        lambda: (model.base_model.disable_adapter_layers(), model.base_model.enable_adapter_layers()),
    ):
        change()
        assert all(stays not in name for name, p in model.named_parameters() if p.requires_grad)
    tensors = _saved(_train(model, inputs), tmp_path)
    for key, values in tensors.items():
        changed = (values != rest if stays in key else values != 1 - rest).any()
        assert changed == (stays not in key), key
    assert inspect_adapter(tmp_path).parameters == sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad
    )
    more = PeftModel.from_pretrained(build("llama")[0], tmp_path, is_trainable=True)
    assert all(stays not in name for name, p in more.named_parameters() if p.requires_grad)


def test_angles_alone_keep_the_length_of_every_pair():
    base, inputs = build("llama")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    h = base.model.layers[0].self_attn.q_proj(x).detach()
    model = _train(get_peft_model(base, _road(group_size=2, train="angle")), inputs)
    z = model.base_model.model.model.layers[0].self_attn.q_proj(x).detach()
    assert not torch.allclose(z, h, atol=1e-3)
    torch.testing.assert_close(z.view(5, -1, 2).norm(dim=2), h.view(5, -1, 2).norm(dim=2))


def test_a_file_that_turns_other_pairs_is_refused(tmp_path):
    model = get_peft_model(build("llama")[0], _road(blocks=":50%"))
    tensors = _saved(model, tmp_path)
    key = next(key for key in tensors if key.endswith("road_alpha"))
    tensors[key][-1] = 1.5
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"road_alpha\[11\] is 1.5, of a pair outside of the configuration's blocks"):
        load_adapter(build("llama")[0], tmp_path)
    with pytest.raises(AdapterError, match="turns or scales pairs outside of the blocks"):
        PeftModel.from_pretrained(build("llama")[0], tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"blocks": "half"}, "blocks is 'half'; it must be a slice"),
        ({"blocks": {"q_proj": 3}}, r"blocks\['q_proj'\] is 3"),
        (
            {"blocks": [8]},
            "blocks of module 'model.layers.0.self_attn.q_proj' contains 8, which is out of range: there are 8 pairs",
        ),
        (
            {"blocks": {"q_projj": "::2"}},
            "blocks: no target module is called 'q_projj'; did you mean 'q_proj'",
        ),
        ({"train": []}, r"train is \[\]"),
        ({"group_size": "4"}, "group_size is '4'; it must be an even whole number"),
        ({"group_size": 4.0}, "group_size is 4.0; it must be an even whole number"),
        ({"train": ["angels"]}, "train contains 'angels'; it must be 'angle' or 'scale'; did you mean 'angle'"),
    ],
)
def test_bad_input_is_named(fields, says):
    base, inputs = build("llama")
    before = output(base, inputs)
    with pytest.raises(UserError, match=says):
        get_peft_model(base, _road(**fields))
    assert torch.equal(output(base, inputs), before)


def test_a_config_of_pefts_own_is_taken():
    base, inputs = build("llama")
    model = get_peft_model(base, peft.RoadConfig(group_size=4, target_modules=["q_proj"]))
    assert not torch.equal(output(_train(model, inputs), inputs), output(build("llama")[0], inputs))


# --- RoCoFT -----------------------------------------------------------------------------------------------------------


def _chosen(model, part="row"):
    return {name: buffer.tolist() for name, buffer in model.named_buffers() if f"rocoft_{part}_index" in name}


@pytest.mark.parametrize(
    "selection", ["first", "last", "uniform", "random", "gradient", "fisher", "wanda_max", "wanda_mixed"]
)
@pytest.mark.parametrize("mode", ["row", "column", "row+column"])
def test_what_is_chosen_lies_within(selection, mode):
    base, inputs = build("llama")
    config = RocoftConfig(r=3, mode=mode, selection=selection, within="1::2", target_modules=["q_proj", "up_proj"])
    model = get_peft_model(base, config)
    select(model, [inputs])
    for part in mode.split("+"):
        assert _chosen(model, part)
        assert all(len(chosen) == 3 and all(i % 2 for i in chosen) for chosen in _chosen(model, part).values())


def test_of_all_that_lie_within_the_best_are_chosen():
    base, inputs = build("llama")
    fields = {"selection": "gradient", "target_modules": ["q_proj"]}
    every = get_peft_model(base, RocoftConfig(r=16, **fields))
    assert all(chosen == list(range(16)) for chosen in _chosen(every).values())
    halves = []
    for within in (":50%", "50%:"):
        model = get_peft_model(build("llama")[0], RocoftConfig(r=2, within=within, **fields))
        select(model, [inputs])
        halves.append(_chosen(model))
    best = get_peft_model(build("llama")[0], RocoftConfig(r=2, **fields))
    select(best, [inputs])
    for name, chosen in _chosen(best).items():
        assert set(chosen) <= {*halves[0][name], *halves[1][name]}
        assert max(halves[0][name]) < 8 <= min(halves[1][name])


def test_modules_may_have_parts_of_their_own_and_given_indices_are_used():
    base, _ = build("llama")
    config = RocoftConfig(
        r=2,
        selection="last",
        within={"q_proj": ":50%", "layers.1.self_attn.q_proj": "::5", "v_proj": [1, 4]},
        indices={"layers.0.self_attn.v_proj": [0]},
        target_modules=["q_proj", "v_proj", "k_proj"],
    )
    chosen = {
        name.split("layers.")[1].split(".rocoft")[0]: v for name, v in _chosen(get_peft_model(base, config)).items()
    }
    assert chosen == {
        "0.self_attn.q_proj": [6, 7],
        "1.self_attn.q_proj": [10, 15],
        "0.self_attn.v_proj": [0],
        "1.self_attn.v_proj": [1, 4],
        "0.self_attn.k_proj": [6, 7],
        "1.self_attn.k_proj": [6, 7],
    }


@pytest.mark.parametrize("strategy", ["cycle", "gradient"])
def test_reselection_stays_within(strategy):
    base, inputs = build("llama")
    model = get_peft_model(base, RocoftConfig(r=2, within="1::3", target_modules=["q_proj"]))
    seen = set()
    for _ in range(5):
        perturb(model)
        reselect(model, [inputs], strategy=strategy)
        seen |= {i for chosen in _chosen(model).values() for i in chosen}
    assert {i % 3 for i in seen} == {1}
    if strategy == "cycle":
        assert seen == set(range(1, 16, 3))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"within": "a half"}, "within is 'a half'; it must be a slice"),
        (
            {"within": "14:"},
            r"3 rows are to be chosen in module .*q_proj', which has 16, 2 of them within the part that is allowed",
        ),
        ({"within": "16:"}, "within, for module .* is '16:', which holds none of the 16 rows"),
        ({"within": "14:", "mode": "column", "selection": "gradient"}, "3 columns are to be chosen"),
    ],
)
def test_too_small_a_part_is_named(fields, says):
    with pytest.raises(UserError, match=says):
        get_peft_model(build("llama")[0], RocoftConfig(r=3, target_modules=["q_proj"], **fields))


def test_what_is_composed_of_two_parts_owns_both(tmp_path):
    """On disk and at once: neither half's part is that of the whole."""
    base, inputs = build("llama")
    model = get_peft_model(base, _road(blocks=":50%"), adapter_name="first")
    model.add_adapter("second", _road(blocks="50%:", train="angle"))
    perturb(model)
    model.base_model.set_adapter(["first", "second"])
    together = output(model, inputs)
    model.save_pretrained(tmp_path)
    composition = compose([tmp_path / "first", tmp_path / "second"], tmp_path / "both", check_base=False)
    assert not {"blocks", "train"} & json.loads((composition.path / "adapter_config.json").read_text()).keys()
    loaded = load_adapter(build("llama")[0], composition.path)
    torch.testing.assert_close(output(loaded.eval(), inputs), together)


def test_a_file_whose_blocks_name_another_module_is_refused(tmp_path):
    get_peft_model(build("llama")[0], _road(blocks={"q_proj": ":50%"})).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["blocks"]["k_proj"] = ":50%"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="blocks name 'k_proj', of which the file has no tensors"):
        load_adapter(build("llama")[0], tmp_path)
