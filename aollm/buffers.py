"""Memory: the ledger that says who may have how much, and the arenas and rings that hand it out.

Everything large that a run touches is entered in the ledger when the runtime opens, and refused there if it does not
fit. An arena is page-aligned memory that a drive can read into and torch can compute on, with no copy between.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import deque
from dataclasses import dataclass, field

import anyio
import torch

from .errors import MemoryBudgetError

PAGE = 4096
HUGE_PAGE = 2 << 20
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


@dataclass(slots=True)
class Ledger:
    """`limit` bytes for the whole process, as `setting` has it, and what has been promised of them, line by line."""

    limit: int
    lines: dict[str, int] = field(default_factory=dict)
    setting: str = "memory"

    @property
    def free(self) -> int:
        """Bytes not promised yet (negative when over)."""
        return self.limit - sum(self.lines.values())

    def reserve(self, name: str, nbytes: int, lower: str = "max_context_tokens, max_concurrent_requests or prefetch_depth") -> None:
        """Promise `nbytes` to `name`; raises `MemoryBudgetError` when they are not there. `lower`: the settings to lower then."""
        if nbytes > self.free:
            lines = {**self.lines, name: nbytes}
            largest = sorted(lines.items(), key=lambda line: -line[1])[:4]
            raise MemoryBudgetError(
                f"{self.setting}={size(self.limit)} is too small: this run needs at least {size(sum(lines.values()))}; its largest parts "
                f"are {', '.join(f'{name} {size(n)}' for name, n in largest)}; raise {self.setting}, or lower {lower}"
            )
        self.lines[name] = self.lines.get(name, 0) + nbytes

    def __repr__(self) -> str:
        lines = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in self.lines.items())
        return f"<Ledger {size(sum(self.lines.values()))} of {size(self.limit)}: {lines}>"


def size(nbytes: float) -> str:
    """Bytes for people: `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


class Arena:
    """Page-aligned anonymous memory of `nbytes`, on huge pages where the kernel has them and `huge` says so; real only once
    written to."""

    def __init__(self, nbytes: int, huge: bool = True) -> None:
        self.nbytes = max(pages(nbytes), PAGE)
        try:
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        except OSError as error:
            raise MemoryBudgetError(
                f"the system refuses {size(self.nbytes)} of memory ({error.strerror}); lower memory or max_context_tokens"
            ) from error
        if self.nbytes >= HUGE_PAGE and "MADV_HUGEPAGE" in dir(mmap):
            self._map.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        self.bytes = memoryview(self._map)

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A view of the bytes at `offset` (a multiple of the item size) as a tensor; writes show in both."""
        count = 1
        for length in shape:
            count *= length
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)

    def move(self, source: int, target: int, nbytes: int) -> None:
        """Copy bytes within the arena; the two ranges may overlap. Other threads go on running."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        ctypes.memmove(start + target, start + source, nbytes)

    def drop(self, offset: int, nbytes: int) -> None:
        """Give the pages back to the system; they read as zero until written again. Both multiples of `PAGE`."""
        if nbytes:
            self._map.madvise(mmap.MADV_DONTNEED, offset, nbytes)

    def __repr__(self) -> str:
        return f"<Arena {size(self.nbytes)}>"


@dataclass(eq=False, slots=True)
class Lease:
    """`nbytes` of a ring from `offset`; `release` once, from the event loop."""

    ring: Ring
    offset: int
    nbytes: int
    live: bool = True

    def release(self) -> None:
        """Hand the bytes back."""
        self.live = False
        self.ring._reclaim()


class Ring:
    """Memory for what streams: leases are cut one after the other and come back, roughly, in the same order.

    Not `backed`, it is leases alone, of memory that is elsewhere.
    """

    def __init__(self, nbytes: int, backed: bool = True) -> None:
        self.nbytes = max(pages(nbytes), PAGE)
        self.arena = Arena(nbytes if backed else 0)
        self._leases: deque[Lease] = deque()
        self._head = 0
        self._freed = anyio.Event()

    async def take(self, nbytes: int) -> Lease:
        """A lease of `nbytes`, as soon as so many are free in one piece. One taker at a time."""
        wanted = pages(nbytes)
        if wanted > self.nbytes:
            raise MemoryBudgetError(f"a piece of {size(wanted)} does not fit the stream ring of {size(self.nbytes)}")
        while (offset := self._place(wanted)) is None:
            await self._freed.wait()
        lease = Lease(self, offset, wanted)
        self._leases.append(lease)
        self._head = offset + wanted
        return lease

    @property
    def leased(self) -> int:
        """Bytes in use."""
        return sum(lease.nbytes for lease in self._leases if lease.live)

    def _place(self, wanted: int) -> int | None:
        if not self._leases:
            return 0
        tail = self._leases[0].offset
        if self._head > tail:
            if self.nbytes - self._head >= wanted:
                return self._head
            return 0 if tail >= wanted else None
        return self._head if tail - self._head >= wanted else None

    def _reclaim(self) -> None:
        while self._leases and not self._leases[0].live:
            self._leases.popleft()
        self._freed.set()
        self._freed = anyio.Event()

    def __repr__(self) -> str:
        return f"<Ring {size(self.leased)} of {size(self.nbytes)} in {len(self._leases)} leases>"
