"""``GET /v1/models``: the base model and every adapter."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from turnrow.serving.http.service import Service, record_of, service_of
from turnrow.serving.store.names import BASE

__all__ = ["router"]

router = APIRouter(prefix="/v1")


@router.get("/models")
async def list_models(http: Request) -> dict[str, Any]:
    """All names that `model` can have."""
    service = service_of(http)
    names = [BASE, *service.engine.store.names()]
    return {"object": "list", "data": [_model(service, name) for name in names]}


@router.get("/models/{model:path}")
async def get_model(http: Request, model: str) -> dict[str, Any]:
    """One of them."""
    service = service_of(http)
    return _model(service, service.adapter(model, record_of(http)))


def _model(service: Service, name: str) -> dict[str, Any]:
    base = service.settings.base_name
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "turnrow",
        "root": base if name == BASE else name,
        "parent": None if name == BASE else BASE,
        "max_model_len": service.engine.max_length,
    }
