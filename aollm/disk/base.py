"""What a disk is: bytes of extents into buffers and back, without blocking the event loop.

A disk knows files, offsets and sizes; it refuses to know what the bytes mean. Reads return exactly the bytes asked
for, wherever they start: alignment is the disk's own affair (`pieces`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

ALIGNMENT = 4096
"""Offset, length and address of a direct read are multiples of this many bytes."""
PIECE = 2 << 20
"""Bytes of one operation: large enough that Python's cost per operation (about 40 µs) is below 5 % of a core."""
BOUNCE = 256 << 10
"""Bytes of one bounced operation, for what does not line up with memory."""


class Priority(IntEnum):
    """Who goes first when reads queue: small reads that a computation waits for pass large ones ahead of need, and those pass
    what may not be needed at all."""

    NOW = 0
    SOON = 1
    PERHAPS = 2


@dataclass(frozen=True, slots=True)
class Extent:
    """Where bytes are: `nbytes` of `file` from `offset`."""

    file: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The offset just past the last byte."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Span:
    """When the bytes of a transfer really moved: `start` and `end` in `time.perf_counter()` seconds."""

    start: float
    end: float


class Disk(Protocol):
    """Reads and writes extents. Every failure is a `DiskError`; cancelling a transfer waits for what is in flight."""

    name: str

    async def read_into(self, extents: Sequence[Extent], buffers: Sequence[memoryview], priority: Priority = Priority.SOON) -> Span:
        """Fill `buffers[i]` with the bytes of `extents[i]` (equal sizes)."""
        ...

    async def write(self, extents: Sequence[Extent], buffers: Sequence[memoryview]) -> Span:
        """Write `buffers[i]` to `extents[i]` (apart from each other), creating or growing files; durable only after `sync`."""
        ...

    async def sync(self, file: str) -> None:
        """Return when all that was written to `file` would survive a power cut."""
        ...

    async def forget(self, file: str) -> None:
        """Let go of `file`: it is about to be removed or replaced. Nothing of it may be in flight."""
        ...

    async def size(self, file: str) -> int:
        """The size of `file` in bytes; `DiskError` when there is none."""
        ...

    async def aclose(self) -> None:
        """Wait for what is in flight and give threads and descriptors back."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """One operation on `nbytes` at `offset`; with `bounced`, through an own aligned buffer of which bytes from `skip` on count."""

    offset: int
    nbytes: int
    start: int
    """First byte of the caller's buffer that it fills."""
    length: int
    """Bytes of the caller's buffer that it fills."""
    skip: int = 0
    bounced: bool = False


def pairs(extents: Sequence[Extent], buffers: Sequence[memoryview]) -> Iterator[tuple[Extent, memoryview]]:
    """Each extent with its buffer; `ValueError` unless the buffers are bytes, one per extent and of its size."""
    for extent, buffer in zip(extents, buffers, strict=True):
        if len(buffer) != extent.nbytes or buffer.itemsize != 1:
            raise ValueError(f"{extent} does not match a buffer of {len(buffer)} × {buffer.itemsize} bytes")
        yield extent, buffer


def address(buffer: memoryview) -> int:
    """The address of a writable buffer's first byte."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer.nbytes else 0


def pieces(extent: Extent, target: int, direct: bool) -> Iterator[Piece]:
    """Cut a read into operations. `target` is the address of its buffer.

    Where file offset and address agree modulo `ALIGNMENT`, everything but the two edges lands in place; the edges, and
    all of it where they disagree, are over-read into a bounce buffer. Without `direct` no alignment is needed.
    """
    if not direct:
        yield from _in_place(extent.offset, extent.end, extent.offset)
        return
    inner, last = _up(extent.offset), down(extent.end)
    if (target - extent.offset) % ALIGNMENT or inner >= last:
        yield from _bounced(extent.offset, extent.end, extent.offset)
        return
    yield from _bounced(extent.offset, inner, extent.offset)
    yield from _in_place(inner, last, extent.offset)
    yield from _bounced(last, extent.end, extent.offset)


def _in_place(start: int, end: int, origin: int) -> Iterator[Piece]:
    for at in range(start, end, PIECE):
        length = min(PIECE, end - at)
        yield Piece(at, length, at - origin, length)


def _bounced(start: int, end: int, origin: int) -> Iterator[Piece]:
    at = start
    while at < end:
        low = down(at)
        high = min(low + BOUNCE, _up(end))
        length = min(high, end) - at
        yield Piece(low, high - low, at - origin, length, at - low, bounced=True)
        at += length


def down(offset: int) -> int:
    """The last aligned offset that is not past `offset`."""
    return offset // ALIGNMENT * ALIGNMENT


def _up(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
