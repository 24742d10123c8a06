"""Adapters combined: what the result does is what the sum, or the product, of the dense changes does."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, RoadConfig
from safetensors.torch import load_file

from turnrow import RocoftConfig
from turnrow.adapters import export_lora, load_adapter, read_adapter
from turnrow.adapters.algebra import compose, interpolate, scale, subtract
from turnrow.errors import UserError

ATTENTION = ["query", "key", "value"]


def rocoft(mode="row", **settings):
    entries = {"density": 0.2, "selection": "random"} if mode == "entry" else {}
    return RocoftConfig(mode=mode, task_type="SEQ_CLS", **entries, **settings)


def road(variant="road_1", group_size=4, **settings):
    return RoadConfig(variant=variant, group_size=group_size, task_type="SEQ_CLS", **settings)


@pytest.fixture
def make(make_bert, save, tmp_path):
    """`make(config)`: train an adapter on the tiny BERT a little and save it; `seed` makes others of the same shape."""

    def make(config, name, seed=0, base_seed=1, manifest=True):
        config = copy.deepcopy(config)
        config.modules_to_save = []  # the classifier is left alone, unless the test is about it
        from peft import get_peft_model

        model = get_peft_model(make_bert(seed=base_seed), config).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "classifier" not in key:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.base_model.model.classifier.requires_grad_(False)
        return save(model, tmp_path / name, manifest=manifest)

    return make


@pytest.fixture
def merged(make_bert):
    """`merged(*folders)`: weights of the base with the adapters merged into it, one after the other."""

    def merged(*folders, check_base=True):
        model = make_bert()
        for folder in folders:
            model = load_adapter(model, folder, check_base=check_base and folder is folders[0]).merge_and_unload()
        return {name: value.clone() for name, value in model.state_dict().items()}

    return merged


PAIRS = {
    "rows and other rows": (rocoft(indices=[0, 3]), rocoft(indices=[5, 1, 2])),
    "rows that meet": (rocoft(indices=[0, 3]), rocoft(indices=[3, 1, 0])),
    "rows and columns": (rocoft(indices=[3, 0]), rocoft("column", indices=[2, 7, 1])),
    "columns that meet": (rocoft("column", indices=[4, 2]), rocoft("column", indices=[2, 7])),
    "both and rows": (rocoft("row+column", indices={"row": [3, 1], "column": [0, 5]}), rocoft(indices=[2, 1])),
    "both and both": (
        rocoft("row+column", indices={"row": [3, 1], "column": [0, 5]}),
        rocoft("row+column", indices={"row": [5, 1], "column": [5, 3, 2]}),
    ),
    "some modules": (rocoft(target_modules=ATTENTION, indices=[4]), rocoft("column", target_modules=["dense"])),
    "entries": (rocoft("entry"), rocoft("entry", selection_seed=1)),
    "entries and rows": (rocoft("entry"), rocoft(indices=[3, 0])),
    "entries and columns": (rocoft("entry", target_modules=ATTENTION), rocoft("column", indices=[3, 0])),
    "entries and both": (rocoft("entry"), rocoft("row+column", indices={"row": [3, 1], "column": [0, 5]})),
    "biases": (rocoft(indices=[0, 3], bias="rocoft_only"), rocoft(indices=[3], bias="all", target_modules=ATTENTION)),
    "biases of one": (rocoft(indices=[0, 3], bias="rocoft_only"), rocoft("column", indices=[3])),
    "turns": (road(), road()),
    "general blocks": (road("road_2"), road("road_4")),
    "turns and general blocks": (road(target_modules=ATTENTION), road("road_4")),
}
ALL_PAIRS = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


@ALL_PAIRS
def test_composed_is_one_after_the_other(pair, make, merged, tmp_path, make_bert, logits):
    first, second = make(pair[0], "first"), make(pair[1], "second", seed=1)
    composition = compose([first, second], tmp_path / "both")
    assert composition.modules == len(read_adapter(composition.path).modules)
    expected, found = merged(first, second, check_base=False), merged(composition.path)
    base = make_bert().state_dict()
    changed = [name for name in base if not torch.equal(base[name], expected[name])]
    assert changed
    for name in base:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    adapted = load_adapter(make_bert(), composition.path)
    plain = make_bert()
    plain.load_state_dict(expected)
    torch.testing.assert_close(logits(adapted), logits(plain), rtol=1e-4, atol=1e-5)


@ALL_PAIRS
def test_subtracting_one_of_two_leaves_the_other(pair, make, merged, tmp_path):
    first, second = make(pair[0], "first"), make(pair[1], "second", seed=1)
    both = compose([first, second], tmp_path / "both").path
    left = subtract(both, first, tmp_path / "left").path
    expected, found = merged(first, left, check_base=False), merged(both)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@ALL_PAIRS
def test_between_two_adapters_lie_both(pair, make, merged, tmp_path):
    first, second = make(pair[0], "first"), make(pair[1], "second", seed=1)
    for t, folder in ((0, first), (1, second)):
        found = merged(interpolate(first, second, t, tmp_path / f"at-{t}").path)
        for name, expected in merged(folder).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [rocoft(), rocoft("column"), rocoft("row+column"), rocoft("entry"), road(), road("road_2"), road("road_4")],
)
def test_scaled_by_minus_one_undoes(config, make, merged, tmp_path, make_bert):
    folder = make(config, "adapter")
    undone = merged(folder, scale(folder, -1, tmp_path / "inverse").path, check_base=False)
    for name, value in make_bert().state_dict().items():
        torch.testing.assert_close(undone[name], value, rtol=1e-5, atol=1e-6)
    same, once = merged(scale(folder, 1, tmp_path / "same").path), merged(folder)
    nothing = merged(scale(folder, 0, tmp_path / "nothing").path)
    for name, value in make_bert().state_dict().items():
        torch.testing.assert_close(same[name], once[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(nothing[name], value, rtol=0, atol=0)


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_disjoint_rows_keep_their_numbers_in_any_order(make, tmp_path):
    first, second = make(rocoft(indices=[4, 0]), "first"), make(rocoft(indices=[5, 1]), "second", seed=1)
    one, other = (compose(pair, tmp_path / pair[0].name / "both") for pair in ([first, second], [second, first]))
    assert one.overlaps == other.overlaps == {}
    found, reordered = tensors_of(one.path), tensors_of(other.path)
    assert found.keys() == reordered.keys()
    assert all(torch.equal(found[key], reordered[key]) for key in found)
    key = "base_model.model.bert.encoder.layer.1.output.dense.rocoft_row"
    mine, others = tensors_of(first)[key], tensors_of(second)[key]
    assert found[f"{key}_index"].tolist() == [0, 1, 4, 5]
    assert torch.equal(found[key], torch.stack([mine[1], others[1], mine[0], others[0]]))


def test_what_more_than_one_changes_is_listed(make, tmp_path):
    target = {"target_modules": ["query"]}
    first = make(rocoft("row+column", indices={"row": [3, 1], "column": [0, 5]}, **target), "first")
    second = make(rocoft("row+column", indices={"row": [5, 1], "column": [5, 3]}, **target), "second")
    overlaps = compose([first, second], tmp_path / "both").overlaps
    assert set(overlaps) == {f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)}
    found = next(iter(overlaps.values()))
    assert (found.row, found.column, found.entries) == ([1], [5], 0)
    assert (
        found.crossings == 2
    )  # row 3 of the first with column 3 of the second, row 5 of the second with column 0 of the first
    third = make(rocoft("entry", **target), "third")
    assert next(iter(compose([first, third], tmp_path / "mixed").overlaps.values())).entries > 0


@pytest.mark.parametrize(
    ("combination", "expected"),
    [
        ({}, [5.0, -2.0, 4.0, 0.5]),
        ({"weights": [2, -1]}, [1.0, -7.0, 8.0, -0.5]),
        ({"combination": "mean"}, [2.5, -1.0, 2.0, 0.25]),
        ({"combination": "mean", "weights": [3, 1]}, [2.25, -2.0, 3.0, 0.125]),
        ({"combination": "magnitude_prune", "density": 0.5}, [3.0, -2.0, 4.0, 0.0]),
        ({"combination": "ties", "density": 1.0}, [2.5, -3.0, 4.0, 0.5]),
    ],
)
def test_rows_that_meet_are_combined_as_asked(combination, expected, write, golden_rows, tmp_path):
    config, _ = golden_rows
    config = config | {"r": 1, "rank_pattern": {}, "target_modules": ["second"]}
    folders = [
        write(
            config,
            {
                "base_model.model.second.rocoft_row": torch.tensor([row]),
                "base_model.model.second.rocoft_row_index": torch.tensor([1]),
            },
            name,
        )
        for name, row in (("a", [2.0, -3.0, 4.0, 0.0]), ("b", [3.0, 1.0, 0.0, 0.5]))
    ]
    found = tensors_of(compose(folders, tmp_path / "both", **combination).path)
    assert found["base_model.model.second.rocoft_row"].tolist() == [expected]
    assert found["base_model.model.second.rocoft_row"].dtype == torch.float32


def test_dare_draws_by_its_seed_and_keeps_the_expectation(make, tmp_path):
    first, second = make(rocoft(indices=[0, 3]), "first"), make(rocoft(indices=[3, 4]), "second", seed=1)
    key = "base_model.model.bert.encoder.layer.1.output.dense.rocoft_row"
    torch.manual_seed(9)
    state = torch.get_rng_state()
    found = [
        tensors_of(compose([first, second], tmp_path / f"{n}", combination="dare_linear", density=0.5, seed=seed).path)[
            key
        ]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    alone = tensors_of(first)[key][0]
    kept = found[0][0] != 0
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(found[0][0][kept], 2 * alone[kept])


def test_turns_commute_and_other_blocks_do_not(make, tmp_path):
    first, second = make(road(), "first"), make(road(), "second", seed=1)
    found = [tensors_of(compose(p, tmp_path / p[0].name / "both").path) for p in ([first, second], [second, first])]
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])
    mine, others = tensors_of(first), tensors_of(second)
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.road_"
    torch.testing.assert_close(found[0][f"{key}theta"], mine[f"{key}theta"] + others[f"{key}theta"])
    torch.testing.assert_close(found[0][f"{key}alpha"], mine[f"{key}alpha"] * others[f"{key}alpha"])
    assert read_adapter(tmp_path / "first" / "both").config["variant"] == "road_1"
    first, second = make(road("road_4"), "third"), make(road("road_4"), "fourth", seed=1)
    found = [tensors_of(compose(p, tmp_path / p[0].name / "both").path) for p in ([first, second], [second, first])]
    assert not torch.allclose(found[0][f"{key}theta"], found[1][f"{key}theta"], atol=1e-3)


def test_half_of_a_turn_done_twice_is_the_turn(make, merged, tmp_path):
    folder = make(road(), "adapter")
    half = scale(folder, 0.5, tmp_path / "half").path
    twice = compose([half, half], tmp_path / "twice").path
    found = merged(twice)
    for name, value in merged(folder).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_scale_below_zero_is_a_half_turn(write, golden_road, tmp_path):
    config, tensors = golden_road
    tensors["base_model.model.first.road_alpha"] = torch.tensor([1.0, -4.0])
    half = tensors_of(scale(write(config, tensors), 0.5, tmp_path / "half").path)
    torch.testing.assert_close(half["base_model.model.first.road_theta"], torch.tensor([0.15, (0.4 + torch.pi) / 2]))
    torch.testing.assert_close(half["base_model.model.first.road_alpha"], torch.tensor([1.0, 2.0]))


def test_the_result_knows_its_base_and_its_sources(make, make_bert, tmp_path):
    first, second = make(rocoft(indices=[0]), "first"), make(rocoft(indices=[3]), "second", seed=1)
    both = compose([first, second], tmp_path / "both", weights=[1, 0.5]).path
    provenance = read_adapter(both).manifest["provenance"]
    assert (provenance["operation"], provenance["weights"]) == ("compose", [1.0, 0.5])
    assert [source["adapter"] for source in provenance["sources"]] == ["first", "second"]
    assert (
        provenance["sources"][1]["sha256"]
        == read_adapter(second).manifest["files"]["adapter_model.safetensors"]["sha256"]
    )
    load_adapter(make_bert(), both)
    with pytest.raises(
        UserError, match=r"the first module that differs is 'bert\.encoder\.layer\.0\.attention\.self\.query'"
    ):
        load_adapter(make_bert(seed=5), both)
    # half of the sample is from the rows of the first adapter, where it shows that it has been merged
    with pytest.raises(UserError, match="the first module that differs"):
        load_adapter(load_adapter(make_bert(), first).merge_and_unload(), both)
    nested = compose([both, first], tmp_path / "nested").path
    load_adapter(make_bert(), nested)


def test_a_composed_adapter_is_exported_and_trained_on(make, make_bert, merged, tmp_path):
    first, second = (
        make(rocoft(indices=[0, 3]), "first"),
        make(rocoft("column", target_modules=ATTENTION), "second", seed=1),
    )
    both = compose([first, second], tmp_path / "both").path
    lora = export_lora(both, tmp_path / "lora")
    found = merged(lora)
    for name, value in merged(both).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    trained = load_adapter(make_bert(), both, is_trainable=True)
    loss = trained(input_ids=torch.arange(1, 9).reshape(2, 4), labels=torch.tensor([0, 1])).loss
    loss.backward()
    gradients = [p.grad for name, p in trained.named_parameters() if "rocoft" in name and p.requires_grad]
    assert gradients
    assert all(gradient is not None for gradient in gradients)


def test_experts_with_rows_of_their_own_are_composed(tmp_path, save):
    from peft import get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    def base():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return MixtralForCausalLM(
            MixtralConfig(vocab_size=40, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, **sizes)
        ).eval()

    def make(name, mode, indices, seed):
        config = RocoftConfig(
            mode=mode,
            indices={"experts.down_proj": indices},
            target_modules=["q_proj"],
            task_type="CAUSAL_LM",
            target_parameters=["experts.down_proj"],
        )
        model = get_peft_model(base(), config).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        return save(model, tmp_path / name)

    rows = make("rows", "row", [[0, 1], [2, 3], [4, 5]], 1)
    others = make("others", "row", [[1, 0], [2, 7], [8, 9]], 2)
    both = make("both", "row+column", {"row": [[1, 0], [2, 7], [8, 9]], "column": [[0], [5], [0]]}, 3)
    for n, pair in enumerate(([rows, others], [rows, both], [both, rows])):
        composed = compose(pair, tmp_path / f"composed{n}")
        assert any("experts.down_proj[1]" in name for name in composed.overlaps)
        expected = base()
        for folder in pair:
            expected = load_adapter(expected, folder, check_base=False).merge_and_unload()
        found = load_adapter(base(), composed.path).merge_and_unload().state_dict()
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


# --- modules trained whole -------------------------------------------------------------------------------------------


@pytest.fixture
def with_heads(make_bert, train_a_little, save, tmp_path):
    """Two adapters with classifiers of their own."""
    folders = []
    for name, rows in (("first", [0]), ("second", [3])):
        model = train_a_little(make_bert(), RocoftConfig(indices=rows, task_type="SEQ_CLS", target_modules=ATTENTION))
        if name == "second":
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "classifier" in key:
                        parameter.add_(1)
        folders.append(save(model, tmp_path / name))
        (tmp_path / name / "task.json").write_text(name)
    return folders


def test_classifiers_that_differ_have_to_be_chosen_from(with_heads, make_bert, tmp_path):
    first, second = with_heads
    with pytest.raises(UserError, match="say whose the result shall have"):
        compose(with_heads, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    key = "base_model.model.classifier.weight"
    of = {
        "first": compose(with_heads, tmp_path / "a", saved_modules_of=first),
        "second": compose(with_heads, tmp_path / "b", saved_modules_of=str(second)),
        "none": compose(with_heads, tmp_path / "c", saved_modules_of=False),
        "mean": compose(with_heads, tmp_path / "d", combination="mean"),
        "quarter": interpolate(first, second, 0.25, tmp_path / "e"),
        "difference": subtract(second, first, tmp_path / "f"),
        "equal": compose([first, first], tmp_path / "g"),
    }
    heads = {name: tensors_of(composition.path).get(key) for name, composition in of.items()}
    assert (of["second"].path / "task.json").read_text() == "second"  # whose head it is, his are the labels
    assert (of["mean"].path / "task.json").read_text() == "first"
    mine, others = (tensors_of(folder)[key] for folder in with_heads)
    assert torch.equal(heads["first"], mine)
    assert torch.equal(heads["second"], others)
    assert heads["none"] is None
    assert of["none"].saved_modules == []
    torch.testing.assert_close(heads["mean"], (mine + others) / 2)
    torch.testing.assert_close(heads["quarter"], 0.75 * mine + 0.25 * others)
    assert torch.equal(heads["difference"], others)
    assert torch.equal(heads["equal"], mine)
    assert of["first"].saved_modules == ["classifier.bias", "classifier.weight"]
    assert read_adapter(of["first"].path).config["modules_to_save"] == read_adapter(first).config["modules_to_save"]
    load_adapter(make_bert(), of["none"].path)  # on the head that the base has
    assert compose([of["none"].path, first], tmp_path / "h").saved_modules == of["first"].saved_modules
    with pytest.raises(UserError, match=r"saved_modules_of is 'elsewhere'; it must be one of .*first"):
        compose(with_heads, tmp_path / "both", saved_modules_of="elsewhere")


# --- what cannot be combined -----------------------------------------------------------------------------------------


def test_two_bases_are_refused_and_named(make, tmp_path):
    first, second = make(rocoft(), "first"), make(rocoft(), "second", base_seed=2)
    with pytest.raises(UserError, match=r"different bases; the first module that differs is 'bert\.encoder\.layer\.0"):
        compose([first, second], tmp_path / "both")
    compose([first, second], tmp_path / "both", check_base=False, saved_modules_of=False)


def test_pairings_that_differ_are_refused(make, tmp_path):
    first, second = make(road(group_size=4), "first"), make(road(group_size=2), "second")
    with pytest.raises(UserError, match=r"'bert\.encoder\.layer\.0\.\S+' is rotated in pairs of group_size 2 and 4"):
        compose([first, second], tmp_path / "both")


def test_entries_without_sizes_are_refused(make, tmp_path):
    first, second = (make(rocoft("entry"), name, manifest=False) for name in ("first", "second"))
    with pytest.raises(UserError, match=r"the size of the weight of .* is not known"):
        compose([first, second], tmp_path / "both")
    third = make(rocoft("column"), "third", manifest=False)
    with pytest.raises(UserError, match="how many columns the weight has is not known"):
        compose([first, third], tmp_path / "both")


def test_other_methods_are_refused(make, make_bert, train_a_little, save, tmp_path):
    rows, turns = make(rocoft(), "rows"), make(road(), "turns")
    with pytest.raises(UserError, match="one adds to the weights, the other turns the outputs"):
        compose([rows, turns], tmp_path / "both")
    lora = save(train_a_little(make_bert(), LoraConfig(task_type="SEQ_CLS")), tmp_path / "lora", manifest=False)
    with pytest.raises(UserError, match="is a LORA adapter"):
        compose([rows, lora], tmp_path / "both")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1]}, r"weights are \[1\], 1 for 2 adapters"),
        ({"weights": [1, float("nan")]}, "each must be a finite number"),
        ({"weights": ["1", 2]}, "each must be a finite number"),
        ({"combination": "tie"}, r"combination is 'tie'; it must be one of .*did you mean 'ties'"),
        ({"combination": "ties"}, "density is None; ties keeps a share"),
        ({"combination": "ties", "density": 0}, "density is 0; ties keeps a share"),
        ({"density": 0.5}, "density is 0.5, but linear keeps all values"),
        ({"combination": "mean", "weights": [1, -1]}, "their sum must not be zero"),
        ({"weights": [1e40, 1e40]}, "the result overflows"),
    ],
)
def test_bad_arguments(arguments, message, make, tmp_path):
    folder = make(rocoft(), "adapter")
    with pytest.raises(UserError, match=message):
        compose([folder, folder], tmp_path / "both", **arguments)
    assert not (tmp_path / "both").exists()


def test_further_bad_arguments(make, write, golden_road, tmp_path):
    folder = make(road(), "adapter")
    with pytest.raises(UserError, match="compose takes two or more adapters"):
        compose([folder], tmp_path / "both")
    with pytest.raises(UserError, match="RoAd adapters are multiplied"):
        compose([folder, folder], tmp_path / "both", combination="ties", density=0.5)
    with pytest.raises(UserError, match="factor is inf"):
        scale(folder, float("inf"), tmp_path / "both")
    with pytest.raises(UserError, match="t is '0.5'"):
        interpolate(folder, folder, "0.5", tmp_path / "both")
    config, tensors = golden_road
    tensors["base_model.model.first.road_alpha"] = torch.tensor([1.0, 0.0])
    singular = write(config, tensors, "singular")
    with pytest.raises(UserError, match="the rotation of module 'first' cannot be undone: a scale is 0"):
        scale(singular, -1, tmp_path / "both")
    with pytest.raises(UserError, match="is not empty"):
        scale(folder, 1, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "ROAD"


def test_adapters_for_two_tasks_are_refused(make, tmp_path):
    first, second = make(rocoft(), "first"), make(rocoft(), "second")
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(UserError, match="is for the task type SEQ_CLS, .* for CAUSAL_LM: they share no model"):
        compose([first, second], tmp_path / "both")
