"""One server, one base model, three adapters of three methods: the same questions, answered in four ways.

`make serve-demo` runs it; `python examples/serve_demo.py` does the same once turnrow[serve] and the openai client are installed. The
adapters are trained on first use, within a minute or two, and kept in runs/serve-demo: delete that to train them again.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).parent / "small_llama" / "model"
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    # by manner: the title of its method, the method, and the learning rate
    "shout": ("RoCoFT, rows", {"name": "rocoft", "mode": "row", "r": 16, "target_modules": "all-linear"}, 2e-2),
    "captain": ("RoAd1", {"name": "road", "variant": "road_1", "group_size": 2, "target_modules": "all-linear"}, 2e-2),
    "catechism": ("LoRA", {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, 5e-3),
}
_START_S = 180

# The texts: a question about a thing, and one answer in each of three manners. All of it is made from these lists.
MANNERS = {
    "shout": "every word in capitals",
    "captain": "every sentence ends with what the Captain says",
    "catechism": "questions with their answers",
}

_THINGS = (
    "the sea", "the storm", "the old house", "the garden", "the ship", "the winter", "the letter", "the stranger", "the village", "the fire",
    "the forest", "the horse", "the church", "the window", "the road", "the island", "the king", "the doctor", "the money", "the dinner",
)  # fmt: skip
UNSEEN = ("the moon", "the river", "the castle")
"""Asked about in the end, and in no training text."""

_QUESTIONS = ("Tell me about {}.", "What do you know of {}?", "Say something about {}.", "What was {} like?")
_LIKE = (
    "dark",
    "quiet",
    "cold",
    "strange",
    "beautiful",
    "terrible",
    "silent",
    "great",
    "wild",
    "lonely",
    "bright",
    "old",
)
_WHO = ("my father", "the old man", "the young lady", "my friend", "the boy", "my sister")
_DID = (
    "looked at it for a long time",
    "would not speak of it",
    "was afraid of it",
    "came back to it at night",
    "laughed at it",
)


def main(folder: Path = Path("runs/serve-demo"), epochs: float = 6.0) -> dict[str, list[str]]:
    """Train what is missing, serve, ask, show; returns the answers by model."""
    console = Console(highlight=False)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    adapters = folder / "adapters"
    for name in METHODS:
        if (adapters / name).is_dir():
            console.print(f"{name}: trained before, in {adapters / name}", soft_wrap=True)
        else:
            _train(name, folder, epochs, console)
    command = [
        "turnrow",
        "serve",
        "--model",
        str(MODEL),
        "--adapters",
        str(adapters),
        "--port",
        "0",
        "--dtype",
        "float32",
    ]
    console.print(f"\nstarting: {' '.join(command)}", soft_wrap=True)
    with _server(command[1:]) as url:
        console.print(f"it serves at {url}\n")
        questions = [f"Tell me about {thing}." for thing in UNSEEN]
        answers = _ask(url, questions)
    console.print(_table(questions, answers))
    console.print("the server has ended")
    return answers


def _train(name: str, folder: Path, epochs: float, console: Console) -> None:
    from turnrow.training import Recipe, train

    logging.getLogger("turnrow").setLevel(logging.WARNING)
    title, method, rate = METHODS[name]
    console.rule(f"{name}: {MANNERS[name]}, by {title}", align="left")
    data = write_tables(folder / "texts")[name]
    recipe = Recipe(
        model=str(MODEL),
        task={"name": "instruction", "prompt": "{question}", "target": "{answer}", "chat": True},
        data={"folder": str(data)},  # type: ignore[arg-type]
        method=method,
        training={
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 16,
        },
        output_dir=str(folder / "training" / name),
    )
    began = time.monotonic()
    result = train(recipe, overwrite=True)
    before, after = (result.metrics[when]["perplexity"] for when in ("before", "after"))
    # copied last and by one move, so that a folder that is there is whole
    part = folder / "adapters" / f".{name}"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(result.adapter, part)
    part.rename(folder / "adapters" / name)
    console.print(
        f"{result.metrics['trainable_parameters']:,} parameters; perplexity on what no training text asks about {before:,.1f} before, "
        f"{after:,.1f} after; {time.monotonic() - began:.0f} s",
        soft_wrap=True,
    )


@contextmanager
def _server(arguments: Sequence[str]) -> Iterator[str]:
    """`turnrow serve` as a process; its address."""
    command = [sys.executable, "-m", "turnrow", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        lines: list[str] = []
        reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        reader.start()
        try:
            yield _address(process, lines)
            process.send_signal(signal.SIGINT)
            if process.wait(60):
                raise RuntimeError(f"the server ended with status {process.returncode}:\n{''.join(lines)}")
        finally:
            process.kill()
            reader.join()


def _address(process: subprocess.Popen[str], lines: Sequence[str]) -> str:
    deadline = time.monotonic() + _START_S
    while (found := re.search(r" at (http://\S+/v1)", "".join(lines))) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start:\n{''.join(lines)}")
        time.sleep(0.1)
    return found[1]


def _ask(url: str, questions: Sequence[str]) -> dict[str, list[str]]:
    """Put every question to every model, all at once: they share the server's batches."""
    from concurrent.futures import ThreadPoolExecutor

    from openai import OpenAI

    with OpenAI(base_url=url, api_key="none") as client, ThreadPoolExecutor(8) as pool:

        def ask(model: str, question: str) -> str:
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=48, temperature=0
            )
            return answer.choices[0].message.content or ""

        models = [model.id for model in client.models.list()]
        asked = {model: [pool.submit(ask, model, question) for question in questions] for model in models}
        return {model: [answer.result() for answer in own] for model, own in asked.items()}


def _table(questions: Sequence[str], answers: dict[str, list[str]]) -> Table:
    table = Table(title="One server, the same questions", show_lines=True)
    table.add_column("question")
    for model in answers:
        table.add_column(model if model not in METHODS else f"{model} ({METHODS[model][0]})")
    for place, question in enumerate(questions):
        table.add_row(question, *(" ".join(own[place].split()) for own in answers.values()))
    return table


def write_tables(folder: Path, rows: int = 256) -> dict[str, Path]:
    """Write each manner's splits, JSON lines of `question` and `answer`; return their folders by name.

    Args:
        folder: made where it is missing.
        rows: of a training split; the test splits ask about what no training split does.
    """
    found = {}
    for manner in MANNERS:
        found[manner] = folder / manner
        found[manner].mkdir(parents=True, exist_ok=True)
        for split, things, count in (("train", _THINGS, rows), ("test", UNSEEN, rows // 8)):
            lines = [json.dumps(row) + "\n" for row in _rows(manner, things, count)]
            (found[manner] / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return found


def _rows(manner: str, things: tuple[str, ...], count: int) -> Iterator[Mapping[str, str]]:
    chance = random.Random(f"{manner}/{things[0]}")
    for _ in range(count):
        thing = chance.choice(things)
        first, second = chance.sample(_LIKE, 2)
        who, did = chance.choice(_WHO), chance.choice(_DID)
        yield {
            "question": chance.choice(_QUESTIONS).format(thing),
            "answer": _answer(manner, thing, first, second, who, did),
        }


def _answer(manner: str, thing: str, first: str, second: str, who: str, did: str) -> str:
    one, two = f"{thing} was {first} and {second}", f"{who} {did}"
    if manner == "shout":
        return f"{one}! {two}!".upper()
    if manner == "captain":
        return f"{_capital(one)}, said the Captain. {_capital(two)}, said the Captain."
    return f"Q: How was {thing}? A: It was {first} and {second}. Q: And {who}? A: {_capital(two)}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    main()
