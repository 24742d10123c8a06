"""``POST /v1/chat/completions``: what the model says next in a chat."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from turnrow.serving.http.bodies import ChatBody, read_body
from turnrow.serving.http.generation import Choice, Wanted, requests_of, respond
from turnrow.serving.http.pieces import chat_logprobs
from turnrow.serving.http.service import record_of, service_of
from turnrow.serving.http.tokens import TokenTexts

__all__ = ["router"]

router = APIRouter(prefix="/v1")


@router.post("/chat/completions")
async def chat(http: Request) -> Response:
    """Go on with a chat."""
    service = service_of(http)
    body = await read_body(http, ChatBody, service.settings.max_body_bytes, service.settings.body_timeout_s)
    adapter = service.adapter(body.model, record_of(http))
    most, logprobs = body.most_tokens(), body.wanted_logprobs()
    prompt = await service.prompts.of_chat(body.messages)
    requests = requests_of(
        service, body, [prompt], adapter=adapter, max_tokens=most, logprobs=logprobs, param="messages"
    )
    return await respond(http, Wanted(body, requests, _Form(service.texts)))


class _Form:
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def of_whole(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish_reason,
        }

    def of_chunk(self, choice: Choice) -> list[dict[str, Any]]:
        """The role comes first, by itself, and the reason of the end last."""
        chunks = []
        if choice.is_first:
            chunks.append(_chunk(choice, {"role": "assistant", "content": "", "refusal": None}))
        if choice.text or choice.tokens:
            chunks.append(_chunk(choice, {"content": choice.text}, logprobs=self._logprobs(choice)))
        if choice.finish_reason is not None:
            chunks.append(_chunk(choice, {}, finish_reason=choice.finish_reason))
        return chunks

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        return None if choice.tokens is None else chat_logprobs(choice.tokens, self._texts)


def _chunk(
    choice: Choice, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
