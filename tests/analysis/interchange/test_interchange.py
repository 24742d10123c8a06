"""Interchange on models by hooks: sites, positions, several sources, and the composition of two adapters as one of them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from turnrow import RoadConfig
from turnrow.analysis.interchange import (
    Dense,
    Identity,
    Interchange,
    Intervention,
    Orthogonal,
    Part,
    Site,
    read_states,
)
from turnrow.analysis.interchange.sites import places
from turnrow.errors import UserError

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 20,
    "max_position_embeddings": 12,
    "initializer_range": 0.3,
}


def batch(*rows: list[int]) -> dict[str, torch.Tensor]:
    """Padded on the right with 0."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, held in zip(ids, rows, strict=True):
        row[: len(held)] = torch.tensor(held)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


BASE, SOURCE = batch([1, 5, 6, 2], [1, 7, 2]), batch([1, 8, 9, 2], [1, 10, 2])


@pytest.fixture
def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=3, pad_token_id=0, **SIZES)).eval()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, pad_token_id=0, **SIZES)).eval()


def whole(site: Site, size: int = 16) -> Intervention:
    return Intervention(site, Identity(size))


SITES = {
    "layer": Site(0),
    "last layer": Site(-1),
    "name": Site("bert.encoder.layer.1"),
    "input": Site("bert.encoder.layer.1", "input"),
    "submodule": Site("bert.encoder.layer.1.output"),
    "embeddings": Site("bert.embeddings"),
    "pooled": Site("bert.pooler"),
}


@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_all_of_a_site_makes_the_model_say_what_it_says_of_the_source(bert, site) -> None:
    exchanged = Interchange(bert, [whole(SITES[site])])(BASE, SOURCE).logits
    torch.testing.assert_close(exchanged, bert(**SOURCE).logits)
    assert not torch.allclose(exchanged, bert(**BASE).logits, atol=1e-3)


@torch.no_grad()
def test_nothing_stays_on_the_model(bert) -> None:
    before = bert(**BASE).logits
    Interchange(bert, [whole(Site(0))])(BASE, SOURCE)
    assert torch.equal(bert(**BASE).logits, before)
    with pytest.raises(UserError, match="no token 5"):
        Interchange(bert, [whole(Site(0, positions=5))])(BASE, SOURCE)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bert.modules())


@torch.no_grad()
def test_positions_of_the_embeddings_are_as_other_words(bert) -> None:
    """Exchanging the embedding of a token is exchanging the word, in the middle, at the end, and text by text."""
    mixed = {
        1: batch([1, 8, 6, 2], [1, 10, 2]),
        -2: batch([1, 5, 9, 2], [1, 10, 2]),
        "all": SOURCE,
        (0, 1): batch([1, 8, 6, 2], [1, 10, 2]),
        ((1, 2), (-1,)): batch([1, 8, 9, 2], [1, 7, 2]),
    }
    for positions, same in mixed.items():
        found = Interchange(bert, [whole(Site("bert.embeddings", positions=positions))])(BASE, SOURCE).logits
        torch.testing.assert_close(found, bert(**same).logits)
    by_batch = Site("bert.embeddings", positions=lambda inputs: (inputs["attention_mask"].sum(1) - 2)[:, None])
    torch.testing.assert_close(Interchange(bert, [whole(by_batch)])(BASE, SOURCE).logits, bert(**mixed[-2]).logits)


@torch.no_grad()
def test_the_source_may_be_read_at_other_tokens(bert) -> None:
    """Word 2 of the source in the place of word 1 of the base; positions are added in the embeddings, so the words themselves."""
    site = Site("bert.embeddings.word_embeddings", positions=[[1], []])
    intervention = Intervention(site, Identity(16), (Part(positions=[[2], []]),))
    found = Interchange(bert, [intervention])(BASE, SOURCE).logits
    torch.testing.assert_close(found, bert(**batch([1, 9, 6, 2], [1, 7, 2])).logits)


def test_golden_positions_are_counted_without_padding() -> None:
    left = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    shown = {
        name: [one.tolist() for one in places(positions, left, (2, 5), "attention_mask")]
        for name, positions in {"first": 0, "last": -1, "two": [0, -1], "each": [[1], [2, 3]]}.items()
    }
    assert shown == {
        "first": [[0, 1], [2, 0]],
        "last": [[0, 1], [4, 4]],
        "two": [[0, 0, 1, 1], [2, 4, 0, 4]],
        "each": [[0, 1, 1], [3, 2, 3]],
    }


@pytest.mark.parametrize(
    "r", [Identity(16), Orthogonal(16), Dense(torch.eye(16) + 0.3)], ids=lambda r: type(r).__name__
)
@torch.no_grad()
def test_rows_are_what_a_head_makes_of_mixed_states(llama, r) -> None:
    """At the last norm: the head of the language model is all that is left to compute."""
    site = Site("model.norm", positions=-1)
    b, s = (read_states(llama, [site], inputs)[0] for inputs in (BASE, SOURCE))
    found = Interchange(llama, [Intervention(site, r, (Part(rows="::3"),))])(BASE, SOURCE).logits
    at = torch.tensor([3, 2])
    text = torch.arange(2)
    matrix = r.into(torch.eye(16)).T
    some = torch.zeros(16).index_fill(0, torch.arange(0, 16, 3), 1).diag()
    mixed = b.clone()
    mixed[text, at] += (torch.linalg.inv(matrix) @ some @ matrix @ (s - b)[text, at].T).T
    torch.testing.assert_close(found, llama.lm_head(mixed), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_several_sources_and_sites(bert) -> None:
    third = batch([1, 11, 12, 2], [1, 13, 2])
    halves = Intervention(Site("bert.embeddings"), Identity(16), (Part(0, ":50%"), Part(1, "50%:")))
    torch.testing.assert_close(Interchange(bert, [halves])(BASE, SOURCE, SOURCE).logits, bert(**SOURCE).logits)
    mixed = Interchange(bert, [halves])(BASE, SOURCE, third).logits
    torch.testing.assert_close(Interchange(bert, [halves])(SOURCE, SOURCE, third).logits, mixed)
    words = [
        Intervention(Site("bert.embeddings", positions=1), Identity(16)),
        Intervention(Site("bert.embeddings", positions=[[2], []]), Identity(16), (Part(1),)),
    ]
    found = Interchange(bert, words)(BASE, SOURCE, third).logits
    torch.testing.assert_close(found, bert(**batch([1, 8, 12, 2], [1, 10, 2])).logits)


@torch.no_grad()
def test_two_adapters_composed_at_one_layer_are_an_interchange_of_two_halves() -> None:
    """The composition experiment of RoAd's paper: each adapter turns its half of the pairs of one layer's output; together they are the
    base whose halves come from the model with the one and with the other adapter. See benchmarks/composability.py."""
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(num_labels=3, pad_token_id=0, **SIZES)).eval()
    name = "bert.encoder.layer.0.output.dense"

    def config(part: str) -> RoadConfig:
        return RoadConfig(variant="road_1", group_size=4, target_modules=f".*{name}", blocks=part)

    model = get_peft_model(bert, config(":50%"), adapter_name="one")
    model.add_adapter("two", config("50%:"))
    for key, parameter in model.named_parameters():
        if "road_theta" in key:
            parameter.copy_(torch.randn_like(parameter))
        elif "road_alpha" in key:
            parameter.copy_(1 + 0.3 * torch.rand_like(parameter))
    model.eval()
    model.base_model.set_adapter(["one", "two"])
    composed = model(**BASE).logits
    site = Site(f"base_model.model.{name}")
    halves = Intervention(site, Identity(16), (Part(0, ":50%"), Part(1, "50%:")))
    interchange = Interchange(model, [halves])
    states = []
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        assert not torch.allclose(model(**BASE).logits, composed, atol=1e-3)
        states.append(interchange.states_of(BASE))
    with model.disable_adapter():
        torch.testing.assert_close(interchange(BASE, *states).logits, composed)
        assert not torch.allclose(model(**BASE).logits, composed, atol=1e-3)


def test_gradients_reach_the_map_and_not_the_model(bert) -> None:
    r = Orthogonal(16)
    bert.requires_grad_(False)
    interchange = Interchange(bert, [Intervention(Site(0), r, (Part(rows=[0, 1]),))])
    assert list(interchange.maps) == [r]
    interchange(BASE, SOURCE).logits.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in r.parameters())


@torch.no_grad()
def test_a_layer_that_runs_several_times_is_asked_for_its_call() -> None:
    torch.manual_seed(0)
    model = AlbertForSequenceClassification(
        AlbertConfig(embedding_size=8, num_labels=2, pad_token_id=0, **SIZES)
    ).eval()
    name = "albert.encoder.albert_layer_groups.0"
    with pytest.raises(UserError, match=r"ran 2 times in one forward pass: say which with Site\(..., call=0\)"):
        Interchange(model, [whole(Site(name))])(BASE, SOURCE)
    first, second = read_states(model, [Site(name, call=0), Site(name, call=1)], BASE)
    states = model(**BASE, output_hidden_states=True).hidden_states
    assert torch.equal(first, states[1])
    assert torch.equal(second, states[2])
    found = Interchange(model, [whole(Site(name, call=1))])(BASE, SOURCE).logits
    torch.testing.assert_close(found, model(**SOURCE).logits)
    with pytest.raises(UserError, match="ran 2 times, so call 2 was not reached"):
        Interchange(model, [whole(Site(name, call=2))])(BASE, SOURCE)


@torch.no_grad()
def test_layers_of_an_encoder_with_a_decoder_are_named() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    t5 = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, pad_token_id=0, **sizes)).eval()
    base, source = ({**held, "decoder_input_ids": torch.tensor([[0, 3], [0, 4]])} for held in (BASE, SOURCE))
    with pytest.raises(UserError, match="layer 0 is one of 2 stacks of layers .*: name the module instead"):
        Interchange(t5, [whole(Site(0))])(base, source)
    found = Interchange(t5, [whole(Site("encoder.block.0"))])(base, source).logits
    torch.testing.assert_close(found, t5(**source).logits)
    last = Site("decoder.block.0", positions=-1, mask="decoder_attention_mask")
    found = Interchange(t5, [whole(last)])(base, source).logits
    torch.testing.assert_close(found[:, 1], t5(**source).logits[:, 1])
    torch.testing.assert_close(found[:, 0], t5(**base).logits[:, 0])


def test_what_does_not_fit_is_refused(bert) -> None:
    site = Site(0)
    with pytest.raises(UserError, match="nothing to exchange"):
        Interchange(bert, [])
    with pytest.raises(UserError, match="part 1 and one before it both exchange row 0"):
        Interchange(bert, [Intervention(site, Identity(16), (Part(0), Part(1)))])
    with pytest.raises(UserError, match="there are 2 sources; the interventions take 1"):
        Interchange(bert, [whole(site)])(BASE, SOURCE, SOURCE)
    with pytest.raises(
        UserError, match="no module 'bert.encoder.layers.0' in a BertFor.*; did you mean 'bert.encoder.layer.0'"
    ):
        Interchange(bert, [whole(Site("bert.encoder.layers.0"))])(BASE, SOURCE)
    with pytest.raises(UserError, match="no layer 2: the model has 2"):
        Interchange(bert, [whole(Site(2))])(BASE, SOURCE)
    with pytest.raises(UserError, match="the states have 16 features, the map is one of 8"):
        Interchange(bert, [whole(site, 8)])(BASE, SOURCE)
    with pytest.raises(UserError, match=r"the base gives \[4, 3\] tokens of its texts at 0, source 0 \[4, 4\]"):
        Interchange(bert, [whole(site)])(BASE, batch([1, 8, 9, 2], [1, 9, 10, 2]))
    with pytest.raises(UserError, match="positions for 3 texts, but 2 texts"):
        Interchange(bert, [whole(Site(0, positions=[[0], [0], [0]]))])(BASE, SOURCE)
    with pytest.raises(UserError, match="where is 'outptu'; it must be 'input' or 'output'; did you mean 'output'"):
        Site(0, "outptu")
    with pytest.raises(UserError, match="positions are 'last'; they must be 'all'"):
        Site(0, positions="last")
    with pytest.raises(UserError, match="'loose.1' ran 0 times"):
        Interchange(_Loose(), [whole(Site("loose.1"))])({"x": torch.ones(1, 16)}, {"x": torch.ones(1, 16)})


class _Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loose = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loose[0](x)
