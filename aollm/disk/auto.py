"""Which disk: the one that was asked for or, where it cannot be used, the next best, and one sentence that says why.

Reads of a megabyte and more are as fast through threads as through io_uring, so `auto` has no need to probe for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError, DiskError
from ..port import Port
from .base import Disk
from .files import open_for_reading, regular
from .memory import MemoryDisk
from .portable import PortableDisk
from .threads import ThreadsDisk
from .uring import UringDisk, probe

Choice = tuple[Disk, str]


def open_disk(name: str, port: Port, folder: Path) -> Choice:
    """The disk called `name` for files in `folder`, and one sentence on why it is this one.

    Raises `ConfigError` for a name that is not known or not available.

        disk, reason = open_disk("auto", port, Path("models/demo"))
    """
    try:
        choose = DISKS[name]
    except KeyError:
        raise ConfigError(f"disk_backend={name!r} is not known; use one of: {', '.join(DISKS)}") from None
    return choose(port, folder)


def _auto(port: Port, folder: Path) -> Choice:
    if sys.platform != "linux":
        return PortableDisk(), f"portable: {sys.platform} has no direct reads that this program can use"
    return ThreadsDisk(port), "threads: the fastest for large reads on Linux" + ("" if reads_directly(folder) else _BUFFERED)


def _threads(port: Port, folder: Path) -> Choice:
    if sys.platform != "linux":
        return PortableDisk(), f"threads needs Linux, and this is {sys.platform}: portable"
    return ThreadsDisk(port), "threads: as asked" + ("" if reads_directly(folder) else _BUFFERED)


def _uring(port: Port, folder: Path) -> Choice:
    if (reason := probe()) is not None:
        disk, _ = _threads(port, folder)
        return disk, f"uring is not available here ({reason}): {disk.name}"
    if not reads_directly(folder):
        return ThreadsDisk(port), "uring gains nothing on a filesystem without direct reads: threads"
    return UringDisk(port), "uring: as asked"


def _portable(port: Port, folder: Path) -> Choice:
    return PortableDisk(), "portable: as asked; it reads through the page cache"


def _memory(port: Port, folder: Path) -> Choice:
    return MemoryDisk.of(folder), "memory: as asked; all weights were read into memory, so it is for tests"


def _gds(port: Port, folder: Path) -> Choice:
    raise ConfigError(
        f"disk_backend='gds' is not in this build yet; use one of: {', '.join(name for name in DISKS if name not in ('gds', 'memory'))}"
    )


DISKS: dict[str, Callable[[Port, Path], Choice]] = {
    "auto": _auto,
    "threads": _threads,
    "uring": _uring,
    "gds": _gds,
    "portable": _portable,
    "memory": _memory,
}
"""What `disk_backend` may be, and `memory`, which no setting has: it is for tests."""

_BUFFERED = "; this filesystem has no direct reads, so pages are dropped after each"


def reads_directly(folder: Path) -> bool:
    """Whether files in `folder` can be read past the page cache, judged by the first one that opens; True if none does."""
    try:
        paths = sorted(entry.path for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return True
    for path in paths:
        try:
            fd, mode = open_for_reading(path)
            regular(fd, path)
        except (OSError, DiskError):
            continue
        os.close(fd)
        return mode == "direct"
    return True
