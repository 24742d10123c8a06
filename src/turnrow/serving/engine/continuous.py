"""The one place that touches transformers' continuous batching: its scheduler and its paged cache, driven step by step.

Its own loop freezes the settings of sampling with the first request and knows nothing of adapters, so that of its parts only these
are used (pinned by `tests/serving/engine/test_continuous.py`, on the oldest and newest transformers that we support):

    model.init_continuous_batching(...)                         the manager, of which the configuration is resolved
    manager._create_batch_processor()                           with the cache, the scheduler and the tensors of a step
    processor.scheduler.{add_waiting_request, finish_request, block_new_requests, active_requests, waiting_requests}
    processor.prepare_next_batch()                              chooses the requests of a step, gives them pages of the cache
    processor.inputs_and_outputs.{requests_in_batch, get_model_kwargs, output_ids, compute_stream}
    processor.update_batch()                                    gives the requests their tokens
    RequestState, ContinuousBatchingConfig

Prefix sharing is off: it goes by the tokens alone, and the same prompt has other keys under another adapter. So are CUDA graphs
and asynchronous batching, which do not run our hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from turnrow.errors import UserError
from turnrow.serving.engine.attention import ATTENTION, AttentionPlan, register

__all__ = ["ContinuousBatching", "Scheduled", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """How much memory continuous batching may use."""

    page_tokens: int
    """Tokens in a page of the cache, the unit in which requests get it."""
    pages: int
    batch_tokens: int
    """The most tokens in a step."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.page_tokens * self.pages


@dataclass(frozen=True)
class Scheduled:
    """A request in a step."""

    request_id: str
    length: int
    """Its tokens in the step."""
    has_logits: bool
    """Its prompt is read to the end, so that it gets a token."""


class ContinuousBatching:
    """A model with a paged cache, run one step at a time: `prepare`, `forward`, `commit`. Belongs to one thread.

    Raises:
        UserError: continuous batching does not run this model.
    """

    def __init__(self, model: Any, sizes: Sizes) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        self.model = model.eval()
        self._attention = model.config._attn_implementation
        softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        if softcap is not None:
            raise UserError(
                f"{type(model).__name__} caps the logits of attention, which the server's attention does not do"
            )
        register()
        known = inspect.signature(ContinuousBatchingConfig).parameters
        settings: dict[str, Any] = {
            ("page_size" if "page_size" in known else "block_size"): sizes.page_tokens,
            "num_blocks": sizes.pages,
            "max_batch_tokens": sizes.batch_tokens,
            "max_blocks_per_request": 0,
            "allow_block_sharing": False,
            "use_async_batching": False,
            "use_cuda_graph": False,
        }
        if "auto_switch_to_flash" in known:
            settings["auto_switch_to_flash"] = False
        try:
            manager = model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(**settings),
            )
            model.set_attn_implementation(ATTENTION)
            if model.config.get_text_config()._attn_implementation != ATTENTION:
                raise UserError(
                    f"the attention of {type(model).__name__} cannot be exchanged, which continuous batching needs"
                )
            self._processor: Any = manager._create_batch_processor()
            kind: Any = type(self._processor)
            self._processor.__class__ = _ending_quietly(kind)
            self._check_windows()
            self._io: Any = self._processor.inputs_and_outputs
            self._scheduler: Any = self._processor.scheduler
            self._head_sees_kept = bool(getattr(model, "_supports_logits_to_keep", lambda: False)())
            self._try_a_step()
        except Exception as error:  # a model may fail in any way at what it was not written for
            self.close()
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"continuous batching does not run {type(model).__name__} here: {type(error).__name__}: {error}"
            ) from error

    def _check_windows(self) -> None:
        cache = self._processor.cache
        if not hasattr(cache, "cache_allocators") and bool(getattr(cache, "num_sliding_attention_groups", 0)):
            raise UserError(
                f"{type(self.model).__name__} has layers with a sliding window, over which continuous batching in transformers "
                f"{transformers.__version__} computes something else than generate does: upgrade transformers (5.23 is right)"
            )

    @torch.no_grad()
    def _try_a_step(self) -> None:
        with self.stream:
            self.add("trial", [0, 0])
            logits = self.forward(self.prepare())
            self.commit(logits.argmax(-1))
            self.finish("trial")

    def close(self) -> None:
        """Give the model back as it was, and the cache's memory."""
        self.model.set_attn_implementation(self._attention)
        self._processor = self._io = self._scheduler = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def stream(self) -> AbstractContextManager[Any]:
        """In which all work on the device is to be done."""
        stream = self._io.compute_stream
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    @property
    def tokens_held(self) -> int:
        """Tokens in the cache."""
        return sum(state.position_offset for state in self._scheduler.active_requests.values())

    def add(self, request_id: str, prompt: Sequence[int]) -> None:
        """Let a request in; it takes part in the next steps until `finish`."""
        from transformers.generation.continuous_batching.requests import RequestState

        state = RequestState(request_id=request_id, initial_tokens=list(prompt), max_new_tokens=None)
        self._scheduler.add_waiting_request(state)

    def finish(self, request_id: str) -> None:
        """Take a request out, between two steps. Its pages are free at once."""
        scheduler = self._scheduler
        if scheduler.waiting_requests.pop(request_id, None) is not None:  # not begun, or set back for want of pages
            scheduler.waiting_requests_order.remove(request_id)
        scheduler.finish_request(request_id)
        # with a request set back, no new ones begin until another ends; ours end without transformers noticing
        scheduler.block_new_requests = False

    def prepare(self) -> list[Scheduled]:
        """Choose the requests of the next step; none if nothing is to be done."""
        if not self._processor.prepare_next_batch():
            return []
        return [
            Scheduled(future.state.request_id, future.query_length, future.has_new_token)
            for future in self._io.requests_in_batch
        ]

    def forward(self, scheduled: Sequence[Scheduled]) -> Tensor:
        """Run the model: logits (requests that have any, vocabulary), float32."""
        inputs = dict(self._io.get_model_kwargs(use_padding=False))
        count = sum(one.has_logits for one in scheduled)
        kept = inputs["logits_indices"][:count].long()
        if self._head_sees_kept:
            inputs["logits_to_keep"] = kept
        logits = self.model(**AttentionPlan(inputs).inputs(inputs)).logits[0]
        return (logits if self._head_sees_kept else logits.index_select(0, kept)).float()

    @property
    def head_sees_kept(self) -> bool:
        """Whether the head is given only the tokens that logits are asked of."""
        return self._head_sees_kept

    def commit(self, tokens: Tensor) -> None:
        """Give the requests of the step their tokens, (requests with logits,)."""
        self._io.output_ids[0, : len(tokens)].copy_(tokens)
        self._processor.update_batch()


@cache
def _ending_quietly(kind: type) -> type:
    """`kind`, a batch processor, without its own end, which collects the garbage of the whole process.

    That takes from a third of a second up, in which no other thread runs. Nothing of a processor lies in a cycle, so that the memory
    of its cache is free with the last reference to it.
    """
    return type(kind.__name__, (kind,), {"__del__": lambda self: None})
