"""Ray Serve's deployments of the gateway and the replicas; for ``turnrow serve --replicas`` and for Serve's own files:

applications:
  - name: turnrow
    import_path: turnrow.serving.replicas.application:app
    args: {model: /models/llama, adapters: /models/adapters, replicas: 4}
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from turnrow.errors import UserError, near_matches
from turnrow.serving.engine import Limits
from turnrow.serving.http import ServerSettings
from turnrow.serving.http.errors import ApiError
from turnrow.serving.replicas.board import PERIOD_S, BoardLike, Change, Report
from turnrow.serving.replicas.calls import Call
from turnrow.serving.replicas.gateway import Ask, Gateway
from turnrow.serving.replicas.replica import Replica
from turnrow.serving.starting import EngineConfig

__all__ = ["app", "build"]

_GATEWAY = "Gateway"
_SILENT_S = 30
"""A replica that does not answer for so long is replaced."""
_ENDING_S = 10
"""So long a process may take to end."""
_MANY = 100_000
"""Requests that the gateway may have open: what limits them are the replicas."""

_log = logging.getLogger(__name__)


def build(
    config: EngineConfig, settings: ServerSettings, *, replicas: int = 1, cpus: float = 1, gpus: float = 0
) -> Application:
    """An application for `ray.serve.run`.

    Args:
        config: of every replica; its paths must lead to the same on every machine.
        settings: of the HTTP side.
        replicas: how many.
        cpus: that a replica takes, also the number of its threads.
        gpus: that a replica takes.

    Raises:
        UserError: a number is out of range.
    """
    if replicas < 1:
        raise UserError(f"replicas is {replicas}; it must be at least 1")
    if cpus < 0 or gpus < 0:
        raise UserError(f"cpus is {cpus} and gpus {gpus}; they must be 0 or more")
    limits = config.limits

    class _Replica(Replica):
        def __init__(self) -> None:
            _log_to_stderr()
            context = serve.get_replica_context()
            super().__init__(context.replica_id.unique_id, config, settings, _Board(context.app_name))

        @serve.multiplexed(max_num_models_per_replica=limits.slots)
        async def hold(self, adapter: str) -> str:
            return adapter

        def __del__(self) -> None:
            if hasattr(self, "engine"):  # the model could be loaded
                self.close()

    class _Gateway(Gateway):
        def __init__(self, handle: DeploymentHandle) -> None:
            _log_to_stderr()
            super().__init__(_ask_of(handle), settings, replicas)

        async def since(self, number: int) -> list[Change]:
            return self.board.since(number)

        async def restore(self, changes: Sequence[Change]) -> None:
            self.board.restore(changes)

        async def report(self, report: Report) -> int:
            return self.board.report(report)

    served = serve.deployment(
        name="Replica",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # a few wait at the replica, so that it never idles; the others are free to go where there is room first
        max_ongoing_requests=limits.max_running + max(4, limits.max_running // 4),
        max_queued_requests=limits.max_queue,
        health_check_period_s=PERIOD_S,
        health_check_timeout_s=_SILENT_S,
        graceful_shutdown_timeout_s=_ENDING_S,
    )(_Replica)
    gateway = serve.deployment(
        name=_GATEWAY,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY,
        graceful_shutdown_timeout_s=_ENDING_S,
    )(_Gateway)
    return gateway.bind(served.bind())


def app(args: Mapping[str, Any]) -> Application:
    """The application of the ``args`` in a file of Ray Serve: fields of `EngineConfig`, `Limits` and `ServerSettings`, and those of `build`.

    Only ``model`` is needed. Keys are better in the environment, TURNROW_API_KEY and TURNROW_ADMIN_KEY, than in a file.

    Raises:
        UserError: a field is unknown, or its value is out of range.
    """
    given = dict(args)
    if "model" not in given:
        raise UserError("model is missing: name the base that is to be served, a folder or a Hub id")
    limits = _part(Limits, given)
    config = _part(EngineConfig, given, limits=limits)
    keys = {"api_key": os.environ.get("TURNROW_API_KEY"), "admin_key": os.environ.get("TURNROW_ADMIN_KEY")}
    given = {"base_name": config.model, **{name: key for name, key in keys.items() if key is not None}, **given}
    settings = _part(ServerSettings, given)
    numbers = {"replicas": int, "cpus": float, "gpus": float}
    how = {name: _checked(name, kind, given.pop(name)) for name, kind in numbers.items() if name in given}
    if given:
        known = [f.name for kind in (EngineConfig, Limits, ServerSettings) for f in fields(kind) if f.name != "limits"]
        name = next(iter(given))
        raise UserError(f"there is no field {name!r}{near_matches(name, [*known, *numbers])}")
    return build(config, settings, **how)


def _part(kind: Any, given: dict[str, Any], **others: Any) -> Any:
    """Take the fields of a dataclass out of `given`; values may be texts, as they are where ``serve run`` is told them."""
    names = [field.name for field in fields(kind) if field.name in given and field.name not in others]
    try:
        return TypeAdapter(kind).validate_python({**{name: given.pop(name) for name in names}, **others})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}") from None


def _checked(name: str, kind: type, value: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError:
        raise UserError(f"{name} is {value!r}; it must be a number") from None


class _Board(BoardLike):
    """The board, which lies in the gateway."""

    def __init__(self, application: str) -> None:
        self._application = application

    @cached_property
    def _gateway(self) -> DeploymentHandle:
        # not before it is needed: the gateway is started last
        return serve.get_deployment_handle(_GATEWAY, self._application)

    async def since(self, number: int) -> list[Change]:
        return await self._gateway.since.remote(number)

    async def restore(self, changes: Sequence[Change]) -> None:
        await self._gateway.restore.remote(changes)

    async def report(self, report: Report) -> int:
        return await self._gateway.report.remote(report)


def _ask_of(handle: DeploymentHandle) -> Ask:
    async def put(call: Call, adapter: str | None) -> AsyncGenerator[Message, None]:
        messages = handle.options(stream=True, multiplexed_model_id=adapter or "").answer.remote(call)
        try:
            async for message in messages:
                yield _without_request_id(message)
        except BackPressureError:
            raise ApiError(
                429,
                "too many requests wait already; try again later",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from None
        except RayActorError:
            raise ApiError(
                503,
                "the replica that was answering was lost; another try goes to another one",
                code="replica_lost",
                headers={"Retry-After": "1"},
            ) from None
        except (RayError, RayServeException) as error:
            _log.error("%s %s went wrong", call.method, call.path[:200], exc_info=error)
            raise ApiError(503, "no replica could answer; the server's log says why", code="unavailable") from None
        finally:
            # if nobody reads the answer any more, nobody need write it
            messages.cancel()

    return put


def _without_request_id(message: Message) -> Message:
    """Serve's proxy answers with the header itself; our log has the number that it gave."""
    if message["type"] != "http.response.start":
        return message
    return {**message, "headers": [(name, value) for name, value in message["headers"] if name != b"x-request-id"]}


def _log_to_stderr() -> None:
    """Let a replica's messages go where Ray collects them, and shows them to whoever started it."""
    logger = logging.getLogger("turnrow")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
