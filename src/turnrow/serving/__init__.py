"""Serve one model with any number of adapters to many clients at once, each request as if it were served alone::

    store = AdapterStore(model, "adapters")          # names -> folders; on disk, in host memory
    store.add_folder()
    with Engine(model, tokenizer, store) as engine:  # or: with EngineConfig("path/to/model", "adapters").load() as engine
        handle = engine.submit(Request(prompt_ids, adapter="french", max_tokens=32))
        for event in handle:                         # or: async for event in handle
            print(event.text, end="")

**Layers of the room.** `requests` and `handle` are what clients see; `text` makes whole characters of tokens. `store` knows adapters by
name and reads them (a thread of its own). `batch` holds the adapters that run in slots on the device and applies them to the tokens of a
step. `engine` decides who runs, drives transformers' continuous batching step by step, and samples. Only `engine` touches
transformers' internals, in `engine.continuous` (and the paged cache's `update` in `engine.attention`).

**A step.** The engine's thread (1) hears of new, cancelled and late requests, (2) admits waiting answers whose adapters lie in slots
or can be put there, (3) lets transformers choose the tokens of the step: those of all requests lie in one packed row, prompts split
where they are long, (4) runs the model, where forward hooks apply to every token what its own adapter brings (`ops.packed`), (5)
chooses every request's next token by its own settings, (6) hands out events. Loading an adapter from disk happens beside; putting it
into a slot happens between two steps.

**What holds.** Tokens and log-probabilities of a request are those of the request alone with its adapter merged, to rounding, whatever
is served beside it. A request keeps the version of its adapter that was current when it began to run. NaN in one request cannot reach
another: no operation mixes the rows of two requests (which is why attention is our own), and a request with logits that are not finite
fails alone. Every request that was accepted ends, with its last event or an error, also when the engine is stopped or breaks down.
Prefix sharing is off: the same prompt has other keys under another adapter.
"""

from __future__ import annotations

from turnrow.serving.engine import Engine, EngineStats, Limits
from turnrow.serving.handle import Answer, Handle
from turnrow.serving.requests import Event, QueueFull, Request, RequestFailed, Sampling, TokenLogprob, Usage
from turnrow.serving.starting import EngineConfig
from turnrow.serving.store import BASE, AdapterStore

__all__ = [
    "BASE",
    "AdapterStore",
    "Answer",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Event",
    "Handle",
    "Limits",
    "QueueFull",
    "Request",
    "RequestFailed",
    "Sampling",
    "TokenLogprob",
    "Usage",
]
