"""`turnrow explain` says what an adapter changed: by its files, on its base, on texts; as tables, page and JSON."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from turnrow import RoadConfig, RocoftConfig
from turnrow.adapters import write_manifest
from turnrow.cli.main import main
from turnrow.tasks import make_task

CONFIGS = {
    "rows": RocoftConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
    "road": RoadConfig(variant="road_1", group_size=4, target_modules=["query"], task_type="SEQ_CLS"),
    "lora": LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["query"], task_type="SEQ_CLS"),
}
QUERY = "bert.encoder.layer.0.attention.self.query"


def bert(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes["max_position_embeddings"] = 32  # fewer than the tokenizer would take
    model = BertForSequenceClassification(BertConfig(vocab_size=80, initializer_range=0.3, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("query.bias"):  # of zeros RoAd turns nothing
                parameter.normal_()
    return model


@pytest.fixture
def folders(tmp_path, tiny_tokenizer):
    """`folders(method)`: the folder of an adapter; its base lies beside it, with the tokenizer, and another one."""
    bert(0).save_pretrained(tmp_path / "base")
    bert(1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "base")

    def make(method):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
        model = get_peft_model(model, copy.deepcopy(CONFIGS[method]))  # peft writes into the config
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "classifier" not in name:
                    parameter += 0.5 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / method)
        write_manifest(tmp_path / method, model)
        return tmp_path / method

    return make


@pytest.mark.parametrize("method", CONFIGS)
def test_tables_page_and_json_tell_the_same(method, folders, tmp_path, capsys):
    page, told = tmp_path / "page.html", tmp_path / "told.json"
    texts = ["--text", "the cat sat", "--text", "a dog ran home"]
    assert main(["explain", str(folders(method)), *texts, "--html", str(page), "--json", str(told)]) == 0
    out = capsys.readouterr().out
    found = json.loads(told.read_text())
    assert len(found["weights"]) == (4 if method == "road" else 2)  # RoAd turns biases too
    assert {weight["name"] for weight in found["weights"]} >= {QUERY, QUERY.replace("0", "1")}
    first = found["weights"][0]
    line = next(line for line in out.splitlines() if line.split()[:1] == [first["name"]])
    assert f"{first['relative']:.2%}" in line
    assert first["effective_rank"] > 1
    assert found["displacement"]["texts"] == 2
    layers = found["displacement"]["layers"]
    assert layers["embeddings"]["all"]["turn"]["greatest"] < 1e-12 < layers["layer 2"]["all"]["turn"]["mean"]
    assert layers["layer 2"]["special"]["turn"]["count"] == 4
    tokens = {token["token"]: token for token in found["tokens"]}
    assert set(tokens) == {"[CLS]", "[SEP]", "the", "cat", "sat", "a", "dog", "home", "ran"}
    assert tokens["[CLS]"]["count"] == 2
    assert re.search(rf"^ *{re.escape(found['tokens'][0]['token'])} +\d", out, re.MULTILINE)
    assert found["whole"] == ["classifier.bias", "classifier.weight"]
    assert f"wrote {page}" in out
    assert first["name"] in page.read_text()


def test_what_is_particular_to_a_method_is_told(folders, capsys):
    assert main(["explain", str(folders("rows"))]) == 0
    assert re.search(r"row [01] \(\d+\.\d%\), [01] \(\d+\.\d%\)", capsys.readouterr().out)
    assert main(["explain", str(folders("road"))]) == 0
    assert re.search(r"0\.\d+ \(95%: \d\.\d+\) rad +0\.\d+ to \d\.\d+", capsys.readouterr().out)


@pytest.mark.parametrize("method", ["rows", "road", "lora"])
def test_without_a_base_the_files_alone_are_looked_at(method, folders, tmp_path, capsys):
    folder = folders(method)
    for file in (tmp_path / "base").iterdir():
        file.unlink()
    assert main(["explain", str(folder), "--no-base", "--json", str(tmp_path / "told.json")]) == 0
    found = json.loads((tmp_path / "told.json").read_text())
    assert len(found["weights"]) == 2
    assert all(weight["relative"] is None for weight in found["weights"])
    assert (found["norm"] is None) == (method == "road")
    assert "%" not in capsys.readouterr().out.replace("95%", "")
    assert main(["explain", str(folder)]) == 2
    assert "--no-base looks at the adapter's files alone" in capsys.readouterr().err


def test_a_whole_model_is_compared_with_its_base(folders, tmp_path, tiny_tokenizer, capsys):
    folders("rows")
    tuned = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned.bert.encoder.layer[1].output.dense.weight *= 1.5
    tuned.save_pretrained(tmp_path / "tuned")
    arguments = ["explain", str(tmp_path / "tuned"), "--base", str(tmp_path / "base")]
    assert main([*arguments, "--text", "the cat sat", "--json", str(tmp_path / "told.json")]) == 0
    found = json.loads((tmp_path / "told.json").read_text())
    assert [(w["name"], w["relative"]) for w in found["weights"]] == [
        ("bert.encoder.layer.1.output.dense", pytest.approx(0.5))
    ]
    layers = found["displacement"]["layers"]
    assert layers["layer 1"]["all"]["turn"]["greatest"] < 1e-12 < layers["layer 2"]["all"]["turn"]["least"]
    assert main(["explain", str(tmp_path / "tuned")]) == 2
    assert "holds a whole model: give the model that it was made of (--base MODEL)" in capsys.readouterr().err
    assert main(["explain", str(tmp_path / "base"), "--base", str(tmp_path / "base")]) == 2
    assert "hold the same weights" in capsys.readouterr().err


def test_rows_of_the_task_are_read_as_the_task_reads_them(folders, tmp_path, tiny_tokenizer):
    folder = folders("rows")
    tiny_tokenizer.save_pretrained(folder)
    task = make_task("classification", text=["one", "two"], label="label")
    task.labels = ["no", "yes"]
    (folder / "task.json").write_text(json.dumps({"version": 1, "task": task.to_dict(), "max_length": 9}))
    rows = [
        {"one": "the cat sat", "two": "a dog ran home to the tree"},
        {"one": "the dog", "two": "good"},
        {"one": "a", "two": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["explain", str(folder), "--data", str(tmp_path / "rows.jsonl"), "--rows", "2", "--batch-size", "1"]
    assert main([*arguments, "--json", str(tmp_path / "told.json")]) == 0
    found = json.loads((tmp_path / "told.json").read_text())
    assert found["displacement"]["texts"] == 2
    assert found["texts"][0]["tokens"] == ["[CLS]", "the", "cat", "sat", "[SEP]", "a", "dog", "ran", "[SEP]"]


def test_texts_come_from_a_file_one_a_line(folders, tmp_path):
    (tmp_path / "texts.txt").write_text("the cat sat\n\na dog\n")
    arguments = ["explain", str(folders("rows")), "--texts", str(tmp_path / "texts.txt")]
    assert main([*arguments, "--json", str(tmp_path / "told.json")]) == 0
    assert json.loads((tmp_path / "told.json").read_text())["displacement"]["texts"] == 2


def test_another_base_is_refused_unless_told_otherwise(folders, tmp_path, capsys):
    for method in ("rows", "dora"):
        arguments = ["explain", str(folders(method)), "--base", str(tmp_path / "other")]
        assert main(arguments) == 2
        assert f"the first module that differs is '{QUERY}'" in capsys.readouterr().err
        assert main([*arguments, "--no-check-base"]) == 0


def test_bad_input_is_said_before_a_model_is_loaded(folders, tmp_path, capsys):
    folder = str(folders("dora"))
    (tmp_path / "empty.txt").write_text("\n")
    cases = {
        ("--no-base",): "a LORA adapter whose file does not say by itself what it changes",
        ("--no-base", "--text", "x"): "--no-base leaves no model to run texts through",
        ("--rows", "0"): "--rows is 0; it must be 1 or more",
        ("--html", str(tmp_path / "none" / "x.html")): "x.html cannot be written: name a file in a folder that exists",
        ("--data", "x.jsonl"): "has no task.json: give --texts FILE",
        ("--texts", str(tmp_path / "empty.txt")): "empty.txt holds no text: write one a line",
        ("--texts", str(tmp_path / "none.txt")): "none.txt cannot be read",
    }
    for arguments, message in cases.items():
        assert main(["explain", folder, *arguments]) == 2
        assert message in capsys.readouterr().err, arguments
    assert main(["explain", str(tmp_path / "nowhere")]) == 2
    assert "no adapter folder" in capsys.readouterr().err


def test_a_model_with_a_decoder_is_read_by_its_encoder(tmp_path, tiny_tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 80}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, pad_token_id=0, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    arguments = ["explain", str(tmp_path / "adapter"), "--text", "the cat sat"]
    assert main([*arguments, "--json", str(tmp_path / "told.json")]) == 0
    found = json.loads((tmp_path / "told.json").read_text())
    assert list(found["displacement"]["layers"])[1::2] == ["encoder layer 1", "decoder layer 1"]
    assert found["texts"][0]["tokens"] == ["[CLS]", "the", "cat", "sat", "[SEP]"]
    assert found["texts"][0]["layers"] == ["encoder embeddings", "encoder layer 1"]


def test_texts_are_cut_to_the_positions_of_the_model(folders, tmp_path):
    arguments = ["explain", str(folders("rows")), "--text", "the cat " * 100, "--json", str(tmp_path / "told.json")]
    assert main(arguments) == 0
    assert (
        json.loads((tmp_path / "told.json").read_text())["displacement"]["layers"]["layer 1"]["all"]["turn"]["count"]
        == 32
    )


def test_prompts_change_no_weight(tmp_path, capsys):
    get_peft_model(bert(0), PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")).save_pretrained(
        tmp_path / "p"
    )
    assert main(["explain", str(tmp_path / "p"), "--text", "good"]) == 2
    assert "is a PROMPT_TUNING adapter, which changes no weight of its base" in capsys.readouterr().err
