"""Several equal servers behind one address, on Ray Serve; needs the extras ``serve`` and ``ray``.

    from turnrow.serving.replicas.application import build
    serve.run(build(EngineConfig(model, adapters), ServerSettings(base_name=model), replicas=4))

Ray Serve starts the processes, watches them, replaces those that die, and chooses the replica for a request. `serve.multiplexed`
lets requests for an adapter go where it was asked for before, so that each replica holds its share of the adapters; if that
replica has its hands full, another takes it.

**Parts.** A `Replica` is an engine with the application of `turnrow.serving.http`. The `Gateway` reads requests, puts them to a replica
as a `Call`, and hands on ASGI messages. It passes on bytes, so that replicas answer exactly as one server would. Its `Board` knows
which adapters were loaded and unloaded while they run: each request names the last change that it must see, and a replica makes
the changes that it lacks before it answers. `application` makes Ray deployments of the two, the only module that knows Ray,
beside `running`, which is `turnrow serve --replicas N`.

**What holds.** A replica that dies while it answers costs its requests an error each, in OpenAI's form: 503 ``replica_lost``, or the last event of a
stream. None is put to another replica in secret: what killed one might kill the next, and clients try again by themselves. A gateway
that dies breaks the connections; it is started again, and the replicas tell it what changed before.
"""

from __future__ import annotations

from turnrow.serving.replicas.board import Board, Change, Report
from turnrow.serving.replicas.calls import Call, ask
from turnrow.serving.replicas.gateway import Gateway
from turnrow.serving.replicas.replica import Replica

__all__ = ["Board", "Call", "Change", "Gateway", "Replica", "Report", "ask"]
