"""`turnrow serve` as a process, and what it refuses before any model is loaded."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.serve_process import Process
from turnrow import RocoftConfig
from turnrow.cli import serve
from turnrow.cli.main import main

pytest.importorskip("fastapi", reason="needs the extra [serve]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and beside it a folder with one adapter and one that is broken."""
    import torch
    from peft import get_peft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("served")
    characters = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(root / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=4096, eos_token_id=0, **sizes))
    base.save_pretrained(root / "model")
    adapter = get_peft_model(base, RocoftConfig(r=1, target_modules=["q_proj"]))  # type: ignore[arg-type]
    adapter.save_pretrained(str(root / "adapters" / "mine"))
    shutil.copytree(root / "adapters" / "mine", root / "adapters" / "broken")
    (root / "adapters" / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    return root / "model"


STREAMED = {"model": "mine", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Iterator[Process]:
    options = ["--adapters", str(model.parent / "adapters"), "--served-model-name", "tiny"]
    found = Process(model, tmp_path / "log", *options)
    yield found
    found.process.kill()
    found.process.wait()


def test_a_signal_ends_the_process_when_all_is_answered(served: Process) -> None:
    names = {entry["id"] for entry in json.load(served.ask("/v1/models"))["data"]}
    assert names == {"base", "mine"}
    stream = served.ask("/v1/completions", STREAMED)
    stream.readline()
    served.process.send_signal(signal.SIGTERM)
    rest = stream.read().decode()
    assert rest.endswith("data: [DONE]\n\n")
    assert served.process.wait(30) == 0
    log = served.log.read_text()
    assert "not served, broken: " in log
    assert "serving tiny and 1 adapter at http://127.0.0.1:" in log
    assert "taking no more requests; 1 answers run and 0 wait" in log
    assert "POST '/v1/completions' 200" in log


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(served: Process) -> None:
    stream = served.ask("/v1/completions", STREAMED | {"max_tokens": 4000})
    stream.readline()
    served.process.send_signal(signal.SIGINT)
    while "taking no more requests" not in served.log.read_text():
        time.sleep(0.02)
    served.process.send_signal(signal.SIGINT)
    rest = stream.read().decode()
    assert '"code":"unavailable"' in rest
    assert "[DONE]" not in rest
    assert served.process.wait(30) == 130


REFUSED = [
    (["--port", "99999"], "the port is 99999"),
    (["--host", "no.such.host.invalid"], "the server cannot listen at 'no.such.host.invalid'"),
    (["--slots", "0"], "slots is 0"),
    (["--max-waiting", "0"], "max_queue is 0"),
    (["--max-model-len", "1"], "--max-model-len is 1"),
    (["--max-body", "much"], "memory is 'much'"),
    (["--request-timeout", "-1"], "request_timeout_s is -1"),
    (["--api-key", ""], "api_key is empty"),
    (["--device", "abacus"], "device is 'abacus', which cannot be used"),
    (["--model", "no/such/model"], "model 'no/such/model' cannot be loaded"),
    (["--adapters", "nowhere"], "the adapters' folder 'nowhere' does not exist"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_is_said_in_a_line(
    model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(model), "--port", "0", *options]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ")
    assert message in errors[-1]


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["serve", "--model", "no/such", "--port", str(other.getsockname()[1])]) == 2
    assert "is another one running there?" in capsys.readouterr().err


def test_an_adapter_with_the_bases_own_name_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--adapters", str(model.parent / "adapters"), "--served-model-name", "mine", "--port", "0"]
    assert main(["serve", "--model", str(model), *options]) == 2
    assert "the base and an adapter are both called 'mine'" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "_PACKAGES", ("fastapi", "no_such_package"))
    assert main(["serve", "--model", "x"]) == 2
    assert "needs no_such_package, not installed here: pip install 'turnrow[serve]'" in capsys.readouterr().err


def test_a_model_that_lacks_weights_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    whole = shutil.copytree(model, tmp_path / "whole")
    weights = load_file(whole / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, whole / "model.safetensors", {"format": "pt"})
    assert main(["serve", "--model", str(whole), "--port", "0"]) == 2
    assert "it lacks 1 weights, such as 'lm_head.weight'" in capsys.readouterr().err
