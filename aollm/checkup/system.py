"""The system around a run: memory, swap, load and limits."""

from __future__ import annotations

import platform
import re
import resource

from ..buffers import size
from ..compute import BUSY
from ..meter import amount
from .check import Check

LEAST_MEMORY, LEAST_FILES, MUCH_SWAP = 2 << 30, 4096, 256 << 20
UNLIMITED = resource.RLIM_INFINITY


def check_memory(free: int, total: int) -> Check:
    """What a run may take: `free` bytes, which control groups may limit, of `total`."""
    figures = {"free": free, "total": total}
    told = f"{size(free)} free of {size(total)}"
    if free < LEAST_MEMORY:
        return Check("memory", "warning", told, "little is left for weights: end other programs, or raise the container's limit", figures)
    return Check("memory", "ok", told, None, figures)


def check_swap(used: int, total: int) -> Check:
    """Whether memory is being swapped out, which a run that reads from disk pays for twice."""
    figures = {"used": used, "total": total}
    if not total:
        return Check("swap", "ok", "there is none", None, figures)
    told = f"{size(used)} used of {size(total)}"
    if used > MUCH_SWAP:
        return Check("swap", "warning", told, "memory is short: give runs less (--memory), or end other programs", figures)
    return Check("swap", "ok", told, None, figures)


def check_load(load: float, processors: int) -> Check:
    """How busy the machine has been for the last minute."""
    figures = {"load": load, "processors": processors}
    told = f"{load:.2f} for {processors} processors, in the last minute"
    if load > processors * BUSY:
        return Check("load", "warning", told, "other programs compute: figures measured now are noisy and too low", figures)
    return Check("load", "ok", told, None, figures)


def check_files(soft: int, hard: int) -> Check:
    """How many files a run may have open. An export of a mixture has one for each expert; the soft limit is raised when needed."""
    figures = {"soft": None if soft == UNLIMITED else soft, "hard": None if hard == UNLIMITED else hard}
    told = "no limit" if hard == UNLIMITED else f"{soft if soft != UNLIMITED else hard:,} at a time, {hard:,} at most"
    if hard != UNLIMITED and hard < LEAST_FILES:
        return Check("open files", "warning", told, f"exports may have thousands: raise the limit (ulimit -Hn {LEAST_FILES})", figures)
    return Check("open files", "ok", told, None, figures)


def check_io_uring(reason: str | None) -> Check:
    """Whether the kernel's queue for reads can be used; `reason` says why not. Nothing needs it: threads read as fast."""
    figures = {"available": reason is None}
    if reason is not None:
        return Check(
            "io_uring", "ok", f"not available ({reason}); threads serve as well, and --disk-backend auto takes them", None, figures
        )
    return Check("io_uring", "ok", "works", None, figures)


def check_locked(limit: int, release: str | None = None) -> Check | None:
    """How much memory may be locked, which rings are charged for by kernels before 5.12; None where that does not matter."""
    found = re.match(r"(\d+)\.(\d+)", release or platform.release())
    if found is None or (int(found[1]), int(found[2])) >= (5, 12):
        return None
    figures = {"limit": None if limit == UNLIMITED else limit}
    if limit != UNLIMITED and limit < 1 << 20:
        told, advice = f"{amount(limit)} may be locked", "io_uring needs more on this kernel: ulimit -l 8192, or --disk-backend threads"
        return Check("locked memory", "warning", told, advice, figures)
    return Check("locked memory", "ok", "enough may be locked for io_uring", None, figures)
