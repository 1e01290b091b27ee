"""Strips: what a call writes, cut into operations of about `PIECE` bytes each.

Extents that follow each other in a file become one operation with several parts, and a long extent becomes several, so
that threads share a large call. It refuses to know who carries them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .base import ALIGNMENT, PIECE, Extent, address, pairs

PARTS = 1024
"""The system takes no more parts in one operation."""


@dataclass(frozen=True, slots=True)
class Strip:
    """One operation: `parts`, one behind the other, to `file` from `offset`."""

    file: str
    offset: int
    parts: tuple[memoryview, ...]
    aligned: bool
    """Whether offset, sizes and addresses allow a direct write."""


def strips(extents: Sequence[Extent], buffers: Sequence[memoryview]) -> Iterator[Strip]:
    """The operations of a write, in order; `ValueError` for buffers that do not match."""
    file, start, end, parts, whole = "", 0, 0, list[memoryview](), False
    for extent, buffer in pairs(extents, buffers):
        aligned, at = is_aligned(extent, buffer), 0
        while at < extent.nbytes:
            here = extent.offset + at
            goes_on = (extent.file, here, aligned) == (file, end, whole) and end - start < PIECE and len(parts) < PARTS
            if parts and not goes_on:
                yield Strip(file, start, tuple(parts), whole)
                parts.clear()
            if not parts:
                file, start, end, whole = extent.file, here, here, aligned
            length = min(PIECE - (end - start), extent.nbytes - at)
            parts.append(buffer[at : at + length])
            at, end = at + length, end + length
    if parts:
        yield Strip(file, start, tuple(parts), whole)


def is_aligned(extent: Extent, buffer: memoryview) -> bool:
    """Whether the drive can take the bytes from where they are. Only writable memory tells its address."""
    return not (buffer.readonly or extent.offset % ALIGNMENT or extent.nbytes % ALIGNMENT or address(buffer) % ALIGNMENT)


def after(parts: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of `parts` when their first `count` bytes are written."""
    for i, part in enumerate(parts):
        if count < part.nbytes:
            return [part[count:], *parts[i + 1 :]]
        count -= part.nbytes
    return []
