"""How fast a drive is, measured the way weights are read: same files, same pieces, same depth."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import anyio

from .buffers import PAGE, Ring
from .disk.base import Disk, Extent
from .errors import MemoryBudgetError

CHUNK = 32 << 20


async def drive_speed(disk: Disk, extents: Sequence[Extent], ring: Ring, nbytes: int) -> float:
    """Bytes per second of reading about `nbytes` of `extents`, two chunks of the ring at a time."""
    chunk = min(CHUNK, ring.arena.nbytes // 2 // PAGE * PAGE)
    if chunk <= PAGE:
        raise MemoryBudgetError("the stream ring is too small to read through")
    todo = iter([part for extent in extents for part in _parts(extent, chunk)][: max(1, nbytes // chunk)])
    done = 0

    async def reader(memory: memoryview) -> None:
        nonlocal done
        for part in todo:
            await disk.read_into([part], [memory[part.offset % PAGE : part.offset % PAGE + part.nbytes]])
            done += part.nbytes

    start = perf_counter()
    leases = [await ring.take(chunk), await ring.take(chunk)]
    async with anyio.create_task_group() as group:
        for lease in leases:
            group.start_soon(reader, ring.arena.bytes[lease.offset : lease.offset + lease.nbytes])
    for lease in leases:
        lease.release()
    return done / (perf_counter() - start)


def _parts(extent: Extent, chunk: int) -> list[Extent]:
    size = chunk - PAGE
    return [Extent(extent.file, at, min(size, extent.end - at)) for at in range(extent.offset, extent.end, size)]
