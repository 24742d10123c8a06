"""``turnrow serve``: a model and any number of adapters behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import logging
import os
from importlib.util import find_spec
from typing import Any

from turnrow.errors import UserError

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "serve"
HELP = "serve a model with any number of adapters, OpenAI-compatible"

_PACKAGES = ("fastapi", "prometheus_client", "uvicorn")

_log = logging.getLogger("turnrow.serving")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", required=True, metavar="MODEL", help="the base: a folder, a Hub id or package:NAME")
    parser.add_argument(
        "--adapters", metavar="DIR", help="every subfolder with an adapter is served under its name (default: none)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, for this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 for any that is free")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="the base's own name (default: MODEL); 'base' is always one"
    )

    model = parser.add_argument_group("the model")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (default: that of the checkpoint)",
    )
    model.add_argument("--device", help="default: cuda if there is one, else cpu")
    model.add_argument("--no-check-base", action="store_true", help="also adapters that were trained on another base")

    limits = parser.add_argument_group("limits")
    limits.add_argument("--slots", type=int, metavar="N", help="adapters on the device at once (default: 64)")
    limits.add_argument("--host-memory", metavar="SIZE", help="for adapters in the memory of the host (default: 2GiB)")
    limits.add_argument("--max-running", type=int, metavar="N", help="answers generated at once (default: 32)")
    limits.add_argument(
        "--max-waiting", type=int, metavar="N", help="answers that wait beside; then 429 (default: 256)"
    )
    limits.add_argument("--max-model-len", type=int, metavar="N", help="tokens of a prompt and its answer together")
    limits.add_argument("--batch-tokens", type=int, metavar="N", help="the most tokens in a step (default: 512)")
    limits.add_argument(
        "--cache-memory",
        metavar="SIZE",
        help="for keys and values (default: 256MiB on a CPU, else 40 %% of what is free)",
    )
    limits.add_argument(
        "--request-timeout", type=float, default=600, metavar="S", help="default: %(default)s; 0 for none"
    )
    limits.add_argument("--max-body", default="4MiB", metavar="SIZE", help="the longest request (default: %(default)s)")

    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key",
        metavar="KEY",
        help="asked for under /v1; better in the environment, TURNROW_API_KEY (default: none)",
    )
    access.add_argument(
        "--admin-key",
        metavar="KEY",
        help="asked for in its place where adapters are loaded and unloaded; or TURNROW_ADMIN_KEY (default: the API key)",
    )
    access.add_argument(
        "--allow-adapter-management",
        action="store_true",
        help="load and unload adapters over HTTP without any key, too",
    )
    access.add_argument("--allow-any-path", action="store_true", help="load adapters from outside of --adapters, too")
    access.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="web pages that may call from a browser (CORS)",
    )
    replicas = parser.add_argument_group("several processes or machines, by Ray Serve")
    replicas.add_argument("--replicas", type=int, default=1, metavar="N", help="equal servers behind the one address")
    replicas.add_argument(
        "--ray-address", metavar="ADDRESS", help="a Ray cluster, or auto (default: Ray on this machine alone)"
    )
    replicas.add_argument(
        "--replica-cpus", type=float, metavar="N", help="for each, also its threads (default: an equal share)"
    )
    replicas.add_argument(
        "--replica-gpus",
        type=float,
        metavar="N",
        help="for each (default: 1 where there are any, and --device is not cpu)",
    )
    parser.epilog = (
        "  turnrow serve --model path/to/llama --adapters runs/adapters\n"
        "  curl -s localhost:8000/v1/models\n"
        "Ctrl-C or SIGTERM ends when what was accepted is answered, a second one at once. See docs/serving.md."
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; 0 if all that was accepted was answered, 130 if it was broken off."""
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise UserError(f"turnrow serve needs {', '.join(missing)}, not installed here: pip install 'turnrow[serve]'")
    from turnrow.serving import EngineConfig
    from turnrow.serving.http import ServerSettings, bind, run_server
    from turnrow.training.sizes import parse_bytes

    settings = ServerSettings(
        base_name=args.served_model_name or args.model,
        api_key=_key(args.api_key, "TURNROW_API_KEY"),
        admin_key=_key(args.admin_key, "TURNROW_ADMIN_KEY"),
        manage_adapters=args.allow_adapter_management,
        any_path=args.allow_any_path,
        request_timeout_s=args.request_timeout or None,
        max_body_bytes=parse_bytes(args.max_body),
        allow_origins=tuple(args.allow_origin),
    )
    how = {} if args.host_memory is None else {"host_bytes": parse_bytes(args.host_memory)}
    config = EngineConfig(
        args.model,
        args.adapters,
        dtype=args.dtype,
        device=args.device,
        check_base=not args.no_check_base,
        limits=_limits(args),
        **how,
    )
    if args.replicas != 1 or args.ray_address is not None:
        return _run_replicas(args, config, settings)
    # what can be refused is refused before a large model is loaded
    with bind(args.host, args.port) as listening, config.load() as engine:
        port = listening.getsockname()[1]
        adapters = len(engine.store.names())
        drained = run_server(
            engine, settings, listening, lambda: _announce(args, settings, port, adapters, engine.max_length)
        )
        if not drained:
            return 130
    engine.store.close()
    return 0


def _run_replicas(args: argparse.Namespace, config: Any, settings: Any) -> int:
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        raise UserError(
            "turnrow serve --replicas needs ray[serve], not installed here: pip install 'turnrow[serve,ray]'"
        )
    from turnrow.serving.replicas.running import Placement, run_replicas

    placement = Placement(args.replicas, args.ray_address, args.replica_cpus, args.replica_gpus)

    def ready(health: Any, port: int) -> None:
        report = health["replicas"][0]
        _announce(args, settings, port, report["adapters"], report["max_length"])

    return 0 if run_replicas(config, settings, placement, args.host, args.port, ready) else 130


def _key(given: str | None, variable: str) -> str | None:
    return os.environ.get(variable) if given is None else given


def _limits(args: argparse.Namespace) -> Any:
    from turnrow.serving import Limits
    from turnrow.training.sizes import parse_bytes

    given = {
        "slots": args.slots,
        "max_running": args.max_running,
        "max_queue": args.max_waiting,
        "max_length": args.max_model_len,
        "batch_tokens": args.batch_tokens,
        "cache_bytes": None if args.cache_memory is None else parse_bytes(args.cache_memory),
    }
    if args.max_model_len is not None and args.max_model_len < 2:
        raise UserError(f"--max-model-len is {args.max_model_len}; it must be at least 2")
    return Limits(**{name: value for name, value in given.items() if value is not None})


def _announce(args: argparse.Namespace, settings: Any, port: int, adapters: int, max_length: int) -> None:
    """Say what is served, where, and who may."""
    host = f"[{args.host}]" if ":" in args.host else args.host
    _log.info(
        "serving %s and %d adapter%s%s at http://%s:%d/v1, prompts and answers of up to %d tokens; Ctrl-C to end",
        settings.base_name,
        adapters,
        "" if adapters == 1 else "s",
        f" on {args.replicas} replicas" if args.replicas > 1 else "",
        host,
        port,
        max_length,
    )
    if settings.api_key is None and args.host not in ("127.0.0.1", "::1", "localhost"):
        _log.warning("anybody who reaches %s may use it: set TURNROW_API_KEY to ask for a key", args.host)
