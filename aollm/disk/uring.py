"""Disk back end `uring`: direct reads through the kernel's ring, one queue for all, no threads on their way.

For drives that take many small reads, it costs less of the processor than `threads`. It refuses to write,
and to touch the page cache: both go to a small `ThreadsDisk`.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import itertools
import mmap
import os
from collections.abc import Sequence
from time import perf_counter

import anyio

from ..errors import DiskError
from ..port import Port
from .base import BOUNCE, Extent, Piece, Priority, Span, address, down, pairs, pieces
from .files import OpenFile
from .ring import Ring, probe
from .threads import ThreadsDisk
from .transfer import Call, Transfer
from .trouble import disk_error, truncated

__all__ = ["UringDisk", "probe"]

DEPTH = 16
"""Operations in flight."""


class Operation:
    """One piece of a read: how much of it has come, and where it comes to while it is in flight."""

    __slots__ = ("buffer", "file", "got", "hold", "piece", "sequence", "slot", "transfer", "urgency")

    def __init__(self, urgency: int, sequence: int, transfer: Transfer, file: OpenFile, piece: Piece, buffer: memoryview) -> None:
        self.urgency, self.sequence = urgency, sequence
        self.transfer, self.file, self.piece, self.buffer = transfer, file, piece, buffer
        self.got = 0
        self.slot: int | None = None
        self.hold: ctypes.c_char | None = None

    def __lt__(self, other: Operation) -> bool:
        return (self.urgency, self.sequence) < (other.urgency, other.sequence)

    @property
    def wanted(self) -> int:
        """Bytes that must come before the piece is whole."""
        return self.piece.skip + self.piece.length


class UringDisk:
    """Reads with up to `depth` operations in flight; `port` is woken by the kernel. Raises `OSError` where `probe` has a reason.

    Made, used and closed in the event loop's thread.
    """

    name = "uring"

    def __init__(self, port: Port, depth: int = DEPTH, direct: bool = True) -> None:
        self._ring = Ring(depth, port.fd)
        self._port = port
        self._depth = depth
        self._rest = ThreadsDisk(port, threads=2, direct=direct)
        self._bounce = memoryview(mmap.mmap(-1, depth * BOUNCE))
        self._slots = list(range(depth))
        self._sequence = itertools.count()
        self._waiting: list[Operation] = []
        self._flying: dict[int, Operation] = {}
        self._closed = False
        port.polls.append(self._reap)

    async def read_into(self, extents: Sequence[Extent], buffers: Sequence[memoryview], priority: Priority = Priority.SOON) -> Span:
        """Fill `buffers[i]` with the bytes of `extents[i]`."""
        cut: list[tuple[OpenFile, Piece, memoryview]] = []
        others: list[tuple[Extent, memoryview]] = []
        for extent, buffer in pairs(extents, buffers):
            file = await self._rest.opened(extent.file)
            if file.mode != "direct":
                others.append((extent, buffer))
                continue
            file.check()
            cut.extend((file, piece, buffer) for piece in pieces(extent, address(buffer), direct=True))
        spans = [await self._read(cut, priority)] if cut else []
        if others:
            spans.append(await self._rest.read_into([extent for extent, _ in others], [buffer for _, buffer in others], priority))
        now = perf_counter()
        return Span(min((span.start for span in spans), default=now), max((span.end for span in spans), default=now))

    async def write(self, extents: Sequence[Extent], buffers: Sequence[memoryview]) -> Span:
        """Write `buffers[i]` to `extents[i]`."""
        return await self._rest.write(extents, buffers)

    async def sync(self, file: str) -> None:
        """Flush `file` to the drive."""
        await self._rest.sync(file)

    async def forget(self, file: str) -> None:
        """Close `file`; a later read or write opens what is there then."""
        await self._rest.forget(file)

    async def size(self, file: str) -> int:
        """The size of `file` in bytes."""
        return await self._rest.size(file)

    async def aclose(self) -> None:
        """Let what is queued finish, then give the ring, the threads and the files back."""
        if self._closed:
            return
        with anyio.CancelScope(shield=True):
            while self._flying or self._waiting:
                self._reap()
                await anyio.sleep(0.001)
            self._closed = True
            self._port.polls.remove(self._reap)
            self._ring.close()
            await self._rest.aclose()

    def __repr__(self) -> str:
        return f"<UringDisk {len(self._flying)} of {self._depth} in flight, {len(self._waiting)} waiting>"

    async def _read(self, cut: Sequence[tuple[OpenFile, Piece, memoryview]], priority: Priority) -> Span:
        transfer = Transfer(len(cut), _at_once, self._reap)
        for file, piece, buffer in cut:
            heapq.heappush(self._waiting, Operation(priority, next(self._sequence), transfer, file, piece, buffer))
        self._launch()
        return await transfer.wait()

    def _launch(self) -> None:
        """Put in what has its turn, and hand it over."""
        while self._waiting and len(self._flying) < self._depth:
            operation = heapq.heappop(self._waiting)
            if operation.transfer.begin():
                self._put_in(operation)
        if not self._ring.submit():
            self._port.post(self._launch)

    def _put_in(self, operation: Operation) -> None:
        piece, at = operation.piece, down(operation.got)
        if operation.hold is None:
            if piece.bounced:
                operation.slot = self._slots.pop()
            target = self._bounce if operation.slot is not None else operation.buffer
            operation.hold = ctypes.c_char.from_buffer(target, piece.start if operation.slot is None else operation.slot * BOUNCE)
        self._flying[operation.sequence] = operation
        where = ctypes.addressof(operation.hold) + at
        self._ring.read(operation.sequence, operation.file.fd, where, piece.nbytes - at, piece.offset + at)

    def _reap(self) -> None:
        for sequence, result in self._ring.reap():
            operation = self._flying.pop(sequence)
            try:
                whole = self._land(operation, result)
            except DiskError as error:
                self._finish(operation, error)
                continue
            if whole:
                self._finish(operation, None)
            else:
                self._put_in(operation)
        self._launch()

    def _land(self, operation: Operation, result: int) -> bool:
        """Whether the piece is whole; if not, it is continued from the last aligned byte that came."""
        piece, file, got = operation.piece, operation.file, operation.got
        if result in (-errno.EINTR, -errno.EAGAIN):
            return False
        if result < 0:
            raise disk_error(OSError(-result, os.strerror(-result)), file.path, piece.offset + got)
        reached = down(got) + result
        if reached <= got:
            raise truncated(file.path, piece.offset + got, operation.wanted - got)
        operation.got = reached
        if reached < operation.wanted:
            return False
        if operation.slot is not None:
            at = operation.slot * BOUNCE
            operation.buffer[piece.start : piece.start + piece.length] = self._bounce[at + piece.skip : at + operation.wanted]
        return True

    def _finish(self, operation: Operation, error: DiskError | None) -> None:
        operation.hold = None
        if operation.slot is not None:
            self._slots.append(operation.slot)
        operation.transfer.finish(error)


def _at_once(call: Call) -> None:
    call()
