"""Every method that a recipe can name: what was trained is what is saved, loaded and evaluated; those that cannot be are refused."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.training import evaluate_adapter, train
from turnrow.training.methods import check_method, method_names

from .conftest import MakeRecipe

LINEAR = {"target_modules": "all-linear"}
SOME = {"target_modules": ["query", "value"]}
VIRTUAL = {"num_virtual_tokens": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "rocoft": {"r": 2},
    "road": {"group_size": 4, **LINEAR},
    "full": {},
    "head": {},
    "bitfit": {},
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 4, **LINEAR},
    "boft": {"boft_block_size": 4, **LINEAR},
    "c3a": {"block_size": 4, **LINEAR},
    "cartridge": VIRTUAL,
    "fourierft": {"n_frequency": 10, **LINEAR},
    "frod": SOME,
    "ia3": {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]},
    "ln_tuning": {"target_modules": ["LayerNorm"]},
    "miss": {"r": 2, **LINEAR},
    "oft": {"oft_block_size": 4, **LINEAR},
    "p_tuning": VIRTUAL,
    "prefix_tuning": VIRTUAL,
    "prompt_tuning": VIRTUAL,
    "psoft": {"r": 4, **LINEAR},
    "pvera": {"r": 4, **SOME},
    "randlora": {"r": 2, **SOME},
    "shira": {"r": 1, "random_seed": 0, **LINEAR},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2, **LINEAR},
    "vera": {"r": 4, **SOME},
    "waveft": {"n_frequency": 10, **LINEAR},
}
"""Of the methods that want more, or less, than which modules to adapt."""

OF_DECODERS: dict[str, dict[str, Any]] = {
    "shadow": {"target_modules": r".*\.layers\.\d+$"},
    "trainable_tokens": {"token_indices": list(range(60, 90))},
}
"""Of those that need a decoder's layers, or save no new head."""

OLD_PEFT = Version(version("peft")) < Version("0.21")


# Of AdaLoRA, once no rank is left in a module; and peft looks for its modules under the names of their tensors.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
# What single methods of peft say of themselves.
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(set(method_names()) - set(OF_DECODERS)))
def test_evaluate_reproduces_the_run(name: str, make_recipe: MakeRecipe, films: Path) -> None:
    if OLD_PEFT and name in ("boft", "miss", "shira", "vera") and find_spec("torchao"):
        pytest.skip("peft 0.20 asks torchao for a class that is gone from it")
    method = {"name": name, **OPTIONS.get(name, LINEAR)}
    task = {"name": "regression", "text": ["sentence"], "label": "stars"}  # its figures move with every weight
    result = train(make_recipe(task=task, method=method, training={"max_steps": 3, "learning_rate": 0.1}))
    assert result.metrics["after"] != result.metrics["before"]
    assert evaluate_adapter(result.adapter, str(films / "test.jsonl"), quiet=True) == result.metrics["after"]


@pytest.fixture
def decoder(tmp_path: Path, tiny_decoder_tokenizer: PreTrainedTokenizerFast) -> str:
    config = LlamaConfig(
        vocab_size=len(tiny_decoder_tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "decoder")
    tiny_decoder_tokenizer.save_pretrained(tmp_path / "decoder")
    return str(tmp_path / "decoder")


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(
    "name", sorted({*OF_DECODERS, "prompt_tuning", "p_tuning", "prefix_tuning", "cartridge"} & {*method_names()})
)
def test_evaluate_reproduces_the_run_of_a_decoder(
    name: str, decoder: str, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the {word} film was sad " * 4}) + "\n" for word in ("good", "bad")))
    result = train(
        make_recipe(
            model=decoder,
            task={"name": "language_modelling"},
            data=dict.fromkeys(("train", "test"), str(rows)),
            method={"name": name, **(OF_DECODERS | OPTIONS)[name]},
            training={"max_steps": 2, "eval_strategy": "no"},
            max_length=16,
        )
    )
    assert evaluate_adapter(result.adapter, str(rows), quiet=True) == result.metrics["after"]
    assert result.metrics["after"]["perplexity"] < result.metrics["before"]["perplexity"]


@pytest.mark.parametrize("name", ["adaption_prompt", "cpt", "multitask_prompt_tuning", "poly", "xlora"])
def test_methods_that_a_recipe_cannot_train_are_refused_with_the_reason(name: str) -> None:
    assert name not in method_names()
    with pytest.raises(UserError, match=f"method {name} cannot be trained by a recipe: [a-z ]+.*; choose another"):
        check_method({"name": name})


@pytest.mark.skipif("shadow" not in method_names(), reason="peft 0.20 has no such method")
def test_a_method_that_does_not_fit_the_model_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match="method shadow: Unable to automatically find"):
        train(make_recipe(method={"name": "shadow"}))


def test_a_method_that_could_not_save_a_new_head_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match="method trainable_tokens: .* saves no whole module, and 'classifier' is new"):
        train(make_recipe(method={"name": "trainable_tokens", "token_indices": [5]}))
