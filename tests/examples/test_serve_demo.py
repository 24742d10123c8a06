"""`make serve-demo`: its texts, and as a slow test the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.serve_demo import MANNERS, METHODS, UNSEEN, main, write_tables


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_texts_are_in_their_manner_and_the_same_every_time(tmp_path: Path) -> None:
    folders = write_tables(tmp_path / "one", rows=64)
    again = write_tables(tmp_path / "two", rows=64)
    assert set(folders) == set(MANNERS) == set(METHODS)
    for manner, folder in folders.items():
        train, test = rows(folder, "train"), rows(folder, "test")
        assert (len(train), len(test)) == (64, 8)
        assert train == rows(again[manner], "train")
        for row in [*train, *test]:
            answer = row["answer"]
            if manner == "shout":
                assert answer == answer.upper()
            elif manner == "captain":
                assert all(part.endswith("said the Captain") for part in answer.removesuffix(".").split(". "))
            else:
                assert answer.count("Q: ") == answer.count("A: ") == 2


def test_what_is_asked_in_the_end_is_in_no_training_text(tmp_path: Path) -> None:
    for folder in write_tables(tmp_path, rows=64).values():
        trained = json.dumps(rows(folder, "train")).lower()
        assert not any(thing in trained for thing in UNSEEN)
        assert all(any(thing in row["question"] for thing in UNSEEN) for row in rows(folder, "test"))


@pytest.mark.slow
def test_the_demo_shows_four_manners_and_trains_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("fastapi", reason="needs the extra [serve]")
    pytest.importorskip("openai", reason="needs the official client")
    answers = main(tmp_path)
    assert set(answers) == {"base", *METHODS}
    assert all(answer == answer.upper() for answer in answers["shout"])
    assert all("said the Captain" in answer for answer in answers["captain"])
    assert all(answer.startswith("Q: ") and "A: " in answer for answer in answers["catechism"])
    assert not any("said the Captain" in answer or "Q: " in answer for answer in answers["base"])
    capsys.readouterr()
    assert main(tmp_path) == answers
    printed = capsys.readouterr().out
    assert printed.count("trained before") == 3
    assert "the server has ended" in printed
