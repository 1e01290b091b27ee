"""The kernel's cache of a model's files: dropped, and looked at afterwards, so that what is called cold is cold.

It refuses to know what the files are for.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLD_SHARE = 0.02
"""A larger part of the files in the cache is not cold."""


def drop(folder: Path) -> dict[str, Any]:
    """Drop the cached pages of all files in `folder`: `cold` (None where nobody can tell), the `resident_share` of their pages
    that is still cached, before and after, their bytes, and the `reason` why it is not cold."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts: dict[str, Any] = {"nbytes": sum(path.stat().st_size for path in files), "files": len(files)}
    if sys.platform != "linux":
        return {**facts, "cold": None, "reason": f"{sys.platform} does not say what it caches"}
    before = resident_share(files)
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    after = resident_share(files)
    cold = None if after is None else after <= COLD_SHARE
    reason = {
        True: None,
        False: "pages stay in the cache: another process has them mapped, or the filesystem keeps them",
        None: "the kernel does not say which pages it caches",
    }[cold]
    return {**facts, "resident_share_before": before, "resident_share": after, "cold": cold, "reason": reason}


def resident_share(files: Sequence[Path]) -> float | None:
    """How much of the pages of `files` is in memory, from 0 to 1; None where the kernel does not tell."""
    counts = [_resident(path) for path in files if path.stat().st_size]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    pages = sum(total for _, total in known)
    return sum(found for found, _ in known) / pages if pages else 0.0


def _resident(path: Path) -> tuple[int, int] | None:
    """Pages of a file that are in memory, and all its pages."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), ctypes.byref(seen)
        )
        del first  # a map that somebody points into cannot be closed
        return None if failed else (sum(bytes(seen).count(value) for value in range(1, 256, 2)), pages)
