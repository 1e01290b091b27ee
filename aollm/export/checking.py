"""Checking: all bytes of raw files against the checksums that a manifest gives, at the drive's speed.

Blocks are read ahead of need into one ring and summed in worker threads. It refuses to know why somebody wants to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import anyio.to_thread
import xxhash

from ..ahead import Ahead
from ..buffers import Lease, Ring
from ..disk.base import Disk, Extent
from .layout import BLOCK, Block, RawFile, blocks
from .manifest import Summed

RING_NBYTES = 4 * BLOCK
"""Memory that exporting and checking take."""
Progress = Callable[[str, int, int], object]
"""Told what is being done (`writing`, `checking`), the bytes done, and the bytes of all."""
EMPTY = xxhash.xxh3_128().hexdigest()


class Sums:
    """The checksums of one raw file, block by block."""

    def __init__(self) -> None:
        self._whole = xxhash.xxh3_128()
        self._tensors: dict[str, xxhash.xxh3_128] = {}

    def add(self, block: Block, data: memoryview) -> None:
        """One block more, of a file's blocks in order."""
        self._whole.update(data)
        for part in block.parts:
            self._tensors.setdefault(part.tensor, xxhash.xxh3_128()).update(data[part.at : part.at + part.extent.nbytes])

    def of(self, file: RawFile) -> Summed:
        """The file, when all its blocks have been added."""
        names = (place.entry.name for place in file.places)
        tensors = {name: self._tensors[name].hexdigest() if name in self._tensors else EMPTY for name in names}
        return Summed(file, self._whole.hexdigest(), tensors)


async def damaged(folder: Path, files: Sequence[Summed], disk: Disk, progress: Progress) -> dict[str, str]:
    """Which of `files` in `folder` are not as they were summed, and what is wrong with each. Raises `DiskError`."""
    ring, done, whole = Ring(RING_NBYTES), 0, sum(summed.file.nbytes for summed in files)
    found: dict[str, str] = {}

    async def load(block: Block, lease: Lease) -> memoryview:
        memory = ring.arena.bytes[lease.offset : lease.offset + block.nbytes]
        await disk.read_into([Extent(str(folder / block.file.path), block.offset, block.nbytes)], [memory])
        return memory

    plan = (block for summed in files for block in blocks(summed.file))
    async with Ahead(plan, lambda block: block.nbytes, load, ring) as ahead:
        for summed in files:
            sums = Sums()
            for block in blocks(summed.file):
                memory, lease = await ahead.next()
                await anyio.to_thread.run_sync(sums.add, block, memory)
                lease.release()
                done += block.nbytes
                progress("checking", done, whole)
            if (complaint := _complaint(summed, sums.of(summed.file))) is not None:
                found[summed.file.path] = complaint
    return found


def ignore(doing: str, done: int, whole: int) -> None:
    """The progress of what nobody watches."""


def _complaint(expected: Summed, got: Summed) -> str | None:
    if altered := [name for name, checksum in got.tensors.items() if expected.tensors[name] != checksum]:
        more = f" and {len(altered) - 1} more" if len(altered) > 1 else ""
        return f"the bytes of tensor {altered[0]}{more} are not those that were exported"
    return "bytes between its tensors are not those that were exported" if expected.checksum != got.checksum else None
