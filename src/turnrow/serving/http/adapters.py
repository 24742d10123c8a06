"""``/v1/adapters``: which adapters there are; load, reload and unload them while the server runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from turnrow.errors import AdapterError, UserError
from turnrow.serving.http.access import may_manage
from turnrow.serving.http.bodies import LoadBody, read_body
from turnrow.serving.http.errors import ApiError
from turnrow.serving.http.service import Service, service_of
from turnrow.serving.store.adapters import AdapterStore, Entry
from turnrow.serving.store.names import check_name

__all__ = ["router"]

router = APIRouter(prefix="/v1")


@router.get("/adapters")
async def list_adapters(http: Request) -> dict[str, Any]:
    """Every adapter, and what is known of it."""
    store = service_of(http).engine.store
    found = (_if_there(store, name) for name in store.names())
    return {"object": "list", "data": [_described(entry) for entry in found if entry is not None]}


@router.post("/adapters", dependencies=[Depends(may_manage)])
async def load(http: Request) -> Response:
    """Load an adapter from a folder."""
    service = service_of(http)
    body = await read_body(http, LoadBody, service.settings.max_body_bytes, service.settings.body_timeout_s)
    try:
        check_name(body.name)
    except UserError as error:
        raise ApiError(400, str(error), param="name") from None
    if body.name in service.engine.store:
        raise ApiError(
            409,
            f"an adapter called {body.name!r} is loaded already: POST /v1/adapters/{body.name}/reload reads its files again",
            param="name",
            code="adapter_exists",
        )
    if body.name == service.settings.base_name:
        raise ApiError(400, f"{body.name!r} is the base model's own name", param="name")
    entry = await _aside(lambda: _load(service, body))
    return JSONResponse(_described(entry), status_code=201)


@router.post("/adapters/{name}/reload", dependencies=[Depends(may_manage)])
async def reload(http: Request, name: str) -> dict[str, Any]:
    """Read an adapter's files again. Answers that run keep what they began with."""
    store = service_of(http).engine.store
    _check_known(http, name)
    return _described(await _aside(lambda: store.reload(name)))


@router.delete("/adapters/{name}", dependencies=[Depends(may_manage)])
async def unload(http: Request, name: str) -> dict[str, Any]:
    """Forget an adapter. Requests that were accepted still run with it; its files stay."""
    store = service_of(http).engine.store
    _check_known(http, name)
    await _aside(lambda: store.remove(name))
    return {"id": name, "object": "adapter", "deleted": True}


def _load(service: Service, body: LoadBody) -> Entry:
    store, path = service.engine.store, body.path
    if path is not None and "\0" in path:
        raise ApiError(400, "path holds a zero byte", param="path")
    if path is None or not service.settings.any_path:
        return store.load(body.name, path)
    return store.add(body.name, Path(path) if store.root is None else store.root / path)


async def _aside(what: Callable[[], Any]) -> Any:
    """Do it in a thread: files are read."""
    try:
        return await run_in_threadpool(what)
    except AdapterError as error:
        raise ApiError(400, str(error), param="path", code="invalid_adapter") from None
    except UserError as error:
        raise ApiError(400, str(error), param="path") from None
    except OSError as error:  # a name that is too long, or no permission
        raise ApiError(400, f"the folder cannot be read: {error.strerror}", param="path") from None


def _if_there(store: AdapterStore, name: str) -> Entry | None:
    """The adapter, unless it was unloaded just now."""
    try:
        return store.get(name)
    except UserError:
        return None


def _check_known(http: Request, name: str) -> None:
    if name not in service_of(http).engine.store:
        raise ApiError(404, f"no adapter is called {name[:128]!r}", param="name", code="adapter_not_found")


def _described(entry: Entry) -> dict[str, Any]:
    version = entry.version
    return {
        "id": entry.name,
        "object": "adapter",
        "method": version.method,
        "version": version.number,
        "path": str(version.folder),
        "failure": version.failure,
    }
