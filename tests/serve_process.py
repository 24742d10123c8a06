"""`turnrow serve` as a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any


class Process:
    """A server on a free port, with the API key ``sesame``; its log is a file."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "turnrow", "serve", "--model", str(model), "--port", "0", *options]
        environment = {**os.environ, "TURNROW_API_KEY": "sesame"}
        with log.open("w") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL, env=environment)

    def url(self) -> str:
        """Wait until it serves."""
        deadline = time.monotonic() + 240
        while (found := re.search(r" at (http://\S+)/v1", self.log.read_text())) is None:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return found[1]

    def ask(self, path: str, body: Any = None) -> Any:
        headers = {"Authorization": "Bearer sesame", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url() + path, data, headers), timeout=60)
