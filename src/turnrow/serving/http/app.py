"""The application: the routes around an engine."""

from __future__ import annotations

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from turnrow.serving.engine import Engine
from turnrow.serving.http import adapters, chat, completions, models
from turnrow.serving.http.access import may_use
from turnrow.serving.http.errors import add_handlers
from turnrow.serving.http.service import Service, service_of
from turnrow.serving.http.settings import ServerSettings
from turnrow.serving.http.watching import Watch

__all__ = ["create_app"]

_outside = APIRouter()


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """An ASGI application that answers in the forms of OpenAI's API.

    Args:
        engine: started, or to be started before the first request. Whoever started it stops it.
        settings: of the HTTP side.

    Raises:
        UserError: an adapter has the base model's own name.
    """
    app = FastAPI(title="turnrow", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service = service = Service.of(engine, settings)
    add_handlers(app)
    for routes in (models, completions, chat, adapters):
        app.include_router(routes.router, dependencies=[Depends(may_use)])
    app.include_router(_outside)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(Watch, service=service)
    return app


@_outside.get("/health")
async def health(http: Request) -> Response:
    """200 while requests are taken, else 503."""
    state = service_of(http).engine.stats().state
    return JSONResponse({"status": state}, 200 if state == "running" else 503)


@_outside.get("/metrics")
async def metrics(http: Request) -> Response:
    """Figures for Prometheus."""
    return Response(service_of(http).metrics.text(), media_type="text/plain; version=0.0.4")
