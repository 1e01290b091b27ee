"""What machine this is, in facts that name no host, user or folder."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from ..compute import processors


def machine_card() -> dict[str, Any]:
    """Processor, memory and versions of what the figures depend on; `load_average` of the last minute, other processes included."""
    return {
        "cpu": _cpu_model(),
        "cores": processors(),
        "memory_nbytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "aollm": _version("aollm"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def host_digest() -> str:
    """Twelve hexadecimal digits that are the same on the same machine, and do not tell its name."""
    try:
        name = Path("/etc/machine-id").read_text()
    except OSError:
        name = ""
    facts = (name.strip(), platform.node(), _cpu_model(), str(os.cpu_count()), str(psutil.virtual_memory().total >> 28))
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]
