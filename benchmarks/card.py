"""What machine this is and how fast its drive reads, without names of hosts, users or folders.

It does not import aollm, whose settings for torch's threads the systems under comparison would inherit.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PIECE_NBYTES = 1 << 20
PROBE_NBYTES = 512 << 20


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine_card() -> dict[str, object]:
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def drive_speed(path: Path, threads: int = 4, turns: int = 3) -> float:
    """Bytes per second of O_DIRECT reads of 1 MiB from the start of `path`, `threads` in flight; the best of `turns`."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        offsets = range(0, min(PROBE_NBYTES, os.fstat(file).st_size) - PIECE_NBYTES, PIECE_NBYTES)

        def read(lane: int) -> int:
            with mmap.mmap(-1, PIECE_NBYTES) as buffer:
                return sum(os.preadv(file, [buffer], offset) for offset in offsets[lane::threads])

        speeds = []
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(turns):
                begin = time.perf_counter()
                speeds.append(sum(pool.map(read, range(threads))) / (time.perf_counter() - begin))
        return max(speeds)
    finally:
        os.close(file)


def drop_page_cache(files: Iterable[Path]) -> None:
    """Tell the kernel to forget the cached pages of `files`; pages that some process has mapped stay."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
