"""An HTTP server around the engine, with the routes and forms of OpenAI's API; needs the extra ``serve``.

    with Engine(model, tokenizer, store) as engine:
        run_server(engine, ServerSettings(base_name="my-model"), bind("127.0.0.1", 8000))

transformers has a server of its own (`transformers.cli.serving`), whose routes were weighed against these. It knows no adapters,
samples all requests as the first one asked for, has neither several answers nor log-probabilities, and its streams can end within a
character. All of it is in classes of which nothing is promised. What is shared with it is what lies below: continuous batching.

**Layers.** `bodies` reads what clients send, `prompts` makes tokens of it, `generation` hands it to the engine and writes the
answers, with `answers` (several requests as one), `pieces` and `tokens` (log-probabilities). `completions`, `chat`, `models` and
`adapters` are the routes, `access` their keys. `watching` logs and counts, `connection` sees clients go, `server` ends in order.
"""

from __future__ import annotations

from turnrow.serving.http.app import create_app
from turnrow.serving.http.server import Server, bind, run_server
from turnrow.serving.http.settings import ServerSettings

__all__ = ["Server", "ServerSettings", "bind", "create_app", "run_server"]
