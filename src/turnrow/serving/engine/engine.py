"""The engine: requests in, events out, one thread that runs the model for all of them."""

from __future__ import annotations

import itertools
import threading
from dataclasses import asdict, dataclass
from typing import Any

from turnrow.errors import UserError
from turnrow.serving.batch.adapter_layers import AdapterLayers
from turnrow.serving.engine.admission import Admission
from turnrow.serving.engine.continuous import ContinuousBatching
from turnrow.serving.engine.ledger import Ledger
from turnrow.serving.engine.limits import Limits
from turnrow.serving.engine.loop import Figures, Loop
from turnrow.serving.engine.runs import Job, Run
from turnrow.serving.engine.sampling import TokenStream
from turnrow.serving.handle import Handle
from turnrow.serving.requests import Request
from turnrow.serving.store.adapters import AdapterStore
from turnrow.serving.store.names import BASE
from turnrow.serving.text import AnswerText

__all__ = ["Engine", "EngineStats"]


@dataclass(frozen=True)
class EngineStats:
    """What an engine does and did. Counts are since its start."""

    state: str
    """starting, running, draining, stopped or broken."""
    running: int
    """Answers that are generated now."""
    waiting: int
    slots: int
    slots_filled: int
    slots_in_use: int
    adapter_bytes: int
    """Of the adapters' tables on the device."""
    adapters_put_in_slots: int
    cache_tokens: int
    """What the cache of keys and values holds at most."""
    cache_tokens_held: int
    steps: int
    prompt_tokens: int
    """Of requests that began to run, for each of their answers."""
    generated_tokens: int
    finished: dict[str, int]
    """Answers by `finish_reason`, and failed requests by the kind of `RequestFailed`."""
    store: dict[str, int]
    """See `AdapterStore.stats`."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


class Engine:
    """Serves a model with any number of adapters to any number of threads and tasks::

        with Engine(model, tokenizer, AdapterStore(model, "adapters")) as engine:
            handle = engine.submit(Request(prompt_ids, adapter="french", max_tokens=32))
            for event in handle:
                print(event.text, end="")

    Between `start` and `stop` the model belongs to the engine: its attention is another one then.

    Args:
        model: a causal language model of transformers, without adapters, in the dtype and on the device to serve it in.
        tokenizer: its tokenizer, which turns tokens into text.
        store: made for this very model.
        limits: how much to take on.

    Raises:
        UserError: the store is of another model, or the model cannot be served; see `ContinuousBatching` and `Limits.sizes`.
    """

    def __init__(self, model: Any, tokenizer: Any, store: AdapterStore, limits: Limits | None = None) -> None:
        if store.reader.model is not model:
            raise UserError("the store was made for another model: make it with the model that the engine serves")
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.limits = limits or Limits()
        self._sizes = self.limits.sizes(model)
        self.max_length = self.limits.longest(model, self._sizes)
        """The most tokens of a prompt and its answer together."""
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        self.end_tokens = _end_tokens(model, tokenizer)
        self._numbers = itertools.count(1)
        self._ledger = Ledger(self.limits.max_queue)
        self._layers = AdapterLayers(store.layers, next(model.parameters()).device)
        self._admission = Admission(store, self._layers, self.limits.slots, self.limits.max_overtaken)
        self._figures = Figures()
        self._continuous: ContinuousBatching | None = None
        self._thread: threading.Thread | None = None

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Start the engine's thread.

        Raises:
            UserError: it was started before, or continuous batching does not run the model.
        """
        if self._ledger.state != "starting":
            raise UserError("the engine was started before: make a new one")
        self._continuous = ContinuousBatching(self.model, self._sizes)
        loop = Loop(self._continuous, self._layers, self._admission, self._ledger, self.limits.max_running)
        self._figures = loop.figures
        self.store.on_loaded = self._ledger.wake.set
        self._ledger.change("running", of=("starting",))
        self._thread = threading.Thread(target=loop.run, name="turnrow-engine", daemon=True)
        self._thread.start()
        return self

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until those that were accepted have ended.

        Returns:
            Whether they have; after `timeout` (s) some may not have.
        """
        self._ledger.change("draining", of=("running",))
        return self._ledger.wait_until_empty(timeout)

    def stop(self) -> None:
        """End at once, failing what still runs or waits, and give the model back. Safe to call again."""
        self._ledger.change("stopped", of=("starting", "running", "draining"))
        if self._thread is not None:
            self._thread.join()
        self.store.on_loaded = lambda: None

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # --- for clients -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Handle:
        """Accept a request.

        Raises:
            UserError: its adapter is unknown, its tokens are none of the model's, or it is too long.
            QueueFull: too many wait.
            RequestFailed: the engine does not run (any more).
        """
        job = self._job(request)
        self._ledger.accept(job)
        return job.handle

    def stats(self) -> EngineStats:
        """What it does and did."""
        state, waiting, finished = self._ledger.figures()
        figures, slots = self._figures, self._admission.slots
        return EngineStats(
            state=state,
            running=figures.running,
            waiting=waiting,
            slots=slots.count,
            slots_filled=len(slots),
            slots_in_use=slots.pinned,
            adapter_bytes=figures.adapter_bytes,
            adapters_put_in_slots=self._admission.uploads,
            cache_tokens=self._sizes.cache_tokens,
            cache_tokens_held=figures.cache_tokens_held,
            steps=figures.steps,
            prompt_tokens=figures.prompt_tokens,
            generated_tokens=figures.generated_tokens,
            finished=finished,
            store=self.store.stats(),
        )

    # --- inside ----------------------------------------------------------------------------------------------------

    def _job(self, request: Request) -> Job:
        if request.n > self.limits.max_queue:
            raise UserError(f"n is {request.n}; this server takes up to {self.limits.max_queue} answers (max_queue)")
        prompt = [int(token) for token in request.prompt_ids]
        tokens = {
            "the prompt": prompt,
            "logit_bias": request.sampling.logit_bias,
            "stop_token_ids": request.stop_token_ids,
        }
        for where, used in tokens.items():
            outside = next((token for token in used if not 0 <= token < self.vocabulary), None)
            if outside is not None:
                raise UserError(f"{where} has the token {outside}; the model's are 0 to {self.vocabulary - 1}")
        if len(prompt) + request.max_tokens > self.max_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}; together they may be {self.max_length}"
            )
        entry = None if request.adapter == BASE else self.store.get(request.adapter)
        handle = Handle(f"r{next(self._numbers)}", len(prompt), request.n, lambda: self._ledger.give_up(job))
        deadline = None if request.timeout_s is None else handle.submitted + request.timeout_s
        ends = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else self.end_tokens)
        job = Job(request, handle, entry, deadline, ends)
        job.runs = [
            Run(
                job,
                index,
                TokenStream(request.sampling, prompt, request.logprobs, index),
                AnswerText(self.tokenizer, prompt, request.stop),
            )
            for index in range(request.n)
        ]
        return job


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: those of the generation settings, or else of the configuration and the tokenizer."""
    for holder in (getattr(model, "generation_config", None), model.config, tokenizer):
        ends = getattr(holder, "eos_token_id", None)
        if ends is not None:
            return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()
