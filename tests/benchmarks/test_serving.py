"""The benchmark of serving on a tiny shape: the form of its file, that wrong answers are not timed, and what its table says."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving import __main__ as command
from benchmarks.serving import timing
from benchmarks.serving.methods import BASE, METHODS, enliven, write_adapters
from benchmarks.serving.served import InEngine, serve
from benchmarks.serving.table import markdown, tokens_per_second
from benchmarks.serving.timing import WrongAnswer, check_answers
from benchmarks.serving.turns import take_turns
from benchmarks.shapes import SHAPES, build_model, target_names

SIZES = [
    "--requests",
    "3",
    "--adapters",
    "1",
    "3",
    "--decode",
    "4",
    "5",
    "--prefill",
    "20",
    "3",
    "--batch-tokens",
    "32",
]


@pytest.fixture(scope="module")
def base() -> Any:
    model = build_model(SHAPES["tiny-llama"], device="cpu", dtype=torch.float32, seed=0).eval()
    enliven(model, target_names(model))
    return model


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("results") / "result.json"
    methods = ["rows", "lora", "peft_base", "peft_lora"]
    options = ["--rounds", "2", "--peer-rounds", "1", "--methods", *methods, "--output", str(file)]
    threads = torch.get_num_threads()
    assert command.main(["--shape", "tiny-llama", *SIZES, *options]) == 0
    torch.set_num_threads(threads)
    return json.loads(file.read_text())


def test_file_says_where_its_numbers_come_from(result: dict[str, Any]) -> None:
    assert (result["format"], result["benchmark"]) == (1, "serving")
    assert {"processor", "cores", "threads", "load_average"} <= result["machine"].keys()
    settings = result["settings"]
    assert settings["loads"] == {"decode": [4, 5], "prefill": [20, 3]}
    assert (settings["clock"], settings["dtype"], settings["adapters"]) == ("thread_time", "float32", [1, 3])


def test_file_holds_every_method_with_all_rounds(result: dict[str, Any]) -> None:
    assert list(result["methods"]) == [BASE, "rows", "lora", "peft_base", "peft_lora"]
    for name, method in result["methods"].items():
        for load in ("decode", "prefill"):
            assert method[load]["gap"] <= 1e-3
            counts = ["0"] if METHODS[name].config is None else ["1", "3"]
            assert list(method[load]["adapters"]) == counts
            for entry in method[load]["adapters"].values():
                rounds = 2 if method["where"] == "engine" else 1
                assert len(entry["seconds"]["samples"]) == len(entry["ratio"]["samples"]) == rounds
    assert result["methods"][BASE]["decode"]["adapters"]["0"]["ratio"]["samples"] == [1, 1]


def test_all_methods_in_the_engine_take_the_same_steps(result: dict[str, Any]) -> None:
    # 3 x 4 tokens of prompts in one step, then 4 more tokens each; 3 x 20 in steps of 32, the last with tokens of those that are through
    for name in (BASE, "rows", "lora"):
        steps = {
            load: {e["steps"] for e in result["methods"][name][load]["adapters"].values()}
            for load in ("decode", "prefill")
        }
        assert steps == {"decode": {5}, "prefill": {4}}


@torch.no_grad()
def test_a_batch_in_the_engine_is_what_each_merged_model_generates(base: Any, tmp_path: Path) -> None:
    write_adapters(METHODS["road_1"], base, target_names(base), tmp_path, 3, seed=0)
    folders = [tmp_path / str(number) for number in range(3)]
    prompts = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    served = serve("road_1", base, folders, prompts, 5, 16)
    assert isinstance(served, InEngine)
    served.begin([2, None, 0])
    answers = served.answer()
    served.close()
    for place, folder in enumerate((folders[2], None, folders[0])):
        model = timing.merged(base, folder)
        found = model.generate(
            prompts[place : place + 1], max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        assert answers[place] == found[0, 6:].tolist()


class _Answering:
    """Gives answers that were made beforehand."""

    gate = staticmethod(lambda: None)

    def __init__(self, answers: list[list[int]]) -> None:
        self._answers = answers

    def begin(self, adapters: Any) -> None:
        pass

    def answer(self) -> list[list[int]]:
        return self._answers


@torch.no_grad()
def test_wrong_answers_and_adapters_without_effect_are_not_timed(base: Any, tmp_path: Path) -> None:
    write_adapters(METHODS["rows"], base, target_names(base), tmp_path, 2, seed=0)
    folders = [tmp_path / "0", tmp_path / "1"]
    prompts = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    of = lambda model, place: model.generate(prompts[place : place + 1], max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, 6:].tolist()  # noqa: E731  # fmt: skip
    right = [of(timing.merged(base, folder), place) for place, folder in enumerate(folders)]
    assert check_answers("rows", _Answering(right), base, folders, prompts, [0, 1]) <= 1e-3
    with pytest.raises(WrongAnswer, match="rows: request 0, adapter 1: a token lies"):
        check_answers("rows", _Answering(right), base, folders, prompts, [1, 0])
    one_off = [right[0], [*right[1][:-1], (right[1][-1] + 1) % 50]]
    with pytest.raises(WrongAnswer, match="rows: request 1, adapter 1: a token lies"):
        check_answers("rows", _Answering(one_off), base, folders, prompts, [0, 1])
    idle = tmp_path / "idle"
    write_adapters(METHODS["rows"], base, target_names(base)[:1], idle, 1, seed=0)
    from safetensors.torch import load_file, save_file

    tensors = load_file(idle / "0" / "adapter_model.safetensors")
    save_file(
        {k: v * 0 if v.is_floating_point() else v for k, v in tensors.items()}, idle / "0" / "adapter_model.safetensors"
    )
    (idle / "0" / "turnrow.json").unlink()
    with pytest.raises(WrongAnswer, match="adapter 0 answers as the base model does"):
        check_answers("rows", _Answering([of(base, 0), of(base, 1)]), base, [idle / "0"], prompts, [0, None])


class _Passing:
    """Takes a number of passes, each of which it writes down."""

    def __init__(self, name: str, passes: int, log: list[str]) -> None:
        self.gate: Any = None
        self._name, self._passes, self._log = name, passes, log

    def begin(self, adapters: Any) -> None:
        pass

    def answer(self) -> list[list[int]]:
        for _ in range(self._passes):
            self.gate()
            self._log.append(self._name)
            until = time.thread_time() + 0.01
            while time.thread_time() < until:
                pass
        return []

    def close(self) -> None:
        pass


def test_methods_take_turns_pass_by_pass_and_each_counts_its_own_time() -> None:
    log: list[str] = []
    batches: Any = {name: (_Passing(name, passes, log), []) for name, passes in (("a", 2), ("b", 4), ("c", 1))}
    seconds = take_turns(batches, ["b", "c", "a"], clock="thread_time", device="cpu")
    assert "".join(log) == "bcababb"
    assert {name: round(100 * value) for name, value in seconds.items()} == {"a": 2, "b": 4, "c": 1}


def made_up(seconds: dict[str, float]) -> dict[str, Any]:
    """A result with one round and one load, of a base that takes 1 s."""
    one = lambda value: {"median": value, "quartiles": [value, value], "samples": [value]}  # noqa: E731
    methods = {}
    for name, value in seconds.items():
        entry = {"seconds": one(value), "ratio": one(1 / value)}
        count = "0" if METHODS[name].config is None else "32"
        methods[name] = {"parameters": 7, "decode": {"gap": 0.0, "adapters": {count: entry}}}
    settings = {"shape": "llama", "dtype": "float32", "requests": 32, "adapters": [32], "loads": {"decode": [16, 64]}, "rounds": 1, "clock": "thread_time"}  # fmt: skip
    shape = {"family": "llama", "hidden": 1, "intermediate": 1, "layers": 1, "vocabulary": 1}
    machine = {"processor": "p", "threads": 1, "cores": 2}
    commit = {"commit": "0" * 40, "modified": False}
    return {
        "settings": settings,
        "shape": shape,
        "machine": machine,
        "versions": {},
        "commit": commit,
        "methods": methods,
    }


def test_goals_are_reached_or_missed_by_the_figures() -> None:
    table = markdown(made_up({BASE: 1.0, "road_1": 1.04, "rows": 1.2, "lora": 1.1, "peft_lora": 5.0}))
    assert "| **RoAd1** | 0.962 (0.962–0.962), 1,969 | 7 |" in table
    assert "| the base model alone | 1.000 (1.000–1.000), 2,048 | 7 |" in table
    assert "| with 32 adapters | of base (goal) | times lora | times peft_lora |" in table
    assert "| road_1, decode | 0.962 (0.95: reached) | 1.06 (1: reached) | 4.81 (4: reached) |" in table
    assert "| rows, decode | 0.833 (0.92: MISSED) | 0.92 (1: MISSED) | 4.17 (4: reached) |" in table


def test_speed_counts_new_tokens_in_decoding_and_all_of_them_with_long_prompts() -> None:
    settings = {"requests": 32, "loads": {"decode": [16, 64], "prefill": [192, 8]}}
    assert tokens_per_second(settings, "decode", 2.0) == 32 * 64 / 2
    assert tokens_per_second(settings, "prefill", 2.0) == 32 * 200 / 2


def test_show_prints_the_table_of_the_file(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    capsys.readouterr()
    assert command.main(["--show", str(file)]) == 0
    assert capsys.readouterr().out.strip() == markdown(result).strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, must be at least 1"),
        (["--batch-tokens", "0"], "--batch-tokens is 0, must be at least 1"),
        (["--requests", "4", "--adapters", "8"], r"--adapters is [8], must be from 1 to the 4 requests"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(options)
    assert message in capsys.readouterr().err
