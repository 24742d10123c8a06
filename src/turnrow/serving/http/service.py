"""What the routes share: the engine, and what is known of its model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from turnrow import __version__
from turnrow.errors import UserError, near_matches
from turnrow.serving.engine import Engine
from turnrow.serving.http.errors import ApiError
from turnrow.serving.http.metrics import Metrics
from turnrow.serving.http.prompts import Prompts
from turnrow.serving.http.settings import ServerSettings
from turnrow.serving.http.tokens import TokenTexts
from turnrow.serving.store.names import BASE

__all__ = ["Record", "Service", "record_of", "service_of"]

_MOST_NAMES_TO_COMPARE = 1000
"""With more names, which one is nearest takes longer than a wrong name is worth."""


@dataclass
class Record:
    """What becomes of one HTTP request, for the log and the metrics."""

    request_id: str
    model: str | None = None
    """A name that exists."""
    model_kind: str = "none"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: int | None = None
    """In place of the one that was sent: 499 if the client had gone, 500 and more if a stream broke off."""


@dataclass(frozen=True, eq=False)
class Service:
    """A server's parts; one for each application."""

    engine: Engine
    settings: ServerSettings
    metrics: Metrics
    prompts: Prompts
    texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))
    """s since 1970."""

    @classmethod
    def of(cls, engine: Engine, settings: ServerSettings) -> Service:
        """Of a started engine.

        Raises:
            UserError: an adapter has the base model's own name.
        """
        if settings.base_name in engine.store:
            raise UserError(
                f"the base and an adapter are both called {settings.base_name!r}: give the base another name, --served-model-name"
            )
        return cls(engine, settings, Metrics(engine), Prompts(engine.tokenizer), TokenTexts(engine.tokenizer))

    def adapter(self, model: str, record: Record) -> str:
        """The store's name for what a client calls the model: that of an adapter, or `BASE`.

        Raises:
            ApiError: 404, there is none.
        """
        if model in (BASE, self.settings.base_name):
            record.model, record.model_kind = BASE, "base"
            return BASE
        store = self.engine.store
        if model not in store:
            names = store.names()
            near = near_matches(model, [*names, BASE]) if len(names) <= _MOST_NAMES_TO_COMPARE else ""
            shown = model if len(model) <= 128 else f"{model[:125]}..."
            raise ApiError(
                404,
                f"there is no model {shown!r}{near}; GET /v1/models lists them",
                param="model",
                code="model_not_found",
            )
        record.model, record.model_kind = model, "adapter"
        return model

    def fingerprint(self, adapter_version: int | None) -> str:
        """What beside the seed decides on an answer: our version, and that of the adapter's files."""
        return f"turnrow-{__version__}" + ("" if adapter_version is None else f"-adapter-{adapter_version}")


def service_of(request: Request) -> Service:
    """Of the application that serves the request."""
    return request.app.state.service


def record_of(request: Request) -> Record:
    """Of a request."""
    return request.scope["turnrow"]
