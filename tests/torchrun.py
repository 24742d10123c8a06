"""Start a program on several processes, as `torchrun` does, and never wait for it forever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


def start(*arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    """`torchrun --standalone --nproc_per_node PROCESSES ARGUMENTS` on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(SOURCE.parent), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
        # The name of a machine need not resolve to an address of its own.
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.Popen(
        [*command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(started: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str, str]:
    """Wait and return (exit code, stdout, stderr); after `timeout` seconds end it with all its processes."""
    try:
        out, err = started.communicate(timeout=timeout)
    finally:
        if started.poll() is None:
            # torchrun ends its processes, which are in sessions of their own, when it is asked to end.
            started.terminate()
            try:
                started.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                started.kill()
    return started.returncode, out, err


def torchrun(*arguments: str, processes: int = 2, timeout: float = 300) -> tuple[int, str, str]:
    """Start and finish."""
    return finish(start(*arguments, processes=processes), timeout)
