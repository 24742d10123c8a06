"""What a result must say about where it comes from: machine, versions, commit. No host name, no path."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["commit", "machine", "versions"]


def machine(device: str) -> dict[str, object]:
    """Return processor, cores, threads that torch uses, load before the run, and the accelerator if `device` is one."""
    facts: dict[str, object] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if torch.device(device).type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
        facts["accelerator_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a step runs through."""
    packages = ("torch", "transformers", "peft", "turnrow")
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from source"


def commit() -> dict[str, object]:
    """Return the commit of the repository that holds this file, and whether tracked files differ from it."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "modified": None}
    return {"commit": head.stdout.strip(), "modified": status.returncode != 0}
