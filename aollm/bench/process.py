"""What this process uses: memory, bytes fetched, and the time that its reading threads spend on a core.

Every figure comes from the kernel; one that it does not tell is None. It knows nothing of models.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import psutil

DISK_THREADS = "aollm-disk-"


def rss_nbytes() -> int:
    """Resident memory now, shared pages included."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_nbytes() -> int | None:
    """The most that was ever resident (`VmHWM`, which unlike `getrusage` forgets what ran here before the exec)."""
    if sys.platform != "linux":
        return None
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(rows["VmHWM"].split()[0]) * 1024 if "VmHWM" in rows else None


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
