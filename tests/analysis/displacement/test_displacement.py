"""Displacement of hidden states: peft adapters of any method, fine-tuned models, padding on either side, any batching."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from turnrow import RoadConfig, RocoftConfig
from turnrow.analysis.displacement import (
    KINDS,
    angular_change,
    displacement,
    draw_displacement,
    draw_tokens,
    kinds_of,
    magnitude_change,
    token_displacement,
)
from turnrow.errors import UserError

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
CLS, SEP = 1, 2


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=20, max_position_embeddings=12, **SIZES), add_pooling_layer=False)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[CLS, 7, 8, 9, SEP], [CLS, 5, SEP, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def tuned(model: nn.Module, size: float = 0.05) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return other


def test_kinds_of_tokens_on_either_side_of_the_padding() -> None:
    ids = torch.tensor([[CLS, 7, 8, SEP, 0], [0, 0, CLS, 5, SEP]])
    kinds = kinds_of(ids > 0, ids, [CLS, SEP, 0])
    shown = {kind: [[i for i in range(5) if row[i]] for row in chosen] for kind, chosen in kinds.items()}
    assert shown == {
        "all": [[0, 1, 2, 3], [2, 3, 4]],
        "first": [[0], [2]],
        "special": [[0, 3], [2, 4]],
        "content": [[1, 2], [3]],
        "last": [[3], [4]],
    }


def test_figures_are_those_of_a_plain_loop_over_the_tokens(model, batch) -> None:
    after = tuned(model).eval()
    found = displacement(after, [batch], model, special_ids=[CLS, SEP])
    assert list(found.layers) == ["embeddings", "layer 1", "layer 2"]
    assert found.texts == 2
    assert found.undefined == 0
    with torch.no_grad():
        states = [m(**batch, output_hidden_states=True).hidden_states for m in (after, model.eval())]
    tokens = {"first": [(0, 0), (1, 0)], "content": [(0, 1), (0, 2), (0, 3), (1, 1)], "last": [(0, 4), (1, 2)]}
    for number, kinds in enumerate(found.layers.values()):
        for kind, places in tokens.items():
            x, x0 = (torch.stack([own[number][place] for place in places]) for own in states)
            assert kinds[kind].magnitude.mean == pytest.approx(magnitude_change(x, x0).mean().item(), rel=1e-5)
            assert kinds[kind].cosine == pytest.approx(angular_change(x, x0).mean().item(), rel=1e-5)
            assert kinds[kind].turn.count == len(places)


def test_padding_and_batching_change_nothing(model, batch) -> None:
    after = tuned(model)
    rows = [{name: value[i : i + 1, : 5 - 2 * i] for name, value in batch.items()} for i in range(2)]
    one, other = displacement(after, [batch], model), displacement(after, rows, model)
    for layer, kinds in one.layers.items():
        for kind, moved in kinds.items():
            again = other.layers[layer][kind]
            assert moved.turn.count == again.turn.count
            assert moved.turn.mean == pytest.approx(again.turn.mean, rel=1e-4)
            assert moved.magnitude.std == pytest.approx(again.magnitude.std, rel=1e-3)


CONFIGS = {
    "rocoft": RocoftConfig(r=2),
    "road": RoadConfig(variant="road_1", group_size=2, target_modules=["query", "dense"]),
    "lora": LoraConfig(r=2, target_modules=["query"]),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_peft_model_is_compared_with_itself_without_the_adapter(model, batch, method) -> None:
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, CONFIGS[method])
    adapted.train()
    still = displacement(adapted, [batch])
    assert max(kinds["all"].turn.greatest for kinds in still.layers.values()) < 1e-9
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    found, explicit = displacement(adapted, [batch]), displacement(adapted, [batch], base)
    assert found.layers["embeddings"]["all"].turn.greatest < 1e-12
    assert found.layers["layer 2"]["all"].turn.mean > 1e-5
    for layer, kinds in found.layers.items():
        assert kinds["all"].turn.mean == pytest.approx(explicit.layers[layer]["all"].turn.mean, rel=1e-3, abs=1e-12)
    assert all(module.training for module in adapted.modules())


def test_each_token_is_what_the_summary_is_of(model, batch) -> None:
    after = tuned(model)
    tokens, whole = token_displacement(after, batch, model), displacement(after, [batch], model)
    assert tokens.turn.shape == tokens.magnitude.shape == (3, 2, 5)
    assert tokens.turn[:, 1, 3:].isnan().all()
    for number, layer in enumerate(tokens.layers):
        real = tokens.turn[number][batch["attention_mask"].bool()]
        assert real.mean().item() == pytest.approx(whole.layers[layer]["all"].turn.mean, rel=1e-9)


def test_encoder_and_decoder_are_told_apart() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, pad_token_id=0, **sizes))
    batch = {"input_ids": torch.tensor([[3, 4, 1]]), "decoder_input_ids": torch.tensor([[0, 5]])}
    found = displacement(tuned(t5), [batch], t5, special_ids=[0, 1])
    assert list(found.layers) == [
        "encoder embeddings", "encoder layer 1", "decoder embeddings", "decoder layer 1",
    ]  # fmt: skip
    assert found.layers["decoder layer 1"]["special"].turn.count == 1
    assert token_displacement(tuned(t5), batch, t5).layers == ["encoder embeddings", "encoder layer 1"]


def test_patches_of_an_image_have_a_first_and_a_last() -> None:
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(image_size=4, patch_size=2, **SIZES), add_pooling_layer=False)
    found = displacement(tuned(vit), [{"pixel_values": torch.randn(2, 3, 4, 4)}], vit, special_ids=[1])
    assert found.layers["layer 1"]["all"].turn.count == 10
    assert found.layers["layer 1"]["first"].turn.count == 2
    assert "special" not in found.layers["layer 1"]


def test_states_without_a_direction_are_counted_and_left_out(model, batch) -> None:
    after = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in after.encoder.layer[1].output.LayerNorm.parameters():
            parameter.zero_()
    found = displacement(after, [batch], model)
    assert found.undefined == 8
    assert found.layers["layer 2"] == {}
    assert found.layers["layer 1"]["all"].turn.count == 8


def test_what_cannot_be_compared_is_refused(model, batch) -> None:
    with pytest.raises(UserError, match="BertModel has no adapter that could be switched off: give the base model"):
        displacement(model, [batch])
    with pytest.raises(UserError, match="no texts to compare the models on"):
        displacement(model, [], model)
    shallow = BertModel(BertConfig(vocab_size=20, **{**SIZES, "num_hidden_layers": 1}))
    with pytest.raises(UserError, match="adapted model has 3 hidden_states, the base 2 hidden_states"):
        displacement(model, [batch], shallow)
    narrow = BertModel(BertConfig(vocab_size=20, **{**SIZES, "hidden_size": 8}))
    with pytest.raises(UserError, match=r"states of embeddings are \[2, 5, 16\] in the adapted model and \[2, 5, 8\]"):
        displacement(model, [batch], narrow)
    with pytest.raises(UserError, match="returns no hidden states"):
        displacement(_Silent(), [batch], _Silent())


def test_one_token_without_a_direction_takes_no_other_with_it() -> None:
    x0 = torch.tensor([[[1.0, 0], [0, 0], [0, 2]]])
    found = displacement(_Says(x0.flip(-1)), [{"input_ids": torch.tensor([[5, 6, 7]])}], _Says(x0))
    assert found.undefined == 1
    moved = found.layers["embeddings"]["all"]
    assert (moved.turn.count, moved.turn.mean, moved.magnitude.mean) == (2, 1, 0)


class _Says(nn.Module):
    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, **inputs: object) -> dict:
        return {"hidden_states": (self.states,)}


class _Silent(nn.Module):
    def forward(self, **inputs: object) -> dict:
        return {}


def test_pictures_are_drawn(model, batch, tmp_path) -> None:
    after = tuned(model)
    found, tokens = displacement(after, [batch], model), token_displacement(after, batch, model)
    assert draw_displacement(found, tmp_path / "layers.png").startswith(b"\x89PNG")
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    assert b"<svg" in draw_tokens(tokens.turn[:, 0], tokens.layers, list("abcde"), kind="svg")
    with pytest.raises(UserError, match=r"\(3, 5\) numbers for 3 layers and 1 tokens"):
        draw_tokens(tokens.turn[:, 0], tokens.layers, ["a"])


def test_every_kind_is_json(model, batch) -> None:
    told = displacement(tuned(model), [batch], model, special_ids=[CLS, SEP]).to_dict()
    assert list(told["layers"]["layer 1"]) == list(KINDS)
    assert math.isfinite(told["layers"]["layer 1"]["last"]["turn"]["quantiles"][0.5])
