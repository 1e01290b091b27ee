"""Cells on disk: written, read, verified and let go. All of it waits; where in which file is the layout's affair.

A record is trusted when its header and payload are those that were asked for, and never otherwise: what is damaged when
it is read twice is a miss, counted and forgotten. It refuses to know what is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import anyio
import anyio.to_thread
from torch import Tensor

from ..buffers import PAGE, Arena
from ..disk.base import Disk, Extent, Priority
from ..errors import DiskError, StoreError
from ..maths.attention import BLOCK
from ..trace import Event, EventName, Trace
from .cell import Cell, Run
from .codec import Codec
from .layout import Layout
from .record import Header, Kind, Place, payload_sum, record_nbytes, verify
from .scratch import Scratch
from .shape import Shape
from .volume import Volume

NOBODY = bytes(16)
"""The digest of blocks that nobody will look for."""


@dataclass(frozen=True, slots=True)
class Item:
    """A cell that is to be written, filled for `rows` rows; `block` is the digest of the tokens up to its end."""

    cell: Cell
    rows: int
    store: int
    block: bytes = NOBODY


@dataclass(frozen=True, slots=True)
class Loaded:
    """A block that was read and verified; decoded where torch may compute."""

    cell: Cell
    header: Header
    payload: memoryview
    codec: Codec
    shape: Shape

    def decode(self) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, K, D]; they may be views of the memory that was read into."""
        shape = self.shape
        return self.codec.decode(self.header.extra, self.payload, self.header.rows, shape.heads, shape.head_dim, shape.dtype)


class Records:
    """Records of cells in the files of one volume, in one layout."""

    def __init__(self, disk: Disk, volume: Volume | Scratch, layout: Layout, codec: Codec, shape: Shape, trace: Trace) -> None:
        self.volume, self.layout, self.codec, self.shape = volume, layout, codec, shape
        self.record_nbytes = record_nbytes(codec.payload_nbytes(BLOCK, shape.row_nbytes, shape.dtype.itemsize))
        self.placed: dict[tuple[str, int], Cell] = {}
        """Cells by file and offset of their records."""
        self.corrupt = self.unreadable = 0
        self.written_nbytes = 0
        self._disk, self._trace = disk, trace
        self._unsynced: set[str] = set()
        self._doomed: list[str] = []
        self._burying = anyio.Lock()
        """Held while files are removed: nothing is to be placed in one that is about to go."""

    async def read(self, run: Run, buffer: memoryview) -> list[Loaded]:
        """The cells of a run, read into `buffer` (of `run.nbytes`). Raises `StoreError` unless all are what was stored."""
        places = [cell.place for cell in run.cells if cell.place is not None]
        try:
            headers = await self._trusted(places, buffer)
        except DiskError as error:
            self.unreadable += len(places)
            raise StoreError(f"unreadable: {error}") from error
        loaded, at = [], 0
        for cell, place, header in zip(run.cells, places, headers, strict=True):
            loaded.append(Loaded(cell, header, buffer[at + PAGE : at + PAGE + header.nbytes], self.codec, self.shape))
            at += place.extent.nbytes
        return loaded

    async def read_apart(self, cell: Cell) -> Loaded:
        """One cell, in memory of its own."""
        run = Run((cell,))
        return (await self.read(run, Arena(run.nbytes, huge=False).bytes))[0]

    async def read_bytes(self, place: Place) -> memoryview:
        """A whole record, verified, in memory of its own: header page and payload."""
        buffer = Arena(place.extent.nbytes, huge=False).bytes
        await self._trusted([place], buffer)
        return buffer

    async def write(self, items: Sequence[Item]) -> None:
        """Write cells that are in memory, and tell them their places. Raises `DiskError`, and then no cell has changed."""

        def encode() -> list[tuple[bytes, list[memoryview], int]]:
            encoded = []
            for item in items:
                assert item.cell.slot is not None
                extra, parts = self.codec.encode(item.cell.slot.keys[: item.rows], item.cell.slot.values[: item.rows])
                encoded.append((extra, parts, payload_sum(parts)))
            return encoded

        encoded = await anyio.to_thread.run_sync(encode)
        records = [
            (self.header(Kind.KV, item.block, item.cell.layer, item.cell.index, item.rows, parts, extra), parts, check, item.store)
            for item, (extra, parts, check) in zip(items, encoded, strict=True)
        ]
        for item, place in zip(items, await self.put(records), strict=True):
            item.cell.place = place
            self.placed[place.extent.file, place.extent.offset] = item.cell

    async def put(
        self, records: Sequence[tuple[Header, Sequence[memoryview], int, int]], event: EventName = "kvsave"
    ) -> list[Place]:  # fmt: skip
        """Write records, each a header, the payload's parts, their checksum and the number of its store; returns where they are."""
        extents: list[Extent] = []
        buffers: list[memoryview] = []
        places: list[Place] = []
        fronts = Arena(PAGE * len(records), huge=False).bytes
        try:
            async with self._burying:
                for header, _, _, store in records:
                    where = self.layout.place(store, header.layer, header.index, record_nbytes(header.nbytes))
                    where = replace(where, file=os.path.join(self.volume.path, where.file))
                    if where.file in self._doomed:  # it lives again
                        self._doomed.remove(where.file)
                    places.append(Place(header, where))
            for number, ((_, parts, check, _), place) in enumerate(zip(records, places, strict=True)):
                header, where = place.header, place.extent
                front = fronts[number * PAGE : (number + 1) * PAGE]
                packed = header.pack(check)
                front[: len(packed)] = packed
                at = where.offset
                for part in (front, *parts):
                    extents.append(Extent(where.file, at, part.nbytes))
                    buffers.append(part)
                    at += part.nbytes
            span = await self._disk.write(extents, buffers)
        except BaseException:
            self.free(places)
            raise
        finally:
            self._unsynced.update(place.extent.file for place in places)
        layer = records[0][0].layer if len({header.layer for header, *_ in records}) == 1 else -1
        nbytes = sum(extent.nbytes for extent in extents)
        self.written_nbytes += nbytes
        self._trace.add(Event(event, span.start, span.end, layer, nbytes=nbytes, path="disk-kv-cache"))
        return places

    def header(
        self, kind: Kind, block: bytes, layer: int, index: int, rows: int, parts: Iterable[memoryview], extra: bytes = b""
    ) -> Header:  # fmt: skip
        """A header for a new record."""
        volume = self.volume
        nbytes = sum(part.nbytes for part in parts)
        return Header(kind, volume.identity.digest, block, volume.generation, volume.next_sequence(), layer, index, rows, nbytes, extra)

    def forget(self, cell: Cell) -> None:
        """The cell's place is free."""
        if cell.place is not None:
            self.placed.pop((cell.place.extent.file, cell.place.extent.offset), None)
            self.free([cell.place])
            cell.place = None

    def keep(self, cell: Cell, place: Place) -> None:
        """`place`, which was written from a copy of `cell`, is the cell's, if anybody still owns that."""
        name = place.extent.file, place.extent.offset
        if cell.owners:
            cell.place = place
            self.placed[name] = cell
        else:
            self.placed.pop(name, None)
            self.free([place])

    def free(self, places: Iterable[Place]) -> None:
        """Room that may be used again; files that nothing is left in are removed when no pass is under way."""
        for place in places:
            folder, name = os.path.split(place.extent.file)
            if folder == str(self.volume.path):
                self._doomed += [os.path.join(folder, file) for file in self.layout.drop(replace(place.extent, file=name))]

    async def sync(self) -> None:
        """Have what was written survive a power cut. Raises `DiskError`."""
        for file in sorted(self._unsynced - set(self._doomed)):
            self._unsynced.discard(file)  # what is written meanwhile is not part of it
            try:
                await self._disk.sync(file)
            except BaseException:
                self._unsynced.add(file)
                raise

    async def bury(self) -> None:
        """Remove the files that nothing is left in; nothing of them may be in flight."""
        async with self._burying:
            while self._doomed:
                file = self._doomed.pop()
                self._unsynced.discard(file)
                await self._disk.forget(file)
                await anyio.to_thread.run_sync(self.volume.folder.remove, os.path.basename(file))

    async def aclose(self) -> None:
        """Let go of all files."""
        with anyio.CancelScope(shield=True):
            for file in sorted({file for file, _ in self.placed} | self._unsynced | set(self._doomed)):
                await self._disk.forget(file)
            await anyio.to_thread.run_sync(self.volume.close)

    @property
    def unsynced(self) -> bool:
        """Whether something was written that a power cut would take."""
        return bool(self._unsynced)

    def __repr__(self) -> str:
        return f"<Records {self.layout.name} in {self.volume.path}, {self.layout.nbytes >> 20} MiB>"

    async def _trusted(self, places: Sequence[Place], buffer: memoryview) -> list[Header]:
        """Read and verify; what is damaged is read a second time, for it may be right where it lies."""
        await self._read(places, buffer)
        try:
            return await anyio.to_thread.run_sync(_verified, places, buffer)
        except StoreError:
            await self._read(places, buffer)
        try:
            return await anyio.to_thread.run_sync(_verified, places, buffer)
        except StoreError:
            self.corrupt += 1
            raise

    async def _read(self, places: Sequence[Place], buffer: memoryview) -> None:
        extents: list[Extent] = []
        for place in places:
            if extents and extents[-1].file == place.extent.file and extents[-1].end == place.extent.offset:
                extents[-1] = replace(extents[-1], nbytes=extents[-1].nbytes + place.extent.nbytes)
            else:
                extents.append(place.extent)
        parts, at = [], 0
        for extent in extents:
            parts.append(buffer[at : at + extent.nbytes])
            at += extent.nbytes
        span = await self._disk.read_into(extents, parts, Priority.NOW)
        self._trace.add(Event("kvload", span.start, span.end, places[0].header.layer, nbytes=at, path="disk-kv-cache"))


def _verified(places: Sequence[Place], buffer: memoryview) -> list[Header]:
    """The headers as stored. Runs in a worker thread: checksums take a tenth of a millisecond a megabyte."""
    headers, at = [], 0
    for place in places:
        payload = buffer[at + PAGE : at + PAGE + place.header.nbytes]
        headers.append(verify(buffer[at : at + PAGE], [payload], place.header))
        at += place.extent.nbytes
    return headers
