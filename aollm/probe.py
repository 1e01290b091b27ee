"""What the machine has to give: how fast its drive is, and how much of its memory is free."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

import anyio
import psutil

from .buffers import PAGE, Ring
from .disk.base import Disk, Extent
from .errors import first_of

CHUNK = 32 << 20
PROBE_NBYTES = 256 << 20


async def drive_speed(disk: Disk, extents: Sequence[Extent], ring: Ring, nbytes: int = PROBE_NBYTES) -> float:
    """Bytes per second of reading about `nbytes` of `extents` the way weights are read: same files, same pieces, two
    chunks of the ring at a time. The first chunks only warm up: memory that was never touched takes time of its own."""
    chunk = min(CHUNK, ring.arena.nbytes // 2 // PAGE * PAGE)
    leases = [await ring.take(chunk), await ring.take(chunk)]
    memories = [ring.arena.bytes[lease.offset : lease.offset + lease.nbytes] for lease in leases]
    parts = [part for extent in extents for part in _parts(extent, chunk - PAGE)][: 2 + nbytes // chunk]
    await _read(disk, iter(parts[:2]), memories)
    start = perf_counter()
    await _read(disk, iter(parts[2:] or parts), memories)
    seconds = perf_counter() - start
    for lease in leases:
        lease.release()
    return sum(part.nbytes for part in parts[2:] or parts) / seconds


async def folder_speed(disk: Disk, folder: Path, ring: Ring, nbytes: int = PROBE_NBYTES) -> float | None:
    """The same of the drive that `folder` is on, by a file of `nbytes` that is written there, read and removed; None where that
    cannot be done."""

    def write() -> str | None:
        try:
            if shutil.disk_usage(folder).free < 4 * nbytes:
                return None
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-", delete=False) as file:
                block = os.urandom(4 << 20)
                for _ in range(0, nbytes, len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                return file.name
        except OSError:
            return None

    if (name := await anyio.to_thread.run_sync(write)) is None:
        return None
    try:
        return await drive_speed(disk, [Extent(name, 0, nbytes)], ring, nbytes)
    finally:
        with anyio.CancelScope(shield=True):
            await disk.forget(name)
            await anyio.to_thread.run_sync(os.unlink, name)


def free_disk(folder: Path) -> int | None:
    """Bytes that may still be written to the drive of `folder`, which need not be there yet; None where that is not known. Blocking."""
    try:
        return shutil.disk_usage(_existing(folder)).free
    except OSError:
        return None


def same_drive(folder: Path, files: Sequence[str]) -> bool:
    """Whether `folder`, which need not be there yet, is on the drive of the first of `files`. Blocking."""
    try:
        return bool(files) and os.stat(_existing(folder)).st_dev == os.stat(files[0]).st_dev
    except OSError:
        return False


def free_memory() -> int:
    """Bytes that this process may still take: what the system has available, within the limits of its control groups."""
    return min([int(psutil.virtual_memory().available), *_group_limits()])


def memory_budget(asked: int | None) -> tuple[int, int]:
    """Bytes that the whole process may have, `asked` or nearly all that is free, and how many of them it has already."""
    in_use = psutil.Process().memory_info().rss
    return asked or in_use + int(free_memory() * 0.9), in_use


async def _read(disk: Disk, parts: Iterator[Extent], memories: Sequence[memoryview]) -> None:
    async def reader(memory: memoryview) -> None:
        for part in parts:
            start = part.offset % PAGE
            await disk.read_into([part], [memory[start : start + part.nbytes]])

    try:
        async with anyio.create_task_group() as group:
            for memory in memories:
                group.start_soon(reader, memory)
    except BaseExceptionGroup as raised:
        raise first_of(raised) from raised


def _parts(extent: Extent, nbytes: int) -> list[Extent]:
    return [Extent(extent.file, at, min(nbytes, extent.end - at)) for at in range(extent.offset, extent.end, nbytes)]


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


def _existing(folder: Path) -> Path:
    """The first of `folder` and those above it that is there."""
    return next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
