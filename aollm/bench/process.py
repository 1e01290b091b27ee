"""What this process uses: memory, bytes fetched, and the time that its reading threads spend on a core.

Every figure comes from the kernel or the allocator; one that they do not tell is None. It knows nothing of models.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

DISK_THREADS = "aollm-disk-"
STATUS = Path("/proc/self/status")


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")],
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


def memory() -> dict[str, Any]:
    """Resident memory now and at most (bytes, shared pages included), and where each figure is from."""
    rows = _status()
    peak = rows.get("VmHWM")
    return {
        "rss_nbytes": rows["VmRSS"] if "VmRSS" in rows else rss_nbytes(),
        "rss_source": "VmRSS of /proc/self/status" if "VmRSS" in rows else "psutil",
        "peak_rss_nbytes": peak,
        "peak_rss_source": None if peak is None else "VmHWM of /proc/self/status",
    }


def rss_nbytes() -> int:
    """Resident memory now, shared pages included."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_nbytes() -> int | None:
    """The most that was ever resident (`VmHWM`, which unlike `getrusage` forgets what ran here before the exec)."""
    return _status().get("VmHWM")


def allocator_slack_nbytes() -> int | None:
    """Bytes that the C allocator holds free and has not given back to the system (glibc's `mallinfo2`); None elsewhere."""
    try:
        tell = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    tell.restype = _Mallinfo2
    return int(tell().fordblks)


def started_s() -> float:
    """Seconds since this process began."""
    return time.time() - float(psutil.Process().create_time())


def read_nbytes() -> int | None:
    """Bytes that reads brought in so far, from the drive or from the page cache; it grows while anything is being read."""
    if sys.platform != "linux":
        return None
    counters = psutil.Process().io_counters()
    return int(counters.read_bytes + counters.read_chars)


def io_cpu_s() -> float | None:
    """Processor seconds of the disk's threads so far; None where there are none (a ring reads without) or nobody tells."""
    if sys.platform != "linux":
        return None
    idents = [thread.ident for thread in threading.enumerate() if thread.name.startswith(DISK_THREADS) and thread.ident is not None]
    if not idents:
        return None
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in idents)


def _status() -> dict[str, int]:
    """The rows of /proc/self/status that are in kB, in bytes; none where there is no such file."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in rows}
