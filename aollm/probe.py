"""What the machine has to give: how fast its drive is, and how much of its memory is free."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import IO

import anyio
import psutil
from numpy import frombuffer, uint8

from .buffers import PAGE, Ring, pages
from .disk.base import Disk, Extent
from .errors import DiskError, first_of

CHUNK = 32 << 20
PROBE_NBYTES = 128 << 20

Read = list[tuple[Extent, int]]
"""Extents that are read together, and where each begins in memory."""


async def drive_speed(disk: Disk, extents: Sequence[Extent], ring: Ring, nbytes: int = PROBE_NBYTES) -> float:
    """Bytes per second of reading about `nbytes` of `extents` the way weights are read: as many of them at a time as fill a
    chunk of the ring, two chunks at a time. Memory that was never touched takes time of its own, so it is touched before, and
    the first two chunks only warm up."""
    chunk = min(CHUNK, ring.arena.nbytes // 2 // PAGE * PAGE)
    reads = _reads(extents, chunk)
    first = list(islice(reads, 2))
    parts: list[Read] = []
    while _nbytes(parts) < nbytes and (read := next(reads, None)) is not None:
        parts.append(read)
    parts = parts or first
    leases = [await ring.take(chunk), await ring.take(chunk)]
    try:
        memories = [ring.arena.bytes[lease.offset : lease.offset + lease.nbytes] for lease in leases]
        for memory in memories:
            frombuffer(memory, uint8)[::PAGE] = 0
        await _read(disk, iter(first), memories)
        start = perf_counter()
        await _read(disk, iter(parts), memories)
        return _nbytes(parts) / (perf_counter() - start)
    finally:
        for lease in leases:
            lease.release()


async def folder_speed(disk: Disk, folder: Path, ring: Ring, nbytes: int = PROBE_NBYTES) -> float | None:
    """The same of the drive that `folder` is on, by a file of `nbytes` that is written there and read; None where that cannot be
    done."""

    def write() -> IO[bytes] | None:
        try:
            if shutil.disk_usage(folder).free < 4 * nbytes:
                return None
            file = nameless(folder)
        except OSError:
            return None
        try:
            block = os.urandom(4 << 20)
            for _ in range(0, nbytes, len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            file.close()
            return None
        return file

    if (file := await anyio.to_thread.run_sync(write)) is None:
        return None
    name = path_of(file)
    try:
        return await drive_speed(disk, [Extent(name, 0, nbytes)], ring, nbytes)
    except DiskError:
        return None
    finally:
        with anyio.CancelScope(shield=True):
            await disk.forget(name)
            await anyio.to_thread.run_sync(file.close)


def nameless(folder: Path) -> IO[bytes]:
    """A file that is gone when it is closed, and on Linux has no name even before."""
    return tempfile.TemporaryFile(dir=folder) if sys.platform == "linux" else tempfile.NamedTemporaryFile(dir=folder)


def path_of(file: IO[bytes]) -> str:
    """What a nameless file can be opened by in this process."""
    return f"/proc/self/fd/{file.fileno()}" if sys.platform == "linux" else str(file.name)


def free_disk(folder: Path) -> int | None:
    """Bytes that may still be written to the drive of `folder`, which need not be there yet; None where that is not known. Blocking."""
    try:
        return shutil.disk_usage(existing(folder)).free
    except OSError:
        return None


def same_drive(folder: Path, files: Sequence[str]) -> bool:
    """Whether `folder`, which need not be there yet, is on the drive of the first of `files`. Blocking."""
    try:
        return bool(files) and os.stat(existing(folder)).st_dev == os.stat(files[0]).st_dev
    except OSError:
        return False


def free_memory() -> int:
    """Bytes that this process may still take: what the system has available, within the limits of its control groups."""
    return min([int(psutil.virtual_memory().available), *_group_limits()])


def memory_budget(asked: int | None) -> tuple[int, int]:
    """Bytes that the whole process may have, `asked` or nearly all that is free, and how many of them it has already."""
    in_use = psutil.Process().memory_info().rss
    return asked or in_use + int(free_memory() * 0.9), in_use


async def _read(disk: Disk, reads: Iterator[Read], memories: Sequence[memoryview]) -> None:
    async def reader(memory: memoryview) -> None:
        for read in reads:
            await disk.read_into([extent for extent, _ in read], [memory[at : at + extent.nbytes] for extent, at in read])

    try:
        async with anyio.create_task_group() as group:
            for memory in memories:
                group.start_soon(reader, memory)
    except BaseExceptionGroup as raised:
        raise first_of(raised) from raised


def _reads(extents: Iterable[Extent], room: int) -> Iterator[Read]:
    """As many extents, or parts of them, as fill `room` bytes, again and again."""
    read: Read = []
    end = 0
    for extent in extents:
        for first in range(extent.offset, extent.end, room - PAGE):
            part = Extent(extent.file, first, min(room - PAGE, extent.end - first))
            at = pages(end) + first % PAGE
            if at + part.nbytes > room:
                yield read
                read, at = [], first % PAGE
            read.append((part, at))
            end = at + part.nbytes
    if read:
        yield read


def _nbytes(reads: Sequence[Read]) -> int:
    return sum(extent.nbytes for read in reads for extent, _ in read)


def _group_limits() -> Iterator[int]:
    """What the control groups of this process and those above them leave it, where they limit it (v2 first, then v1)."""
    try:
        groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    except (OSError, ValueError):
        return
    v2, v1 = (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for name, limit, usage, cache in (v2, v1):
        root = Path("/sys/fs/cgroup") / name
        group = root / groups.get(name, "/").lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                counted = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(most - used + int(counted.get(cache, 0)), 0)  # cached files make room when it is needed
            except (OSError, ValueError):  # no such controller, or "max"
                continue


def existing(folder: Path) -> Path:
    """The first of `folder` and those above it that is there."""
    return next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
