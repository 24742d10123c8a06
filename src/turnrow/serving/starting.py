"""From names to an engine: what to serve and how, and the loading of it. The command line and every replica start here."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from turnrow.errors import UserError
from turnrow.pretrained import plain_errors, resolve_model, without_load_report
from turnrow.serving.engine import Engine, Limits
from turnrow.serving.store import AdapterStore

__all__ = ["DTYPES", "EngineConfig"]

DTYPES = ("auto", "float32", "bfloat16", "float16")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """All that it takes to make an engine; it can be sent to another process.

    Raises:
        UserError: `dtype` is none of `DTYPES`, or `host_bytes` is negative.
    """

    model: str
    """The base: a folder, a Hub id or ``package:NAME``."""
    adapters: str | None = None
    """Every subfolder with an adapter is served under its name."""
    dtype: str = "auto"
    """Of the weights; ``auto`` is that of the checkpoint."""
    device: str | None = None
    """None for ``cuda`` where there is one, else ``cpu``."""
    check_base: bool = True
    """Refuse adapters that were trained on another base."""
    host_bytes: int = 2 * 1024**3
    """For adapters in the memory of the host."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.host_bytes < 0:
            raise UserError(f"host_bytes is {self.host_bytes}; it must be 0 or more")

    def check(self) -> None:
        """See whether model, adapters' folder and device are there, before anything large is loaded.

        Raises:
            UserError: one is not.
        """
        if self.adapters is not None and not Path(self.adapters).is_dir():
            raise UserError(f"the adapters' folder {self.adapters!r} does not exist")
        try:
            torch.empty(0, device=self._device())
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"device is {self._device()!r}, which cannot be used: {reason}") from None
        with plain_errors(self.model):
            AutoConfig.from_pretrained(resolve_model(self.model))

    def load(self) -> Engine:
        """Load the model and look at its adapters; the engine is not started. Adapters that cannot be served are logged as warnings.

        Raises:
            UserError: no such model, folder or device; the model lacks weights, or cannot be served.
        """
        self.check()
        model, tokenizer = self._load_model()
        store = AdapterStore(model, self.adapters, host_bytes=self.host_bytes, check_base=self.check_base)
        if self.adapters is not None:
            for name, reason in store.add_folder().items():
                _log.warning("not served, %s: %s", name, reason)
        return Engine(model, tokenizer, store, self.limits)

    def _device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def _load_model(self) -> tuple[Any, Any]:
        location = resolve_model(self.model)
        loader: Any = AutoModelForCausalLM
        with plain_errors(self.model), without_load_report():
            model, loaded = loader.from_pretrained(
                location, dtype=self.dtype, device_map=self._device(), output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(location)
        if loaded["missing_keys"]:
            lacking = sorted(loaded["missing_keys"])
            raise UserError(
                f"model {self.model!r} is no whole {type(model).__name__}: it lacks {len(lacking)} weights, such as {lacking[0]!r}"
            )
        return model, tokenizer
