"""Explanations: their order, their sums, JSON, pictures and the page; and the tokens turned most."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import pytest
import torch

from turnrow.analysis.displacement import Displacement, Moved, RunningNumbers, TokenDisplacement
from turnrow.analysis.explain import (
    Explanation,
    TokenRanking,
    draw_parts,
    draw_spectra,
    draw_turning,
    draw_weights,
    measure,
    write_report,
)
from turnrow.analysis.explain.explanation import place_of
from turnrow.errors import UserError
from turnrow.ops import pairs


def weights(kind: str) -> list:
    torch.manual_seed(0)
    found = []
    for layer in range(3):
        for role in ("query", "<dense>"):
            name = f"encoder.layer.{layer}.{role}"
            weight, delta = torch.randn(4, 6), 0.1 * (layer + 1) * torch.randn(4, 6)
            parts = {"row": torch.tensor([0, 2])} if kind == "rocoft" else None
            blocks = pairs.coefficients("road_1", 2, 0.1 * torch.randn(2), torch.ones(2)) if kind == "road" else None
            found.append(measure(name, delta, weight, shape=(4, 6), parts=parts, blocks=blocks))
    found.append(measure("pooler", torch.ones(4, 6), torch.randn(4, 6), shape=(4, 6)))
    found.append(measure("encoder.layer.0.query.bias", torch.ones(4) * 100, torch.ones(4), shape=(4,)))
    return found


def displaced() -> Displacement:
    numbers = RunningNumbers()
    numbers.add(torch.tensor([0.1, 0.2, 0.4]))
    moved = Moved(numbers.summary(), numbers.summary())
    return Displacement({name: {"all": moved, "content": moved} for name in ("embeddings", "layer 1")}, 2, 0)


def ranking() -> TokenRanking:
    found = TokenRanking(lambda token: f"<{token}>")
    nan = float("nan")
    turn = torch.tensor([[[0.0, 0, 0], [0, 0, nan]], [[0.1, 0.5, 0.2], [0.3, 0.1, nan]]], dtype=torch.float64)
    batch = {"input_ids": torch.tensor([[1, 7, 8], [1, 8, 0]])}
    found.add(batch, TokenDisplacement(["embeddings", "layer 1"], 2 * turn, turn))
    return found


def explanation(kind: str) -> Explanation:
    found = ranking()
    return Explanation.of(
        {"adapter": "a & b"},
        weights(kind),
        whole=["classifier.weight"],
        displacement=displaced(),
        tokens=found.most(),
        texts=found.texts,
    )


def test_golden_tokens_turned_most() -> None:
    found = ranking()
    shown = [(one.token, one.count, one.turn, one.greatest, one.magnitude) for one in found.most()]
    assert shown == [
        ("<7>", 1, 0.5, 0.5, 1.0),
        ("<1>", 2, pytest.approx(0.2), 0.3, pytest.approx(0.4)),
        ("<8>", 2, pytest.approx(0.15), 0.2, pytest.approx(0.3)),
    ]
    assert len(found.most(2)) == 2
    assert [text.tokens for text in found.texts] == [["<1>", "<7>", "<8>"], ["<1>", "<8>"]]
    assert found.texts[1].turn == [[0, 0], [0.3, 0.1]]


def test_matrices_that_moved_furthest_come_first() -> None:
    found = explanation("road")
    relative = [weight.relative for weight in found.weights]
    assert found.weights[-1].name.endswith("bias")
    assert relative[:-1] == sorted(relative[:-1], reverse=True)


def test_all_changes_together_are_as_those_of_one_long_vector() -> None:
    found = Explanation.of({}, [measure("a", torch.tensor([[3.0]]), torch.tensor([[6.0]])), measure("b", torch.tensor([[4.0]]), torch.tensor([[8.0]]))])  # fmt: skip
    assert found.norm == pytest.approx(5)
    assert found.relative == pytest.approx(0.5)
    unknown = Explanation.of({}, [measure("a", torch.ones(1, 1))])
    assert (unknown.norm, unknown.relative, unknown.turning) == (1, None, None)
    blocks = pairs.coefficients("road_1", 2, torch.tensor([0.5]), torch.ones(1))
    turned = Explanation.of({}, [measure("a", None, blocks=blocks), measure("b", None, blocks=blocks)])
    assert turned.norm is None
    assert turned.turning.count == 2


def test_layers_are_as_one_long_vector_each() -> None:
    three, four, six, eight = (torch.tensor([[value]]) for value in (3.0, 4.0, 6.0, 8.0))
    weights = [
        measure("decoder.block.10.q", three, six),
        measure("decoder.block.2.q", three, six),
        measure("decoder.block.2.v", four, eight),
        measure("encoder.block.2.q", three),
        measure("pooler", four, eight),
    ]
    layers = Explanation.of({}, weights).layers
    assert list(layers) == ["decoder.block.2", "decoder.block.10", "encoder.block.2"]
    assert layers["decoder.block.2"] == pytest.approx((5, 0.5))
    assert layers["encoder.block.2"] == (3, None)


def test_golden_places() -> None:
    assert place_of("bert.encoder.layer.10.attention.self.query") == (10, "bert.encoder.layer.*.attention.self.query")
    assert place_of("encoder.block.1.layer.0.SelfAttention.q") == (1, "encoder.block.*.layer.0.SelfAttention.q")
    assert place_of("layers.3.experts.down_proj[2]") == (3, "layers.*.experts.down_proj[2]")
    assert place_of("bert.pooler.dense") == (None, "bert.pooler.dense")


@pytest.mark.parametrize("kind", ["rocoft", "road"])
def test_json_holds_everything_and_nothing_else(kind) -> None:
    told = json.loads(json.dumps(explanation(kind).to_dict(), allow_nan=False))
    assert told["facts"] == {"adapter": "a & b"}
    assert len(told["weights"]) == 8
    assert told["displacement"]["layers"]["layer 1"]["content"]["turn"]["count"] == 3
    assert told["tokens"][0]["token"] == "<7>"
    assert list(told["layers"]) == ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]
    assert "angles" not in json.dumps(told)
    if kind == "road":
        assert told["turning"]["count"] == 12
        assert told["weights"][1]["turning"]["angle"]["0.5"] > 0
    else:
        assert told["turning"] is None
        assert len(told["weights"][1]["parts"]["row"]["norms"]) == 2


PICTURES = {"weights": draw_weights, "spectra": draw_spectra, "turning": draw_turning, "parts": draw_parts}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_whole_files(name, tmp_path) -> None:
    found = explanation("rocoft" if name == "parts" else "road")
    assert PICTURES[name](found, tmp_path / "picture.png").startswith(b"\x89PNG")
    assert ElementTree.fromstring(PICTURES[name](found, kind="svg")).tag.endswith("svg")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_without_layers_or_without_the_base_there_is_a_picture_too() -> None:
    blocks = pairs.coefficients("road_1", 2, torch.tensor([0.5]), torch.ones(1))
    for weight in (measure("lonely", torch.ones(2, 2), shape=(2, 2)), measure("layer.0.q", None, blocks=blocks)):
        assert draw_weights(Explanation.of({}, [weight])).startswith(b"\x89PNG")


def test_what_is_not_there_is_not_drawn() -> None:
    nothing = Explanation.of({}, [])
    for draw in PICTURES.values():
        with pytest.raises(UserError, match="nothing to draw|no singular values|no angles|there are none to draw"):
            draw(nothing)


@pytest.mark.parametrize(("kind", "pictures"), [("rocoft", 6), ("road", 6), ("plain", 5)])
def test_the_page_needs_nothing_else_and_says_what_was_found(kind, pictures, tmp_path) -> None:
    found = explanation(kind)
    write_report(tmp_path / "page.html", found, subtitle="a & b")
    text = (tmp_path / "page.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{1000,}"', text)) == pictures
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<dense>" not in text
    assert "&lt;dense&gt;" in text
    assert "a &amp; b" in text
    assert "classifier.weight" in text
    assert f"{100 * found.relative:.3g} %" in text
    assert math.isfinite(found.relative)
