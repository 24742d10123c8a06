"""An adapter out of two models: exact where the change is of rows or columns, the nearest and honest about it elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnrow import RocoftConfig
from turnrow.adapters import extract_adapter, load_adapter, read_adapter
from turnrow.errors import UserError
from turnrow.ops.subset import best_columns, best_entries, best_rows, best_rows_and_columns, residual


@pytest.mark.parametrize("mode", ["row", "column"])
def test_what_was_trained_and_merged_comes_back(mode, make_bert, train_a_little, tmp_path):
    config = RocoftConfig(mode=mode, indices=[4, 1], bias="rocoft_only", task_type="SEQ_CLS")
    merged = train_a_little(make_bert(), config).merge_and_unload()
    extraction = extract_adapter(make_bert(), merged, tmp_path / "adapter", mode=mode, task_type="SEQ_CLS")
    assert extraction.residual == 0
    assert extraction.left_out == {}
    assert extraction.saved_modules == ["classifier.bias", "classifier.weight"]
    adapter = read_adapter(extraction.path)
    assert all(tensors[f"rocoft_{mode}_index"].tolist() == [1, 4] for tensors in adapter.modules.values())
    again = load_adapter(make_bert(), extraction.path).merge_and_unload().state_dict()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-8)


@pytest.fixture
def tuned(make_bert):
    """The tiny BERT with every parameter changed a little, as full fine-tuning does."""
    model = make_bert()
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "row", "r": 2},
        {"mode": "column", "r": 2},
        {"mode": "row+column", "r": 2},
        {"mode": "entry", "density": 0.3},
    ],
)
def test_of_a_full_fine_tuning_the_most_is_taken_and_the_rest_is_said(settings, make_bert, tuned, tmp_path):
    extraction = extract_adapter(make_bert(), tuned, tmp_path / "adapter", task_type="SEQ_CLS", **settings)
    assert 0.1 < extraction.residual < 1
    found = load_adapter(make_bert(), extraction.path).merge_and_unload().state_dict()
    base, wanted = make_bert().state_dict(), tuned.state_dict()
    for name, (changed, rest) in extraction.norms.items():
        key = f"{name}.weight"
        torch.testing.assert_close(torch.linalg.vector_norm(wanted[key] - base[key]).item(), changed, rtol=1e-4, atol=0)
        torch.testing.assert_close(torch.linalg.vector_norm(wanted[key] - found[key]).item(), rest, rtol=1e-4, atol=0)
        torch.testing.assert_close(found[f"{name}.bias"], wanted[f"{name}.bias"])
    assert "bert.embeddings.word_embeddings.weight" in extraction.left_out
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in extraction.left_out
    assert not any("dense" in name for name in extraction.left_out)
    torch.testing.assert_close(found["classifier.weight"], wanted["classifier.weight"])


def test_all_rows_are_everything(make_bert, tuned, tmp_path):
    extraction = extract_adapter(make_bert(), tuned, tmp_path / "adapter", biases=False)
    assert extraction.residual == 0
    assert "bert.encoder.layer.0.output.dense.bias" in extraction.left_out


def test_a_conv1d_and_tied_heads(make_gpt2, tmp_path):
    tuned = make_gpt2()
    with torch.no_grad():
        tuned.transformer.h[0].attn.c_attn.weight[:, 5] += 1  # stored as (in, out): row 5
        tuned.transformer.h[1].mlp.c_proj.weight[3] += 1
    extraction = extract_adapter(make_gpt2(), tuned, tmp_path / "adapter", mode="row", r=1, task_type="CAUSAL_LM")
    assert extraction.norms["transformer.h.0.attn.c_attn"][1] == 0
    assert extraction.norms["transformer.h.1.mlp.c_proj"][1] > 0
    indices = read_adapter(extraction.path).config["indices"]
    assert indices["transformer.h.0.attn.c_attn"] == [5]
    found = load_adapter(make_gpt2(), extraction.path).merge_and_unload()
    torch.testing.assert_close(found.transformer.h[0].attn.c_attn.weight, tuned.transformer.h[0].attn.c_attn.weight)


def test_bad_arguments(make_bert, make_llama, tuned, tmp_path):
    out = tmp_path / "adapter"
    for arguments, message in (
        ({"mode": "rows"}, "mode is 'rows'; it must be one of .*did you mean 'row'"),
        ({"r": 0}, "r is 0; it must be a whole number"),
        ({"mode": "row+column"}, "r is None; mode 'row\\+column' needs a number"),
        ({"mode": "entry"}, "density is None; mode 'entry' needs"),
        ({"mode": "entry", "r": 2, "density": 0.1}, "r is 2, but mode 'entry'"),
        ({"density": 0.1}, "density is 0.1, but mode 'row'"),
    ):
        with pytest.raises(UserError, match=message):
            extract_adapter(make_bert(), tuned, out, **arguments)
    with pytest.raises(UserError, match="no linear layer differs"):
        extract_adapter(make_bert(), make_bert(), out)
    with pytest.raises(UserError, match="module 'bert.encoder.layer.0.* the tuned model has no such module"):
        extract_adapter(make_bert(), make_llama(), out)
    assert not out.exists()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_no_other_choice_leaves_out_less(seed, r):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    norm = torch.linalg.vector_norm(matrix)
    for found, axis in ((best_rows(matrix, r), 1), (best_columns(matrix, r), 0)):
        norms = torch.linalg.vector_norm(matrix, dim=axis)
        least = (norm**2 - norms.topk(r).values.square().sum()).clamp(min=0).sqrt().item()
        assert residual(matrix, found) == pytest.approx(least, rel=1e-6, abs=1e-6)
    entries = best_entries(matrix, 5 * r)
    assert residual(matrix, entries) == pytest.approx(
        matrix.abs().flatten().sort().values[: 20 - 5 * r].square().sum().sqrt().item(), rel=1e-5, abs=1e-6
    )
    both = best_rows_and_columns(matrix, r)
    assert residual(matrix, both) <= residual(matrix, best_rows(matrix, r)) + 1e-6
