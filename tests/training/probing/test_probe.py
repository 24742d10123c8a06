"""A probe ranks methods without training, on rows that it was not shown, and says what it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertForMaskedLM, LlamaConfig, LlamaModel

from turnrow.errors import UserError
from turnrow.tasks import make_task, read_table
from turnrow.training import draw_probe, probe, write_probe
from turnrow.training.base import load_base
from turnrow.training.probing.candidates import probe_candidates
from turnrow.training.probing.data import Source, draw

from ..conftest import tiny_config

FEW = [{"name": "rocoft", "mode": "row", "r": 2}, {"name": "full"}]
SMALL = {"shots": 3, "draws": 2, "rows": 5}


@pytest.fixture
def found(make_recipe):
    return probe(make_recipe(), methods=FEW, **SMALL)


def test_every_method_has_a_score_a_draw_and_its_cost(found):
    assert {one.title for one in found.methods} == {"rocoft row r=2", "full"}
    for one in found.methods:
        assert len(one.scores) == 2
        assert all(0 <= score <= 1 for score in one.scores)
        assert one.step_seconds > 0
        assert one.peak_bytes > 0
        assert one.trainable_parameters > 0
        assert one.note is None
    full = next(one for one in found.methods if one.title == "full")
    assert full.distance(1) == full.distance(2) == 0
    rows = next(one for one in found.methods if one.title != "full")
    assert 0 < rows.distance(2) < 2
    assert [one.score for one in found.methods] == sorted((one.score for one in found.methods), reverse=True)


def test_the_same_probe_gives_the_same_numbers_whatever_else_is_compared(make_recipe, found):
    again = probe(make_recipe(), methods=[FEW[1], {"name": "bitfit"}, FEW[0]], measure_steps=False, **SMALL)
    known = {one.title: one for one in again.methods}
    for one in found.methods:
        assert known[one.title].scores == one.scores
        assert known[one.title].distances == one.distances
        assert known[one.title].step_seconds is None


def test_the_test_split_is_not_read(make_recipe, films, found):
    (films / "test.jsonl").unlink()
    again = probe(make_recipe(), methods=FEW, measure_steps=False, **SMALL)
    assert [one.scores for one in again.methods] == [one.scores for one in found.methods]


def test_held_rows_are_none_of_those_trained_on(make_recipe):
    recipe = make_recipe()
    task = make_task(**recipe.task)
    train = read_table(recipe.data.train, "train")
    train = train.select([*range(len(train)), *range(len(train))])  # every row twice
    task.fit(train)
    source = Source(train, None, task, load_base(recipe.model, task), None)
    for seed in range(3):
        few, held = draw(source, 4, 100, seed, 4)
        seen = {tuple(ids) for ids in few.encoded["input_ids"]}
        assert len(few.classes) == 8
        assert len(held.classes) > 0
        assert not seen & {tuple(ids) for ids in held.encoded["input_ids"]}


def test_without_a_validation_split_rows_are_held_out_of_the_training_split(make_recipe, films):
    data = {split: str(films / f"{split}.jsonl") for split in ("train", "test")}
    found = probe(make_recipe(data=data), methods=FEW[:1], measure_steps=False, **SMALL)
    assert found.held_from == "other rows of the training split"
    assert found.held_rows == 5


def test_a_method_that_cannot_be_probed_has_a_note_and_the_others_stand(make_recipe):
    found = probe(
        make_recipe(),
        methods=[FEW[0], {"name": "loha", "r": 2, "target_modules": ["query"]}],
        measure_steps=False,
        **SMALL,
    )
    assert [one.title for one in found.methods] == ["rocoft row r=2", "loha r=2"]
    assert found.methods[0].scores
    assert not found.methods[1].scores
    assert "its kernel is not known" in found.methods[1].note


def test_label_words_of_a_masked_language_model(make_recipe, tmp_path, tiny_tokenizer):
    folder = tmp_path / "masked"
    BertForMaskedLM(tiny_config(len(tiny_tokenizer))).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    task = {"name": "prompt", "template": "{sentence} it was {mask}", "label_words": {"0": "bad", "1": "good"}}
    found = probe(make_recipe(model=str(folder), task=task), methods=FEW, measure_steps=False, **SMALL)
    assert found.outputs == "logits of the label words"
    assert all(len(one.scores) == 2 for one in found.methods)


def test_a_pretrained_head_is_used(make_recipe, films, headed_base):
    for split in ("train", "validation"):
        rows = [json.loads(line) for line in (films / f"{split}.jsonl").read_text().splitlines()]
        rows = [{**row, "label": number % 3} for number, row in enumerate(rows)]
        (films / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = probe(make_recipe(model=str(headed_base)), methods=FEW, measure_steps=False, **SMALL)
    assert found.outputs == "logits of the pretrained head"


def test_the_usual_candidates_begin_with_the_recipes_own_and_are_all_different(make_recipe):
    recipe = make_recipe(method={"name": "rocoft", "mode": "row", "r": 3})
    task = make_task(**recipe.task)
    task.fit(read_table(recipe.data.train, "train"))
    model = load_base(recipe.model, task).model
    chosen = probe_candidates(recipe.method, model)
    assert chosen[0] == recipe.method
    assert len({json.dumps(one, sort_keys=True) for one in chosen}) == len(chosen)
    assert sum(one["name"] == "rocoft" and one["mode"] == "row" and one.get("r") == 3 for one in chosen) == 1
    assert {"name": "ln_tuning", "target_modules": ["LayerNorm"]}.items() <= next(
        one for one in chosen if one["name"] == "ln_tuning"
    ).items()


def test_a_model_without_biases_is_probed_without_bitfit(make_recipe, tmp_path, tiny_tokenizer):
    folder = tmp_path / "decoder"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        pad_token_id=0,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    found = probe(make_recipe(model=str(folder)), measure_steps=False, **SMALL)
    names = [one.title for one in found.methods]
    assert "bitfit" not in names
    assert "full" in names
    assert all(one.scores for one in found.methods)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"shots": 1}, "shots is 1; expected a whole number from 2"),
        ({}, {"draws": 0}, "draws is 0; expected a whole number from 1"),
        ({}, {"rows": True}, "rows is True"),
        ({}, {"shots": 20}, "lower shots"),
        ({}, {"methods": []}, "methods is empty"),
        ({}, {"methods": [{"name": "lorra"}]}, "did you mean"),
        ({"task": {"name": "regression", "text": ["sentence"], "label": "stars"}}, {}, "a probe needs classes"),
        ({"quantization": "nf4"}, {}, "leave quantization out"),
    ],
)
def test_bad_input_is_named(make_recipe, changes, options, message):
    with pytest.raises(UserError, match=message):
        probe(make_recipe(**changes), **{"methods": FEW, **SMALL, **options})


def test_page_and_picture(found, tmp_path: Path):
    write_probe(tmp_path / "probe.html", found)
    page = (tmp_path / "probe.html").read_text(encoding="utf-8")
    assert "rocoft row r=2" in page
    assert "data:image/png;base64," in page
    assert draw_probe(found, tmp_path / "probe.svg").startswith(b"<?xml")
    assert json.loads(json.dumps(found.to_dict()))["methods"][0]["scores"]


def test_what_was_found_of_a_method_is_asked_by_its_section(found):
    assert found.of({"name": "full"}).title == "full"
    with pytest.raises(KeyError, match="lora r=8"):
        found.of({"name": "lora"})


def test_a_first_method_that_cannot_be_made_stands_in_nobodys_way(make_recipe):
    methods = [{"name": "rocoft", "mode": "row", "r": 2, "target_modules": ["nowhere"]}, FEW[1]]
    found = probe(make_recipe(), methods=methods, measure_steps=False, **SMALL)
    assert "nowhere" in found.of(methods[0]).note
    assert found.of(FEW[1]).scores
