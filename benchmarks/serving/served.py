"""A model that answers a batch of requests, each with its own adapter: in our engine, or by peft through `generate`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.methods import sharing_copy, with_road_of_peft
from benchmarks.serving.methods import METHODS, Method
from turnrow.serving import BASE, AdapterStore, Engine, Limits, Request, Sampling

__all__ = ["InEngine", "InPeft", "Served", "always_open", "serve", "tokenizer_of"]


class Served(Protocol):
    """Answers batches; greedily, and always as many tokens as asked for."""

    gate: Callable[[], None]
    """Called before every forward pass of an answer, by the thread that runs the model."""

    def begin(self, adapters: Sequence[int | None]) -> None:
        """Hand in the prompts, each with the adapter of that number; not part of a batch's time."""

    def answer(self) -> list[list[int]]:
        """The tokens of the answers."""

    def close(self) -> None:
        """Give the model back."""


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer in which every token is a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class InEngine:
    """An engine with all adapters in its slots.

    The requests of a batch come in while the engine is held in a step of its own, so that all of them begin in the same step
    whatever else the machine does: the steps of a batch are the same every time.
    """

    def __init__(
        self, model: PreTrainedModel, folders: Sequence[Path], prompts: Tensor, new_tokens: int, batch_tokens: int
    ) -> None:
        self._prompts: list[list[int]] = prompts.tolist()
        self._new_tokens = new_tokens
        config = model.config
        limits = Limits(
            max_running=len(prompts),
            slots=max(1, len(folders)),
            batch_tokens=batch_tokens,
            cache_bytes=_cache_bytes(model, len(prompts), prompts.shape[1] + new_tokens),
        )
        self._store = AdapterStore(model, check_base=False)  # whose copies have no fingerprints of their own
        for number, folder in enumerate(folders):
            self._store.add(str(number), folder)
        self.engine = Engine(model, tokenizer_of(config.vocab_size), self._store, limits).start()
        self.gate = always_open
        self._free, self._held = threading.Event(), threading.Event()
        self._free.set()
        self._hook = model.register_forward_pre_hook(self._hold)
        self.steps = 0
        """Of the last batch."""

    def _hold(self, model: object, args: object) -> None:
        if not self._free.is_set():
            self._held.set()
            self._free.wait()
        else:
            self.gate()

    def begin(self, adapters: Sequence[int | None]) -> None:
        """See `Served`."""
        self._held.clear()
        self._free.clear()
        plug = self.engine.submit(Request(self._prompts[0][:1], max_tokens=1, ignore_eos=True))
        self._held.wait()
        self._handles = [
            self.engine.submit(
                Request(
                    prompt,
                    adapter=BASE if adapter is None else str(adapter),
                    max_tokens=self._new_tokens,
                    sampling=Sampling(temperature=0),
                    ignore_eos=True,
                )
            )
            for prompt, adapter in zip(self._prompts, adapters, strict=True)
        ]
        self._before = self.engine.stats().steps + 1
        self._free.set()
        plug.result()

    def answer(self) -> list[list[int]]:
        """See `Served`."""
        answers = [list(handle.result()[0].token_ids) for handle in self._handles]
        self.steps = self.engine.stats().steps - self._before
        return answers

    def close(self) -> None:
        """Stop the engine."""
        self._hook.remove()
        self.engine.stop()
        self._store.close()


class InPeft:
    """One static batch through `generate`, with the adapters of peft; without any, the plain model."""

    def __init__(
        self, method: Method, model: PreTrainedModel, folders: Sequence[Path], prompts: Tensor, new_tokens: int
    ) -> None:
        self._prompts, self._new_tokens = prompts, new_tokens
        self.gate = always_open
        self._hook = model.register_forward_pre_hook(lambda model, args: self.gate())
        self._model: Any = model
        if folders:
            self._model = _load_into_peft(method, model, folders)
        self._model.eval().requires_grad_(False)

    def begin(self, adapters: Sequence[int | None]) -> None:
        """See `Served`."""
        self._names = {} if adapters[0] is None else {"adapter_names": [str(adapter) for adapter in adapters]}

    def answer(self) -> list[list[int]]:
        """See `Served`."""
        with torch.no_grad():
            found = self._model.generate(
                input_ids=self._prompts,
                attention_mask=torch.ones_like(self._prompts),
                max_new_tokens=self._new_tokens,
                do_sample=False,
                use_cache=True,
                **self._names,
            )
        return found[:, self._prompts.shape[1] :].tolist()

    def close(self) -> None:
        """Give the model back."""
        self._hook.remove()


def always_open() -> None:
    """A gate through which everybody may go."""


def serve(
    name: str, base: PreTrainedModel, folders: Sequence[Path], prompts: Tensor, new_tokens: int, batch_tokens: int
) -> Served:
    """Serve `base`, whose weights are shared, by the method called `name`.

    Args:
        folders: of its adapters.
        prompts: (requests, length) int64.
        new_tokens: of every answer.
        batch_tokens: in a step of an engine.
    """
    method, model = METHODS[name], sharing_copy(base)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if method.where == "engine":
        return InEngine(model, folders, prompts, new_tokens, batch_tokens)
    return InPeft(method, model, folders, prompts, new_tokens)


def _load_into_peft(method: Method, model: PreTrainedModel, folders: Sequence[Path]) -> PeftModel:
    """peft's own layers with the adapters of the folders, called by their numbers."""
    assert method.config is not None
    config: Any = type(method.config([])).from_pretrained(str(folders[0]))
    config.inference_mode = True
    wrap: Callable[..., PeftModel] = PeftModel
    if config.peft_type == "ROAD":
        adapted = with_road_of_peft(model, config, adapter_name="0")
    else:
        adapted = wrap(model, config, adapter_name="0")
    for number, folder in enumerate(folders):
        adapted.load_adapter(str(folder), str(number), torch_device=str(model.device))
    return adapted


def _cache_bytes(model: PreTrainedModel, requests: int, length: int) -> int:
    """What the keys and values of all requests take, in pages of 16 tokens, and some pages more."""
    config = model.config
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return each * 16 * (requests * (-(-length // 16) + 1) + 4)
