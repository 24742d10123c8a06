"""``POST /v1/completions``: what follows a prompt."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from turnrow.serving.http.bodies import CompletionBody, read_body
from turnrow.serving.http.errors import ApiError
from turnrow.serving.http.generation import Choice, Wanted, requests_of, respond
from turnrow.serving.http.pieces import completion_logprobs
from turnrow.serving.http.service import record_of, service_of
from turnrow.serving.http.tokens import TokenTexts

__all__ = ["router"]

router = APIRouter(prefix="/v1")

_MAX_TOKENS = 16
"""As with OpenAI, where a completion does not say."""


@router.post("/completions")
async def complete(http: Request) -> Response:
    """Complete one or several prompts."""
    service = service_of(http)
    body = await read_body(http, CompletionBody, service.settings.max_body_bytes, service.settings.body_timeout_s)
    adapter = service.adapter(body.model, record_of(http))
    if body.echo and body.logprobs is not None:
        raise ApiError(
            400,
            "echo with logprobs would need log-probabilities of the prompt, which this server does not compute: leave one of them out",
            param="echo",
            code="unsupported_parameter",
        )
    prompts = await service.prompts.of_completion(body.prompt)
    requests = requests_of(
        service,
        body,
        prompts,
        adapter=adapter,
        max_tokens=_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        param="prompt",
    )
    prefixes = [await service.prompts.text(prompt) for prompt in prompts] if body.echo else []
    return await respond(http, Wanted(body, requests, _Form(service.texts), prefixes))


class _Form:
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def of_whole(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": None if choice.tokens is None else completion_logprobs(choice.tokens, self._texts),
            "finish_reason": choice.finish_reason,
        }

    def of_chunk(self, choice: Choice) -> list[dict[str, Any]]:
        if not choice.text and not choice.tokens and choice.finish_reason is None:
            return []
        return [self.of_whole(choice)]
