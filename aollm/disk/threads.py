"""Disk back end `threads`: preadv and pwritev in a few threads, direct where the filesystem allows it.

The default. Operations wait in one heap, so that small urgent reads pass large ones that are ahead of need.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import PriorityQueue
from time import perf_counter

import anyio

from ..errors import DiskError
from ..port import Port
from .base import ALIGNMENT, BOUNCE, Extent, Piece, Priority, Span, address, down, pairs, pieces
from .files import Files, OpenFile
from .strip import Strip, after, strips
from .transfer import Transfer
from .trouble import disk_error, nothing_written, truncated

Job = Callable[[memoryview], object]
"""One operation; it may use the worker's own aligned `BOUNCE` bytes."""

THREADS = 6
"""Operations in flight. Six of 2 MiB keep an NVMe-class drive busy; more gain nothing."""


class ThreadsDisk:
    """Reads and writes with `threads` workers; completions come through `port`."""

    name = "threads"

    def __init__(self, port: Port, threads: int = THREADS, direct: bool = True) -> None:
        self.files = Files(direct)
        self._port = port
        self._closed = False
        self._sequence = itertools.count()
        self._jobs: PriorityQueue[tuple[int, int, Transfer | None, Job]] = PriorityQueue()
        self._workers = [threading.Thread(target=self._work, name=f"aollm-disk-{i}", daemon=True) for i in range(threads)]
        for worker in self._workers:
            worker.start()

    async def read_into(self, extents: Sequence[Extent], buffers: Sequence[memoryview], priority: Priority = Priority.SOON) -> Span:
        """Fill `buffers[i]` with the bytes of `extents[i]`."""
        jobs: list[Job] = []
        for extent, buffer in pairs(extents, buffers):
            file = await self.opened(extent.file)
            file.check()
            for piece in pieces(extent, address(buffer), file.mode == "direct"):
                jobs.append(partial(read_piece, file, piece, buffer))
        return await self._submit(jobs, priority)

    async def write(self, extents: Sequence[Extent], buffers: Sequence[memoryview]) -> Span:
        """Write `buffers[i]` to `extents[i]`, direct where both lie on whole pages."""
        cut = list(strips(extents, buffers))
        files = {file: await self.opened(file, writable=True) for file in dict.fromkeys(extent.file for extent in extents)}
        return await self._submit([partial(write_strip, files[strip.file], strip) for strip in cut], Priority.SOON)

    async def sync(self, file: str) -> None:
        """Flush `file` to the drive."""
        await self._submit([lambda bounce: self.files.sync(file)], Priority.NOW)

    async def forget(self, file: str) -> None:
        """Close `file`; a later read or write opens what is there then."""
        await self._submit([lambda bounce: self.files.forget(file)], Priority.NOW)

    async def size(self, file: str) -> int:
        """The size of `file` in bytes."""
        return os.fstat((await self.opened(file)).fd).st_size

    async def opened(self, path: str, writable: bool = False) -> OpenFile:
        """The open file; opening it for the first time is left to a worker, for it may wait for the drive."""
        if not self.files.has(path, writable):
            await self._submit([lambda bounce: self.files.get(path, writable)], Priority.NOW)
        return self.files.get(path, writable)

    async def aclose(self) -> None:
        """Let the workers finish what is queued and end, then close the files."""
        self._closed = True
        for _ in self._workers:
            self._jobs.put((len(Priority), next(self._sequence), None, _nothing))
        with anyio.CancelScope(shield=True):
            while any(worker.is_alive() for worker in self._workers):  # noqa: ASYNC110  a thread's end sets no event
                await anyio.sleep(0.001)
        self.files.close()

    def __repr__(self) -> str:
        return f"<ThreadsDisk {len(self._workers)} threads, {self._jobs.qsize()} waiting>"

    async def _submit(self, jobs: Sequence[Job], priority: Priority) -> Span:
        if not jobs:
            now = perf_counter()
            return Span(now, now)
        if self._closed:
            raise DiskError("this disk is closed; open the runtime again")
        transfer = Transfer(len(jobs), self._port.post)
        for job in jobs:
            self._jobs.put((priority, next(self._sequence), transfer, job))
        return await transfer.wait()

    def _work(self) -> None:
        bounce = memoryview(mmap.mmap(-1, BOUNCE))
        while True:
            _, _, transfer, job = self._jobs.get()
            if transfer is None:
                return
            error: BaseException | None = None
            if transfer.begin():
                try:
                    job(bounce)
                except BaseException as raised:  # carried to the caller
                    error = raised
                del job  # with it goes the hold on the caller's buffer
                transfer.finish(error)
                del transfer, error


def read_piece(file: OpenFile, piece: Piece, buffer: memoryview, bounce: memoryview) -> None:
    """One operation of a read, whole or with a `DiskError`."""
    target = bounce[: piece.nbytes] if piece.bounced else buffer[piece.start : piece.start + piece.length]
    wanted, got = piece.skip + piece.length, 0
    try:
        while got < wanted:
            at = down(got) if file.mode == "direct" else got  # a short read may end anywhere, a direct one begins aligned
            reached = at + os.preadv(file.fd, [target[at:]], piece.offset + at, file.flags)
            if reached <= got:
                raise truncated(file.path, piece.offset + got, wanted - got)
            got = reached
        file.drop_pages(piece.offset, piece.nbytes)
    except OSError as error:
        raise disk_error(error, file.path, piece.offset + got) from error
    if piece.bounced:
        buffer[piece.start : piece.start + piece.length] = bounce[piece.skip : wanted]


def write_strip(file: OpenFile, strip: Strip, bounce: memoryview) -> None:
    """One operation of a write, whole or with a `DiskError`."""
    fd = file.direct if strip.aligned and file.direct is not None else file.fd
    rest, at = list(strip.parts), strip.offset
    while rest:
        try:
            count = os.pwritev(fd, rest, at)
        except OSError as error:
            if error.errno != errno.EINVAL or fd == file.fd:
                raise disk_error(error, file.path, at) from error
            fd = file.fd  # this filesystem wants more than whole pages
            continue
        if count <= 0:
            raise nothing_written(file.path, at)
        rest, at = after(rest, count), at + count
        if at % ALIGNMENT:  # a short write may end anywhere, and a direct one cannot begin there
            fd = file.fd


def _nothing(bounce: memoryview) -> None:
    """The job of a worker that is told to end."""
