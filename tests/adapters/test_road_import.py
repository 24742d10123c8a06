"""Angles and scales of another program, imported, turn the outputs as that program turns them."""

from __future__ import annotations

import hashlib

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from turnrow.adapters import import_road, load_adapter, load_for_task, merge_adapter, read_adapter
from turnrow.cli.main import main
from turnrow.errors import AdapterError, UserError

LAYER = "model.layers.0.self_attn"
SQUARE = [f"{LAYER}.q_proj", f"{LAYER}.o_proj"]
UNEQUAL = [*SQUARE, "model.layers.1.mlp.up_proj"]
Q = SQUARE[0]


@pytest.fixture
def base(make_llama):
    """Modules with 16 output features, and of the MLP with 24."""
    return make_llama()


@pytest.fixture
def file(tmp_path, base):
    """`file(modules, per_feature)`: random angles and scales; `per_feature` 0.5, 1 and 2 are RoAd1, 2 and 4."""

    def file(modules=SQUARE, per_feature=0.5, *, rename=lambda name: name, names=("theta", "alpha"), name="turns"):
        torch.manual_seed(len(modules))
        tensors = {}
        for module in modules:
            size = int(per_feature * base.get_submodule(module).out_features)
            tensors[f"{rename(module)}.{names[0]}"] = torch.randn(size)
            tensors[f"{rename(module)}.{names[1]}"] = 1 + torch.randn(size) / 4
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        return path

    return file


def turned_by_hand(h, theta, alpha, pairs):
    """The paper's equation, pair by pair: z1 = a11 cos(t11) h1 - a12 sin(t12) h2, z2 = a21 sin(t21) h1 + a22 cos(t22) h2."""
    out = len(h)
    group = {"neighbours": 2, "halves": out}.get(pairs, pairs)
    half = group // 2
    z, pair = torch.empty(out), 0
    for start in range(0, out, group):
        for one in range(start, start + half):
            other = one + half
            if len(theta) == out // 2:
                places = [pair] * 4
            elif len(theta) == out:
                places = [one, one, other, other]
            else:  # of each group the cosines first: 11, 12, 21, 22
                cosine = one + start
                places = [cosine, cosine + group, cosine + group + half, cosine + half]
            t, a = ([values[place] for place in places] for values in (theta, alpha))
            z[one] = a[0] * t[0].cos() * h[one] - a[1] * t[1].sin() * h[other]
            z[other] = a[2] * t[2].sin() * h[one] + a[3] * t[3].cos() * h[other]
            pair += 1
    return z


@pytest.mark.parametrize("per_feature", [0.5, 1, 2], ids=["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("pairs", ["neighbours", "halves", 4])
def test_an_imported_adapter_turns_as_the_equation_says(pairs, per_feature, file, base, make_llama, tmp_path):
    path = file(per_feature=per_feature)
    done = import_road(path, base, tmp_path / "out", pairs=pairs, task_type="CAUSAL_LM")
    assert done.variant == {0.5: "road_1", 1: "road_2", 2: "road_4"}[per_feature]
    assert (done.group_size, done.modules) == ({"neighbours": 2, "halves": 16}.get(pairs, pairs), 2)
    tensors, x = load_file(path), torch.randn(16)
    ours = load_adapter(make_llama(), done.path)
    stock = PeftModel.from_pretrained(make_llama(), done.path)
    for name in SQUARE:
        h = base.get_submodule(name)(x)
        expected = turned_by_hand(h, tensors[f"{name}.theta"], tensors[f"{name}.alpha"], pairs)
        for model in (ours, stock):
            torch.testing.assert_close(model.get_base_model().get_submodule(name)(x), expected)


def test_the_numbers_and_where_they_are_from_are_kept(file, base, make_llama, tmp_path):
    path = file()
    import_road(path, base, tmp_path / "out", pairs="neighbours", task_type="CAUSAL_LM", base_name="org/base")
    adapter = read_adapter(tmp_path / "out")
    for key, tensor in load_file(path).items():
        module, _, kind = key.rpartition(".")
        assert torch.equal(adapter.modules[module][f"road_{kind}"], tensor)
    assert adapter.manifest["provenance"] == {
        "operation": "import",
        "file": "turns.safetensors",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "pairs": "neighbours",
        "rename": {},
    }
    assert adapter.base_name == "org/base"
    with pytest.raises(AdapterError, match="the first module that differs is"):
        load_adapter(make_llama(seed=7), tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (("road_theta", "road_alpha"), ""),
        (("road_theta", "road_alpha"), "base_model.model."),
        (("road_theta.default", "road_alpha.default"), "base_model.model."),
    ],
)
def test_names_of_peft_are_known(names, prefix, file, base, tmp_path):
    path = file(names=names, rename=lambda name: f"{prefix}{name}")
    done = import_road(path, base, tmp_path / "out", pairs=2, task_type="CAUSAL_LM")
    assert sorted(read_adapter(done.path).modules) == sorted(SQUARE)


def test_an_adapter_for_a_task_with_a_head_loads_on_the_base_s_own_head(make_bert, logits, tmp_path):
    """peft would look for a classifier in the file; the class of the base stands in the place of the task."""
    base, name = make_bert(), "bert.encoder.layer.0.output.dense"
    save_file({f"{name}.theta": torch.ones(8), f"{name}.alpha": torch.ones(8)}, tmp_path / "turns.safetensors")
    done = import_road(tmp_path / "turns.safetensors", base, tmp_path / "out", pairs=2, task_type="SEQ_CLS")
    config = read_adapter(done.path).config
    assert (config["task_type"], config["auto_mapping"]["base_model_class"]) == (None, "BertForSequenceClassification")
    loaded = load_adapter(make_bert(), done.path)
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(make_bert(), done.path)))
    assert not torch.allclose(logits(loaded), logits(base))


def test_names_are_brought_to_the_base_s_by_whole_parts(file, base, tmp_path):
    path = file(rename=lambda name: f"net.{name}".replace("self_attn.", "attn.w_").replace("layers", "blocks"))
    rename = {"net": "", "blocks": "layers", "attn.w_q_proj": "self_attn.q_proj", "attn.w_o_proj": "self_attn.o_proj"}
    import_road(path, base, tmp_path / "out", pairs=2, rename=rename)
    assert sorted(read_adapter(tmp_path / "out").modules) == sorted(SQUARE)
    for part in ("blo", "locks"):
        message = rf"rename has '{part}', which no name in .*turns\.safetensors has as a whole part"
        with pytest.raises(UserError, match=message):
            import_road(path, base, tmp_path / "other", pairs=2, rename={part: "la", **rename})
    with pytest.raises(AdapterError, match=r"has no module 'net\.model\.blocks\.0.*--rename OLD=NEW\); did you mean"):
        import_road(path, base, tmp_path / "other", pairs=2)


def test_variants_that_meet_become_road_2(file, base, make_llama, tmp_path):
    one, other = file(SQUARE[:1], 0.5, name="one"), file(SQUARE[1:], 2, name="other")
    save_file(load_file(one) | load_file(other), tmp_path / "both.safetensors")
    done = import_road(tmp_path / "both.safetensors", base, tmp_path / "both", pairs=4, task_type="CAUSAL_LM")
    assert done.variant == "road_2"
    x, mixed = torch.randn(16), load_adapter(make_llama(), done.path)
    for path, name in ((one, SQUARE[0]), (other, SQUARE[1])):
        alone = import_road(path, base, tmp_path / path.stem, pairs=4, task_type="CAUSAL_LM").path
        expected = load_adapter(make_llama(), alone).get_base_model().get_submodule(name)(x)
        torch.testing.assert_close(mixed.get_base_model().get_submodule(name)(x), expected)


def test_halves_of_several_widths_are_imported_one_by_one(file, base, make_llama, tmp_path):
    listed = f"16 features in 2 modules such as '{UNEQUAL[1]}'; 24 features in 1 modules such as '{UNEQUAL[2]}'"
    with pytest.raises(UserError, match=f"one for all: here are {listed}"):
        import_road(file(UNEQUAL), base, tmp_path / "out", pairs="halves", task_type="CAUSAL_LM")
    assert not (tmp_path / "out").exists()
    model, x = make_llama(), torch.randn(16)
    parts = [file(SQUARE, name="square"), file(UNEQUAL[2:], name="wide")]
    for path in parts:
        done = import_road(path, base, tmp_path / path.stem, pairs="halves", task_type="CAUSAL_LM")
        merge_adapter(model, done.path, tmp_path / f"merged-{path.stem}")  # the other's modules are as they were
        model = load_for_task(str(tmp_path / f"merged-{path.stem}"), "CAUSAL_LM")
    for path in parts:
        tensors = load_file(path)
        for name in {key.rpartition(".")[0] for key in tensors}:
            h = base.get_submodule(name)(x)
            expected = turned_by_hand(h, tensors[f"{name}.theta"], tensors[f"{name}.alpha"], "halves")
            torch.testing.assert_close(model.get_submodule(name)(x), expected)


def test_the_command(file, base, make_llama, tmp_path, capsys):
    base.save_pretrained(tmp_path / "base")
    path = str(file(rename=lambda name: name.replace("q_proj", "wq")))
    arguments = ["import-road", path, "--base", str(tmp_path / "base"), "--task", "CAUSAL_LM"]
    arguments += ["--rename", "wq=q_proj", "--pairs", "4", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "ROAD adapter (road_1, group_size 4) of 2 modules" in capsys.readouterr().out
    load_adapter(make_llama(), tmp_path / "out")
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    arguments[-1] = str(tmp_path / "other")
    assert main([*arguments, "--rename", "wq"]) == 2
    assert "--rename is 'wq'; it must be OLD=NEW" in capsys.readouterr().err
    assert main([*arguments, "--pairs", "neighbors"]) == 2
    assert "did you mean 'neighbours'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("neighbors", "pairs are 'neighbors'; they must be neighbours, halves, or .*did you mean 'neighbours'"),
        ("-2", "pairs are '-2'; they must be"),
        (3, "group_size is 3; it must be an even number"),
        (True, "group_size is True; it must be an even number"),
        (None, "group_size is None; it must be an even number"),
        (32, "the 16 output features of 'model.* cannot be paired in groups of 32"),
    ],
)
def test_pairs_that_are_none(pairs, message, file, base, tmp_path):
    with pytest.raises(UserError, match=message):
        import_road(file(), base, tmp_path / "out", pairs=pairs)
    assert not (tmp_path / "out").exists()


def both(name, theta, alpha=None):
    return {f"{name}.theta": theta, f"{name}.alpha": torch.ones(8) if alpha is None else alpha}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.theta": torch.ones(8)}, f"holds theta of '{Q}' alone: theta and alpha belong together"),
        (both(Q, torch.ones(8), torch.ones(16)), r"float32 \[8\] and float32 \[16\]; with its 16 .*of one size"),
        (both(Q, torch.ones(7), torch.ones(7)), r"of one size, 8 \(road_1\), 16 \(road_2\), 32 \(road_4\)"),
        (both(Q, torch.ones(8, 1), torch.ones(8, 1)), r"are float32 \[8, 1\]"),
        (both(Q, torch.ones(8).long()), r"are int64 \[8\]"),
        (both(Q, torch.full((8,), torch.nan)), f"theta of '{Q}' holds NaN"),
        ({f"{Q}.weight": torch.ones(8)}, f"the tensor '{Q}.weight' is neither <module>.theta nor"),
        ({"theta": torch.ones(8)}, "the tensor 'theta' is neither <module>.theta nor"),
        ({f"{Q}.theta": torch.ones(8), f"{Q}.road_theta": torch.ones(8)}, f"holds theta of '{Q}' twice"),
        (both(f"{Q}s", torch.ones(8)), f"has no module '{Q}s' .*; did you mean '{Q}'"),
        (both("model.norm", torch.ones(8)), "'model.norm' is a LlamaRMSNorm"),
    ],
)
def test_bad_tensors_are_named(tensors, message, base, tmp_path):
    save_file(tensors, tmp_path / "turns.safetensors")
    with pytest.raises(AdapterError, match=message):
        import_road(tmp_path / "turns.safetensors", base, tmp_path / "out", pairs=2)
    assert not (tmp_path / "out").exists()


def test_bad_files_are_named(file, base, tmp_path):
    with pytest.raises(AdapterError, match="is a folder: give a safetensors file.* needs no import"):
        import_road(tmp_path, base, tmp_path / "out", pairs=2)
    with pytest.raises(AdapterError, match="there is no file"):
        import_road(tmp_path / "nowhere.safetensors", base, tmp_path / "out", pairs=2)
    (tmp_path / "turns.pt").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"turns\.pt is no safetensors file: write .* 'turns\.safetensors'"):
        import_road(tmp_path / "turns.pt", base, tmp_path / "out", pairs=2)
    path = file()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="is truncated, damaged or no safetensors file"):
        import_road(path, base, tmp_path / "out", pairs=2)
    assert not (tmp_path / "out").exists()
