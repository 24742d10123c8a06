"""turnrow.json ties an adapter's file to its contents and to its base."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from turnrow import RoadConfig, RocoftConfig
from turnrow.adapters import read_adapter, write_manifest
from turnrow.adapters.fingerprint import fingerprint
from turnrow.adapters.manifest import recipe_sha256
from turnrow.errors import UserError

TARGETS = ["query", "value"]
CONFIGS = {
    "row": RocoftConfig(r=2, target_modules=TARGETS),
    "column": RocoftConfig(r=2, mode="column", target_modules=TARGETS, bias="all"),
    "road": RoadConfig(group_size=4, target_modules=TARGETS),
    "lora": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
}


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path, make_bert, train_a_little, logits, save):
    """A trained model, its folder with a manifest, and an untouched copy of its base; the adapter is in use."""
    model = train_a_little(make_bert(), CONFIGS[request.param])
    logits(model)
    save(model, tmp_path / "adapter", manifest=False)
    logits(model)
    write_manifest(tmp_path / "adapter", model, recipe={"seed": 3}, metrics={"accuracy": 0.5})
    return model, tmp_path / "adapter", make_bert()


def test_records_digest_versions_base_and_provenance(saved):
    _, folder, _ = saved
    manifest = json.loads((folder / "turnrow.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    assert manifest["format_version"] == 1
    assert manifest["files"] == {"adapter_model.safetensors": {"bytes": len(weights), "sha256": digest}}
    assert {"peft", "transformers", "torch"} <= manifest["versions"].keys()
    assert manifest["base"]["class"] == "BertForSequenceClassification"
    assert manifest["base"]["dtype"] == "float32"
    expected = hashlib.sha256(b'{"seed":3}').hexdigest()
    assert manifest["provenance"] == {"recipe": {"seed": 3}, "metrics": {"accuracy": 0.5}, "recipe_sha256": expected}
    assert read_adapter(folder).manifest == manifest


def test_fingerprints_the_original_base_while_the_adapter_is_in_use(saved):
    _, folder, base = saved
    adapter = read_adapter(folder)
    assert adapter.base_prints.keys() == adapter.modules.keys()
    for name, print_ in adapter.base_prints.items():
        assert print_.to_dict() == fingerprint(base.get_submodule(name), adapter.modules[name]).to_dict()


def test_leaves_the_model_as_it_was(saved, logits):
    model, folder, _ = saved
    model.requires_grad_(False)
    before = logits(model)
    write_manifest(folder, model)
    assert torch.equal(logits(model), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_label_names_are_kept_only_with_an_own_head(tmp_path, make_bert, save):
    model = make_bert()
    model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    for task_type in ("SEQ_CLS", None):
        adapted = get_peft_model(model, RocoftConfig(task_type=task_type, target_modules=TARGETS))
        base = read_adapter(save(adapted, tmp_path)).manifest["base"]
        assert base.get("head", {}).get("id2label") == ({"0": "no", "1": "yes"} if task_type else None)
        model = adapted.unload()


def test_merged_model_is_refused(saved):
    model, folder, _ = saved
    model.merge_adapter()
    with pytest.raises(UserError, match=r"has an adapter merged into it.*unmerge first"):
        write_manifest(folder, model)


def test_model_without_adapter_is_refused(saved):
    with pytest.raises(UserError, match=r"needs the PeftModel.*got BertForSequenceClassification"):
        write_manifest(saved[1], saved[2])


def test_another_model_s_folder_is_refused(saved):
    other = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert isinstance(other, PeftModel)
    with pytest.raises(UserError, match=r"adapts 'bert\..*', which this model does not"):
        write_manifest(saved[1], other)


def test_provenance_that_is_no_json_is_named(saved):
    model, folder, _ = saved
    before = (folder / "turnrow.json").read_text()
    for value in (torch.zeros(1), float("nan")):
        with pytest.raises(UserError, match=r"provenance \['score'\] cannot be written as JSON"):
            write_manifest(folder, model, score=value)
    assert (folder / "turnrow.json").read_text() == before


# --- the digest of a recipe -----------------------------------------------------------------------------------------

RECIPE = {
    "model": "org/model-1.5",
    "data": {"train": "data/train.jsonl", "validation": None, "test": "org/data"},
    "method": {"name": "rocoft", "r": 3, "indices": "indices.json"},
    "training": {"learning_rate": 0.001, "num_train_epochs": 1.0},
    "quantization": None,
    "seed": 0,
}


def changed(*path_and_value):
    *path, name, value = path_and_value
    recipe = copy.deepcopy(RECIPE)
    holder = recipe
    for part in path:
        holder = holder[part]
    holder[name] = value
    return recipe


def test_the_digest_of_a_recipe_is_that_of_its_canonical_json():
    canonical = (
        '{"data":{"test":"org/data","train":"train.jsonl"},"method":{"indices":"indices.json","name":"rocoft","r":3},'
        '"model":"org/model-1.5","seed":0,"training":{"learning_rate":0.001,"num_train_epochs":1}}'
    )
    assert recipe_sha256(RECIPE) == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    "recipe",
    [
        dict(reversed(RECIPE.items())),
        changed("training", {"num_train_epochs": 1, "learning_rate": 1e-3}),
        changed("output_dir", "runs/elsewhere"),
        changed("a_field_of_later", None),
        changed("data", "train", "/home/me/train.jsonl"),
        changed("data", "train", "../data/train.jsonl"),
        changed("data", "train", "C:\\data\\train.jsonl"),
        changed("data", "train", "train.jsonl"),
        changed("method", "indices", "runs/chosen/indices.json"),
        {key: value for key, value in RECIPE.items() if value is not None},
    ],
)
def test_where_files_lie_and_how_the_recipe_was_written_change_nothing(recipe):
    assert recipe_sha256(recipe) == recipe_sha256(RECIPE)


@pytest.mark.parametrize(
    "recipe",
    [
        changed("seed", 1),
        changed("model", "other/model-1.5"),
        changed("data", "test", "other/data"),
        changed("data", "train", "data/test.jsonl"),
        changed("data", "validation", "data/train.jsonl"),
        changed("method", "indices", None),
        changed("method", "indices", [0, 1]),
        changed("method", "bias", False),
        changed("training", "learning_rate", 0.002),
    ],
)
def test_what_decides_a_run_changes_the_digest(recipe):
    assert recipe_sha256(recipe) != recipe_sha256(RECIPE)


def test_folders_of_a_model_and_ids_that_are_none():
    digests = {
        recipe_sha256(changed("model", place))
        for place in ("/models/llama", "models/x/llama", "~/x/llama", "./llama/", "llama")
    }
    assert len(digests) == 1
    assert len({recipe_sha256(changed("model", place)) for place in ("models/llama", "llama", "package:llama")}) == 3
    for place in ("/", "..", ""):
        recipe_sha256(changed("model", place))


KEYS = st.text(max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def reordered(value):
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(inner) for inner in value] if isinstance(value, list) else value


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_json_has_one_digest_in_any_order_and_after_a_round_trip(recipe):
    digest = recipe_sha256(recipe)
    assert recipe_sha256(reordered(recipe)) == digest
    assert recipe_sha256(json.loads(json.dumps(recipe, indent=3))) == digest


def test_a_recipe_that_is_no_mapping_has_no_digest(saved):
    model, folder, _ = saved
    write_manifest(folder, model, recipe="by hand")
    assert json.loads((folder / "turnrow.json").read_text())["provenance"] == {"recipe": "by hand"}
    with pytest.raises(UserError, match=r"provenance \['recipe'\] cannot be written as JSON"):
        write_manifest(folder, model, recipe={"model": torch.zeros(1)})


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, make_bert, train_a_little, save):
    return save(train_a_little(make_bert(), CONFIGS["row"]), tmp_path)


def test_truncated_weights_are_told_by_size(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(
        UserError, match=r"adapter_model\.safetensors is truncated: it has [\d,]+ bytes, turnrow\.json rec"
    ):
        read_adapter(folder)


def test_a_single_altered_bit_is_told_by_digest(folder):
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"adapter_model\.safetensors was altered: its SHA-256 is .*delete turnrow\.json"
    ):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": 0}, "format_version is 0"),
        ({"versions": None}, "'versions' is missing or no object"),
        ({"files": {}}, r"no size and sha256 of adapter_model\.safetensors"),
        ({"base": {}}, r"'base\.modules' is missing"),
        ({"base": {"modules": {"a": 1}}}, "the fingerprint of 'a' is damaged"),
    ],
)
def test_damaged_manifest_is_named(folder, change, message):
    path = folder / "turnrow.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_adapter(folder)


def test_index_beyond_the_recorded_weight_is_named(tmp_path, make_bert, save):
    save(get_peft_model(make_bert(), RocoftConfig(r=1, target_modules=["query"])), tmp_path)
    manifest = read_adapter(tmp_path).manifest
    for entry in manifest["base"]["modules"].values():
        entry |= {"shape": [16, 15], "sample": None}
    (tmp_path / "turnrow.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"rocoft_row is float32 \[1, 16\], the weight is 16 x 15"):
        read_adapter(tmp_path)
