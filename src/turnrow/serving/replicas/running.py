"""``turnrow serve --replicas N``: start Ray Serve, serve until a signal, and end in order."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from turnrow.errors import UserError
from turnrow.serving.http import ServerSettings, bind
from turnrow.serving.starting import EngineConfig

__all__ = ["Placement", "run_replicas"]

_NAME = "turnrow"
"""Of the application on Ray Serve."""
_OBJECTS = 256 * 1024**2
"""Bytes of Ray's store of objects, which holds nothing of ours."""
_READY_S = 600
"""So long the replicas may take to load the model."""
_LAST_WORDS_S = 5.0
"""So long the gateway may take to tell what it does, and errors to go out when all is broken off."""
_ENDING_S = 40.0
"""So long Ray may take to end."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where the replicas run.

    Raises:
        UserError: a number is out of range.
    """

    replicas: int
    address: str | None = None
    """Of a Ray cluster, or ``auto`` for the one that this machine belongs to; None starts Ray on this machine alone."""
    cpus: float | None = None
    """That a replica takes, also the number of its threads. None for an equal share of those of the cluster."""
    gpus: float | None = None
    """That a replica takes. None for one, where the cluster has any and the model's device is not the CPU."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise UserError(f"replicas is {self.replicas}; it must be at least 1")
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"{name} is {value}; it must be 0 or more")

    def resources(self, config: EngineConfig, cluster: dict[str, float]) -> tuple[float, float]:
        """CPUs and GPUs of each replica.

        Args:
            config: of the engine.
            cluster: what there is, as `ray.cluster_resources` says it.

        Raises:
            UserError: the cluster has not enough.
        """
        on_cpu = config.device is not None and config.device.startswith("cpu")
        gpus = self.gpus if self.gpus is not None else float(not on_cpu and cluster.get("GPU", 0) > 0)
        share = cluster.get("CPU", 1) / self.replicas
        # whole threads; where there are more replicas than CPUs they share them
        cpus = self.cpus if self.cpus is not None else float(int(share)) if share >= 1 else share
        for kind, each in (("CPU", cpus), ("GPU", gpus)):
            if self.replicas * each > cluster.get(kind, 0) + 1e-6:
                raise UserError(
                    f"{self.replicas} replicas of {each:g} {kind} each need more than the {cluster.get(kind, 0):g} that there are: "
                    f"take fewer replicas, or less for each (--replica-{kind.lower()}s)"
                )
        return cpus, gpus


def run_replicas(
    config: EngineConfig,
    settings: ServerSettings,
    placement: Placement,
    host: str,
    port: int,
    on_ready: Callable[[dict[str, Any], int], None] = lambda health, port: None,
) -> bool:
    """Serve in the main thread until SIGINT or SIGTERM; a second one gives up what still runs.

    Args:
        config: of every replica.
        settings: of the HTTP side.
        placement: where they run.
        host: where the gateway listens.
        port: 0 for any that is free.
        on_ready: called when requests are answered, with what ``/health`` says and the port.

    Returns:
        Whether all that was accepted came to its end.

    Raises:
        UserError: the port cannot be had, the cluster not be reached or Ray Serve runs there already, there are too few CPUs or GPUs, or the model cannot be served.
    """
    if placement.address is None:
        config.check()
    with bind(host, port) as listening:  # said before anything is started; Ray binds it again
        port = listening.getsockname()[1]
    with _ray(placement.address), _Signals() as signals:  # after Ray, which has a handler of its own
        import ray
        from ray import serve

        from turnrow.serving.replicas.application import build

        if serve.status().proxies:
            raise UserError(
                f"Ray Serve runs at {placement.address} already: end it (serve shutdown), or let it run turnrow too, from a file "
                "(see docs/serving.md)"
            )
        cpus, gpus = placement.resources(config, ray.cluster_resources())
        application = build(_absolute(config), settings, replicas=placement.replicas, cpus=cpus, gpus=gpus)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(
            proxy_location="HeadOnly" if placement.address is None else "EveryNode",
            http_options={"host": host, "port": port},
            logging_config=quiet,
        )
        try:
            handle = _start(application, quiet, signals)
            if handle is None:
                return False
            health = _wait_until_healthy(host, port, placement.replicas, signals)
            if health is not None:
                on_ready(health, port)
                signals.wait()
            return _end(handle, signals)
        finally:
            _within(_ENDING_S, serve.shutdown)


def _absolute(config: EngineConfig) -> EngineConfig:
    """With folders of this machine by their whole paths: the processes of a cluster begin elsewhere."""

    def whole(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).is_dir() else path

    return replace(config, model=whole(config.model), adapters=config.adapters and whole(config.adapters))


def _start(application: Any, quiet: dict[str, Any], signals: _Signals) -> Any:
    """Deploy it; the handle of the gateway, or None if a signal came first.

    Raises:
        UserError: a replica cannot start.
    """
    from ray import serve

    outcome = _in_thread(lambda: serve.run(application, name=_NAME, route_prefix="/", logging_config=quiet))
    while not outcome.done():
        if signals.wait(0.2):
            return None
    try:
        return outcome.result()
    except RuntimeError as error:
        found = serve.status().applications.get(_NAME)
        text = f"{error}\n" + ("" if found is None else "\n".join(d.message for d in found.deployments.values()))
        said = re.search(r"(?:UserError|AdapterError): (.+)", text)
        raise UserError(f"the replicas cannot start: {said[1] if said else text.strip()}") from None


def _wait_until_healthy(host: str, port: int, replicas: int, signals: _Signals) -> dict[str, Any] | None:
    """What ``/health`` says once every replica has reported; None if a signal came first."""
    url = f"http://{_reachable(host)}:{port}/health"
    until = time.monotonic() + _READY_S
    while not signals.wait(0.2):
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                health = json.load(answer)
            if len(health["replicas"]) >= replicas:
                return health
        except (OSError, ValueError):
            pass
        if time.monotonic() > until:
            raise UserError(f"{url} does not answer, though the replicas run; Ray's logs say why")
    return None


def _reachable(host: str) -> str:
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{own}]" if ":" in own else own


def _end(handle: Any, signals: _Signals) -> bool:
    """Drain; give up what still runs at a second signal. Whether all that was accepted was answered."""
    running = _within(_LAST_WORDS_S, lambda: handle.open_requests.remote().result())
    _log.info("taking no more requests; %d are being answered. Once more, and they are given up", running)
    drained = _in_thread(lambda: handle.drain.remote().result())
    while not signals.wait(0.1, count=2):
        if drained.done():
            drained.result()
            return True
    _log.info("giving up what still runs")
    _within(_LAST_WORDS_S, lambda: handle.break_off.remote().result())
    return False


def _in_thread(what: Callable[[], Any]) -> Future[Any]:
    """Do it in a thread for which nobody waits at the end of the process."""
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(what())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="turnrow-ray", daemon=True).start()
    return outcome


def _within(seconds: float, what: Callable[[], Any]) -> Any:
    """Do it, or end this process: Ray waits for ever for daemons of its own that are dead, also where Python ends."""
    try:
        return _in_thread(what).result(seconds)
    except TooLate:
        _log.error(
            "Ray does not answer; its daemons may have got the same signal as this process (let whatever watches it signal this "
            "process alone)"
        )
        os._exit(1)


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Ray, started here or joined."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    how: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
    if address is None:
        # never one that happens to run on this machine
        how.update(address="local", include_dashboard=False, object_store_memory=_OBJECTS)
    else:
        _check_reachable(address)
        how["address"] = address
    try:
        ray.init(**how)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Ray cannot be reached at {address!r}: {reason}" if address else f"Ray cannot be started: {reason}"
        ) from None
    try:
        yield
    finally:
        _within(_ENDING_S, ray.shutdown)


def _check_reachable(address: str) -> None:
    """See whether anything listens there: Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"the address of the Ray cluster is {address!r}; it must be HOST:PORT, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"Ray cannot be reached at {address!r}: {error}") from None


class _Signals:
    """Counts SIGINT and SIGTERM while it is entered."""

    def __enter__(self) -> _Signals:
        self._count = 0
        self._former = {which: signal.signal(which, self._hear) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *args: object) -> None:
        for which, handler in self._former.items():
            signal.signal(which, handler)

    def wait(self, seconds: float | None = None, count: int = 1) -> bool:
        """Wait until there were so many, or the time is up; whether there were."""
        until = None if seconds is None else time.monotonic() + seconds
        while self._count < count:
            if until is not None and time.monotonic() >= until:
                return False
            time.sleep(0.05)  # which a signal cuts short
        return True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
