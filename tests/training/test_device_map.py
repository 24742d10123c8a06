"""Where weights are loaded to, and what loading them takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks import Task, make_task, read_table
from turnrow.training import Recipe, train
from turnrow.training.base import load_base

MEBIBYTE = 2**20
SHARD = 8 * MEBIBYTE


@pytest.fixture
def task(films: Path) -> Task:
    task = make_task("classification", text="sentence", label="label")
    task.fit(read_table(str(films / "train.jsonl")))
    return task


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_run_with_a_device_map_is_the_run_without(make_recipe: Any, device_map: Any, tmp_path: Path) -> None:
    plain = train(make_recipe(training={"max_steps": 2}))
    mapped = train(make_recipe(training={"max_steps": 2}, device_map=device_map, output_dir=str(tmp_path / "mapped")))
    assert mapped.metrics["after"] == plain.metrics["after"]
    files = [run.adapter / "adapter_model.safetensors" for run in (plain, mapped)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_quantized_base_is_loaded_by_a_device_map_too(tiny_base: Path, task: Task, device_map: str) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, by pip install 'turnrow[quantized]'")
    bases = [load_base(str(tiny_base), task, quantization="nf4", device_map=where) for where in (None, device_map)]
    frozen = [{n: p for n, p in base.model.named_parameters() if not n.startswith("classifier")} for base in bases]
    assert any(p.dtype == torch.uint8 for p in frozen[0].values())
    assert all(p.is_cpu and torch.equal(p, frozen[0][name]) for name, p in frozen[1].items())


@pytest.mark.parametrize("device_map", ["disk", {"": "disk"}, {"bert": "cpu", "classifier": "meta"}])
def test_a_recipe_that_offloads_is_refused(make_recipe: Any, device_map: Any) -> None:
    with pytest.raises(UserError, match="device_map sends weights to '(disk|meta)', where no gradient reaches them"):
        make_recipe(device_map=device_map)


@pytest.mark.parametrize("device_map", [True, 1.5, "", {"bert": None}])
def test_what_is_no_device_is_refused(make_recipe: Any, device_map: Any) -> None:
    with pytest.raises(UserError, match="device_map holds .*; expected a device such as cpu, cuda:0 or 0, 'auto'"):
        make_recipe(device_map=device_map)


def test_a_recipe_keeps_its_own_copy_of_the_map(make_recipe: Any) -> None:
    given = {"": "cpu"}
    recipe = make_recipe(device_map=given)
    given[""] = "disk"
    assert recipe.device_map == {"": "cpu"}
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_device_that_is_not_there_is_named(tiny_base: Path, task: Task) -> None:
    with pytest.raises(UserError, match="model '.*base' cannot be loaded: "):
        load_base(str(tiny_base), task, device_map="nowhere")


@pytest.mark.filterwarnings("ignore:.*")
def test_weights_that_ended_up_on_the_disk_are_refused(tiny_base: Path, task: Task) -> None:
    # As device_map="auto" may decide where memory is short.
    spread = {
        "bert.embeddings": "cpu",
        "bert.encoder": "disk",
        "bert.pooler": "cpu",
        "classifier": "cpu",
        "dropout": "cpu",
    }
    with pytest.raises(UserError, match="which offloads 'bert.encoder.layer.0.*training needs every weight"):
        load_base(str(tiny_base), task, device_map=spread)


_MEASURE = """
import gc, json, sys, threading
from pathlib import Path
from turnrow.tasks import task_from_dict
from turnrow.training.base import load_base
from turnrow.training.measure import reset_peak_memory
import torch

def status(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name + ":"))
    return int(line.split()[1]) * 1024

task = task_from_dict({"version": 1, "name": "classification", "options": {"metric": None, "text": "text", "label": "label"},
                       "learned": {"labels": [0, 1]}})
tiny, large, dtype, device_map = sys.argv[1:]
load_base(tiny, task, device_map=device_map)  # the libraries
gc.collect()
reset_peak_memory(torch.device("cpu"))
resident, anonymous, done, peak = status("VmRSS"), status("RssAnon"), threading.Event(), [0]

def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], status("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
model = load_base(large, task, dtype=dtype, device_map=device_map).model
for parameter in model.parameters():
    parameter.detach().max()
done.set()
watcher.join()
print(json.dumps({"weights": sum(p.nbytes for p in model.parameters()), "resident": status("VmHWM") - resident,
                  "anonymous": max(peak[0], status("RssAnon")) - anonymous}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_weights_and_a_shard(
    tiny_base: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, dtype: str
) -> None:
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=4,
        vocab_size=len(tiny_tokenizer),
    )
    torch.manual_seed(0)
    LlamaModel(config).save_pretrained(tmp_path / "large", max_shard_size=SHARD)
    tiny_tokenizer.save_pretrained(tmp_path / "large")
    shards = list((tmp_path / "large").glob("*.safetensors"))
    assert len(shards) > 8
    command = [sys.executable, "-W", "ignore", "-c", _MEASURE, str(tiny_base), str(tmp_path / "large"), dtype, "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout.splitlines()[-1])
    assert taken["weights"] > 5 * SHARD
    room = SHARD + 8 * MEBIBYTE  # and what Python takes
    # What the system cannot take back: pages of the mapped files it can.
    assert taken["anonymous"] < taken["weights"] + room
    if dtype == "float32":
        # Nothing is copied: the weights are the mapped files.
        assert taken["weights"] * 0.9 < taken["resident"] < taken["weights"] + room
        assert taken["anonymous"] < room
