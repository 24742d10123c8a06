"""The engine's thread: hear of requests, admit answers, run a step, hand out tokens; again and again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turnrow.serving.batch.adapter_layers import AdapterLayers
from turnrow.serving.batch.packing import PackedStep, Segment
from turnrow.serving.engine.admission import Admission
from turnrow.serving.engine.continuous import ContinuousBatching, Scheduled
from turnrow.serving.engine.ledger import Ledger
from turnrow.serving.engine.runs import Job, Run
from turnrow.serving.engine.sampling import choose
from turnrow.serving.requests import RequestFailed

__all__ = ["Figures", "Loop"]

_IDLE_S = 0.5
"""How long the thread sleeps at most when there is nothing to do."""

_MOST_EMPTY_STEPS = 1000
"""In a row, while requests run: then something is wrong, and it is better said than waited for."""


@dataclass
class Figures:
    """What the thread did and holds; read by others without a lock."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    running: int = 0
    cache_tokens_held: int = 0
    adapter_bytes: int = 0


class Loop:
    """Owns the model while it runs. All its methods are called by one thread."""

    def __init__(
        self,
        continuous: ContinuousBatching,
        layers: AdapterLayers,
        admission: Admission,
        ledger: Ledger,
        max_running: int,
    ) -> None:
        self._continuous, self._layers, self._admission, self._ledger = continuous, layers, admission, ledger
        self._max_running = max_running
        self._running: dict[str, Run] = {}
        self._step: PackedStep | None = None
        self._soonest: float | None = None
        """When the next deadline is, by the monotonic clock."""
        self.figures = Figures()

    def run(self) -> None:
        """Serve until the engine is stopped or breaks down. However it ends, no request is left without its end."""
        try:
            with torch.no_grad(), self._continuous.stream:
                self._serve()
        except BaseException as error:  # whatever it was, nobody may be left waiting
            self._ledger.change("broken", of=("running", "draining"), error=error)
        finally:
            for job in self._ledger.jobs():
                self._end(job, self._ledger.closed())
            self._layers.close()
            self._continuous.close()

    def _serve(self) -> None:
        empty = 0
        while True:
            self._ledger.wake.clear()  # before all is looked at: what comes later wakes
            if not self._ledger.serves:
                return
            self._hear()
            self._admit()
            scheduled = self._continuous.prepare() if self._running else []
            if scheduled:
                empty = 0
                self._one_step(scheduled)
            elif self._running:
                empty += 1  # one was set back for want of memory, and now there is some
                if empty > _MOST_EMPTY_STEPS:
                    raise RuntimeError(f"{len(self._running)} requests run, and none of them can be scheduled")
            else:
                self._ledger.wake.wait(self._until_deadline())

    # --- before a step -----------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """Take note of new requests, of those given up, and of deadlines."""
        ledger = self._ledger
        while ledger.new:
            job = ledger.new.popleft()
            job.heard = True
            self._admission.queue.extend(job.runs)
            if job.deadline is not None:
                self._soonest = job.deadline if self._soonest is None else min(job.deadline, self._soonest)
        while ledger.given_up:
            job = ledger.given_up.popleft()
            self._end(job, RequestFailed("cancelled", f"request {job.handle.request_id} was cancelled"))
        if self._soonest is not None and time.monotonic() >= self._soonest:
            self._end_late(time.monotonic())

    def _end_late(self, now: float) -> None:
        timed = [(job.deadline, job) for job in self._ledger.jobs() if job.deadline is not None and job.heard]
        for deadline, job in timed:
            if deadline <= now:
                text = f"request {job.handle.request_id} was not done within {job.request.timeout_s:g} s"
                self._end(job, RequestFailed("timeout", text))
        self._soonest = min((deadline for deadline, job in timed if not job.ended), default=None)

    def _until_deadline(self) -> float:
        return _IDLE_S if self._soonest is None else max(0.0, min(_IDLE_S, self._soonest - time.monotonic()))

    def _admit(self) -> None:
        room = self._max_running - len(self._running)
        if not room or not self._admission.queue:
            return
        admitted = self._admission.admit(room, lambda run, error: self._end(run.job, error))
        for run in admitted:
            self._continuous.add(run.id, run.stream.prompt_ids)
            self._running[run.id] = run
            self.figures.prompt_tokens += len(run.stream.prompt_ids)
        if admitted:
            self._ledger.stop_waiting(len(admitted))
            self.figures.adapter_bytes = self._layers.nbytes
            self._look()

    # --- a step ------------------------------------------------------------------------------------------------------

    def _one_step(self, scheduled: Sequence[Scheduled]) -> None:
        runs = [self._running[one.request_id] for one in scheduled]
        segments = [Segment(run.job.slot, one.length, one.has_logits) for run, one in zip(runs, scheduled, strict=True)]
        sees_kept = self._continuous.head_sees_kept
        self._step = PackedStep.of(segments, self._layers.device, self._step, head_sees_kept=sees_kept)
        self._layers.step = self._step
        try:
            logits = self._continuous.forward(scheduled)
        finally:
            self._layers.step = None
        self.figures.steps += 1
        answering = [run for run, one in zip(runs, scheduled, strict=True) if one.has_logits]
        if not answering:  # all of it was the beginning of prompts
            self._continuous.commit(torch.empty(0, dtype=torch.int64))
            return
        sampled = choose(logits, [run.stream for run in answering])
        self._continuous.commit(sampled.tokens)
        self.figures.generated_tokens += len(answering)
        for i, (run, token) in enumerate(zip(answering, sampled.tokens.tolist(), strict=True)):
            if run.job.ended:  # another answer of its request has failed just now
                continue
            if not sampled.finite[i]:
                text = f"{run.job.adapter} made the model compute NaN or infinite logits"
                self._end(run.job, RequestFailed("not_finite", text))
                continue
            event = run.take(token, sampled.logprobs[i])
            if event.finish_reason is not None:
                self._take_out(run)
                self._ledger.count(event.finish_reason)
            run.job.handle.put(event)
            if event.finish_reason is not None:
                run.job.answered += 1
                if run.job.answered == run.job.request.n:
                    self._forget(run.job)  # after its last event, for who waits for it to be gone reads that
        self._look()

    # --- ends --------------------------------------------------------------------------------------------------------

    def _end(self, job: Job, error: RequestFailed) -> None:
        """Fail a request, unless it has ended: its answers stop to run or to wait."""
        if job.ended:
            return
        waiting = 0 if job.heard else job.request.n
        for run in job.runs:
            if run.id in self._running:
                self._take_out(run)
            elif run in self._admission.queue:
                self._admission.leave(run)
                waiting += 1
        self._ledger.stop_waiting(waiting)
        self._ledger.count(error.kind)
        job.handle.fail(error)
        self._forget(job)
        self._look()

    def _take_out(self, run: Run) -> None:
        del self._running[run.id]
        self._continuous.finish(run.id)

    def _forget(self, job: Job) -> None:
        job.ended = True
        self._admission.release(job)
        self._ledger.forget(job)

    def _look(self) -> None:
        self.figures.running = len(self._running)
        self.figures.cache_tokens_held = self._continuous.tokens_held
