"""The load on the server: what is drawn, what counts as lost or wrong, and a small load on a real server."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving_load import __main__ as command
from benchmarks.serving_load.answers import Reference, Verdict, judge
from benchmarks.serving_load.asking import PROMPTS, Ask, Outcome, draw, zipf_weights
from benchmarks.serving_load.report import markdown, percentiles, plot, summary

NAMES = [f"a{number}" for number in range(50)]
ASK = Ask("a1", 0, 3, stream=False)
REFERENCE = Reference([" one", " one two", " one two three", " one two three."], [0.5, 0.4, 0.3, 0.2], ended=False)
RIGHT = Outcome(ASK, 1.0, 3.0, None, 200, " one two three", "length", 3)
FIGURES = {
    f"turnrow_{name}": 0.0
    for name in (
        "adapter_loads_total", "adapter_uploads_total", "adapter_evictions_total", "adapters_in_memory", "adapter_host_bytes",
        "adapter_device_bytes", "steps_total", "answers_running", "answers_waiting", "adapter_slots_in_use", "cache_tokens_held",
    )
}  # fmt: skip


def test_weights_follow_the_law() -> None:
    assert zipf_weights(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf_weights(4, 0.0) == [0.25] * 4


def test_a_few_adapters_are_asked_for_often_and_a_seed_draws_the_same_again() -> None:
    asks = draw(NAMES, 5000, exponent=1.0, seed=3)
    assert asks == draw(NAMES, 5000, exponent=1.0, seed=3)
    assert asks != draw(NAMES, 5000, exponent=1.0, seed=4)
    counts = [count for _, count in Counter(ask.adapter for ask in asks).most_common()]
    expected = [5000 * weight for weight in zipf_weights(50, 1.0)]
    assert counts[0] == pytest.approx(expected[0], rel=0.1)
    assert counts[1] == pytest.approx(expected[1], rel=0.15)
    assert {ask.prompt for ask in asks} == set(range(len(PROMPTS)))
    assert 0.4 < sum(ask.stream for ask in asks) / 5000 < 0.6
    assert not any(ask.leaves for ask in asks)
    assert asks[0].adapter != NAMES[0] or asks[1].adapter != NAMES[0]  # which are popular does not go by their order


def test_who_leaves_reads_a_stream() -> None:
    asks = draw(NAMES, 1000, exponent=1.0, seed=0, leaving=0.3)
    leaving = [ask for ask in asks if ask.leaves]
    assert 230 < len(leaving) < 370
    assert all(ask.stream for ask in leaving)


@pytest.mark.parametrize(
    "wrong",
    [
        {"text": " one two four"},
        {"text": " one two"},
        {"tokens": 2},
        {"finish_reason": "stop"},
    ],
)
def test_an_answer_is_right_in_text_number_and_end_or_wrong(wrong: dict[str, Any]) -> None:
    assert judge(RIGHT, REFERENCE) == Verdict(True)
    verdict = judge(replace(RIGHT, **wrong), REFERENCE)
    assert (verdict.is_right, verdict.is_tie, verdict.expected) == (False, False, " one two three")


def test_an_answer_that_parts_at_a_tie_is_told_apart_from_a_wrong_one() -> None:
    tied = replace(REFERENCE, gaps=[0.5, 1e-5, 0.3, 0.2])
    assert judge(replace(RIGHT, text=" one too three"), tied).is_tie
    assert not judge(replace(RIGHT, text=" won too three"), tied).is_tie


def test_a_text_that_ends_by_itself_ends_with_stop() -> None:
    ended = replace(REFERENCE, texts=[" one", " one two", " one two"], gaps=[1, 1, 1], ended=True)
    assert judge(replace(RIGHT, text=" one two", finish_reason="stop"), ended).is_right
    assert not judge(replace(RIGHT, text=" one two"), ended).is_right
    shorter = replace(RIGHT, ask=replace(ASK, max_tokens=2), text=" one two", tokens=2)
    assert judge(shorter, ended).is_right  # it was cut off before


def test_percentiles_lie_between_neighbours() -> None:
    assert percentiles([float(n) for n in range(101)]) == {"p50": 50, "p90": 90, "p99": 99, "most": 100}
    assert percentiles([2.0]) == {"p50": 2, "p90": 2, "p99": 2, "most": 2}
    assert percentiles([]) == {}


def test_lost_and_wrong_are_counted_and_what_had_to_fail_is_not() -> None:
    memory = [(0.0, 100), (1.0, 200), (2.0, 500), (3.0, 400), (4.0, 300)]
    stream = replace(ASK, stream=True, leaves=True)
    spoilt = replace(ASK, adapter="bad")
    outcomes = [
        RIGHT,
        replace(RIGHT, text="x"),
        replace(RIGHT, status=None, error="APIConnectionError"),
        replace(RIGHT, status=429, error="busy"),
        Outcome(stream, 1.0, 1.5, 1.5, 200, left=True),
        Outcome(spoilt, 1.0, 1.1, None, 500, error="adapter_unusable"),
        Outcome(spoilt, 1.0, 1.1, None, 504, error="late"),
    ]
    verdicts = [judge(o, REFERENCE) if o.status == 200 and not o.left else None for o in outcomes]
    found = summary(outcomes, verdicts, memory, (1.0, 3.0), FIGURES, frozenset({"bad"}))
    assert (found["requests"], found["whole_answers"], found["left"]) == (7, 2, 1)
    assert (found["lost"], found["errors"]) == (3, ["APIConnectionError", "busy", "late"])
    assert (found["compared"], found["wrong"], found["ties"]) == (2, 1, 0)
    assert found["tokens_per_second"] == 6 / 2
    assert found["latency"]["first_token"]["p50"] == 0.5
    assert found["memory_bytes"] == {"before": 100, "half_way": 500, "most": 500, "after": 300}


def test_the_kept_run_lost_nothing() -> None:
    root = Path(__file__).parents[2]
    result = json.loads((root / "benchmarks" / "results" / "serving-load.json").read_text())
    found = result["summary"]
    assert (found["requests"], found["whole_answers"], found["compared"]) == (400, 400, 400)
    assert (found["lost"], found["wrong"], found["exit_status"]) == (0, 0, 0)


def test_numbers_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--adapters", "--slots", "--requests", "--at-once"):
        with pytest.raises(SystemExit, match="2"):
            command.main([option, "0"])
        assert f"{option} is 0, must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_load_with_clients_that_leave_and_spoilt_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fastapi", reason="needs the extra [serve]")
    pytest.importorskip("openai", reason="needs the official client")
    output, picture = tmp_path / "result.json", tmp_path / "plot.png"
    sizes = ["--adapters", "12", "--slots", "4", "--held", "5", "--requests", "24", "--at-once", "8"]
    harsh = ["--leaving", "0.2", "--spoilt", "2", "--seed", "1"]
    assert command.main([*sizes, *harsh, "--output", str(output), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    found = result["summary"]
    assert found["lost"] == found["wrong"] == 0
    assert found["compared"] > 8
    assert found["left"] > 0
    assert found["for_spoilt_adapters"] > 0
    assert found["server"]["evictions"] > 0
    assert found["server"]["in_host_memory"] < 12
    assert found["server"]["running"] == found["server"]["slots_in_use"] == found["server"]["cache_tokens_held"] == 0
    assert found["memory_bytes"]["most"] > found["memory_bytes"]["before"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert command.main(["--show", str(output)]) == 0
    assert capsys.readouterr().out == printed == markdown(result) + "\n"
    plot(result, picture)
