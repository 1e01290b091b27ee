"""Disk back end `portable`: ordinary buffered files, through aiofiles on asyncio and anyio on trio.

For systems where nothing better works. It reads through the page cache, needs no port, and takes reads as they come:
priorities make no difference to it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Literal

import aiofiles
import anyio
import anyio.lowlevel
import anyio.to_thread

from ..errors import DiskError
from .base import PIECE, Extent, Piece, Priority, Span, pairs, pieces
from .durability import Durability
from .files import identity, open_for_writing, regular
from .trouble import changed, disk_error, nothing_written, truncated

HANDLES = 4
"""Handles on each file that is read: a handle has one position, so it carries one read at a time."""


@dataclass(eq=False, slots=True)
class Handle:
    """An open file of either library, and how to close it."""

    file: Any
    close: Callable[[], Awaitable[object]]


@dataclass(eq=False, slots=True)
class Pool:
    """A file's handles, opened as they are needed."""

    count: int
    free: list[Handle] = field(default_factory=list)
    turns: anyio.Semaphore = field(init=False)
    identity: tuple[int, int, int, int] | None = None
    """The file's when it was first opened, unless it is written here."""

    def __post_init__(self) -> None:
        self.turns = anyio.Semaphore(self.count)

    async def close(self) -> None:
        """Wait for what is in flight and close the handles."""
        for _ in range(self.count):
            await self.turns.acquire()
        while self.free:
            await self.free.pop().close()


Job = Callable[[], Awaitable[object]]
Opener = Callable[[str, int], int]
Mode = Literal["rb", "r+b"]


class PortableDisk:
    """Reads with up to `handles` handles on each file."""

    name = "portable"

    def __init__(self, handles: int = HANDLES) -> None:
        self._handles = handles
        self._pools: dict[tuple[str, bool], Pool] = {}
        self._durability = Durability()
        self._closed = False

    async def read_into(self, extents: Sequence[Extent], buffers: Sequence[memoryview], priority: Priority = Priority.SOON) -> Span:
        """Fill `buffers[i]` with the bytes of `extents[i]`."""
        jobs: list[Job] = []
        for extent, buffer in pairs(extents, buffers):
            cut = list(pieces(extent, 0, direct=False)) or [Piece(extent.offset, 0, 0, 0)]  # an empty read still finds its file
            jobs.extend(partial(self._with_handle, extent.file, False, partial(self._fill, extent.file, piece, buffer)) for piece in cut)
        return await self._carry_out(jobs)

    async def write(self, extents: Sequence[Extent], buffers: Sequence[memoryview]) -> Span:
        """Write `buffers[i]` to `extents[i]`."""
        return await self._carry_out(
            [
                partial(self._with_handle, extent.file, True, partial(write_all, extent, buffer))
                for extent, buffer in pairs(extents, buffers)
            ]
        )

    async def sync(self, file: str) -> None:
        """Flush `file` to the drive."""

        async def flush(handle: Handle) -> None:
            await anyio.to_thread.run_sync(self._durability.sync, file, handle.file.fileno())

        await self._carry_out([partial(self._with_handle, file, True, flush)])

    async def forget(self, file: str) -> None:
        """Close `file`; a later read or write opens what is there then."""
        self._check()
        with anyio.CancelScope(shield=True):
            for writable in (False, True):
                if (pool := self._pools.pop((file, writable), None)) is not None:
                    await pool.close()
        self._durability.forget(file)

    async def size(self, file: str) -> int:
        """The size of `file` in bytes."""
        sizes: list[int] = []

        async def measure(handle: Handle) -> None:
            sizes.append(os.fstat(handle.file.fileno()).st_size)

        await self._carry_out([partial(self._with_handle, file, False, measure)])
        return sizes[0]

    async def aclose(self) -> None:
        """Wait for what is in flight and close the files."""
        self._closed = True
        with anyio.CancelScope(shield=True):
            for pool in self._pools.values():
                await pool.close()
            self._pools.clear()

    def __repr__(self) -> str:
        return f"<PortableDisk {len(self._pools)} files, {self._handles} handles on each>"

    async def _carry_out(self, jobs: Sequence[Job]) -> Span:
        """Run the jobs, as many at a time as there are handles. Own tasks, so that even asyncio's `cancel()` waits for them."""
        self._check()
        start, rest, errors = perf_counter(), iter(jobs), list[DiskError]()
        async with anyio.create_task_group() as group:

            async def lane(jobs: Iterator[Job]) -> None:
                try:
                    for job in jobs:
                        await anyio.lowlevel.checkpoint()
                        await job()
                except DiskError as error:
                    errors.append(error)
                    group.cancel_scope.cancel()

            for _ in range(min(self._handles, len(jobs))):
                group.start_soon(lane, rest)
        if errors:
            raise errors[0]
        return Span(start, perf_counter())

    def _check(self) -> None:
        if self._closed:
            raise DiskError("this disk is closed; open the runtime again")

    async def _with_handle(self, path: str, writable: bool, operation: Callable[[Handle], Awaitable[object]]) -> None:
        """Shielded while it runs: a thread has the caller's buffer."""
        pool = self._pools.setdefault((path, writable), Pool(1 if writable else self._handles))
        async with pool.turns:
            with anyio.CancelScope(shield=True):
                try:
                    handle = pool.free.pop() if pool.free else await self._open(path, writable, pool)
                    try:
                        await operation(handle)
                    finally:
                        pool.free.append(handle)
                except OSError as error:
                    raise disk_error(error, path) from error

    async def _open(self, path: str, writable: bool, pool: Pool) -> Handle:
        on_asyncio = isinstance(anyio.lowlevel.current_token().native_token, asyncio.AbstractEventLoop)
        handle = await (open_with_aiofiles if on_asyncio else open_with_anyio)(path, "r+b" if writable else "rb", self._opener)
        pool.identity = pool.identity or identity(os.fstat(handle.file.fileno()))
        return handle

    def _opener(self, path: str, flags: int) -> int:
        if flags & os.O_RDWR:
            fd, created = open_for_writing(path)
            if created:
                self._durability.made(path)
            return fd
        fd = os.open(path, flags | os.O_NONBLOCK)  # a FIFO in place of a file must not block the opener
        regular(fd, path)
        return fd

    async def _fill(self, path: str, piece: Piece, buffer: memoryview, handle: Handle) -> None:
        if (path, True) not in self._pools and identity(os.fstat(handle.file.fileno())) != self._pools[path, False].identity:
            raise changed(path)
        got = 0
        await handle.file.seek(piece.offset)
        while got < piece.length:
            count = await handle.file.readinto(buffer[piece.start + got : piece.start + piece.length])
            if not count:
                raise truncated(path, piece.offset + got, piece.length - got)
            got += count


async def write_all(extent: Extent, buffer: memoryview, handle: Handle) -> None:
    """All of `buffer` at `extent`."""
    done = 0
    await handle.file.seek(extent.offset)
    while done < buffer.nbytes:
        if not (count := await handle.file.write(buffer[done : done + PIECE])):
            raise nothing_written(extent.file, extent.offset + done)
        done += count


async def open_with_aiofiles(path: str, mode: Mode, opener: Opener) -> Handle:
    """An unbuffered file on asyncio."""
    file: Any = await aiofiles.open(path, mode, buffering=0, opener=opener)
    return Handle(file, file.close)


async def open_with_anyio(path: str, mode: Mode, opener: Opener) -> Handle:
    """An unbuffered file on any event loop."""
    file: Any = await anyio.open_file(path, mode, buffering=0, opener=opener)
    return Handle(file, file.aclose)
