"""Disk back end `memory`: files in a dict, for tests of what reads and writes. It can delay, fail and come back short.

It keeps what was asked of it, in order: `reads`, `writes`, `synced`, `forgotten`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Self

import anyio

from ..errors import DiskError
from .base import Extent, Priority, Span, pairs
from .trouble import truncated

Rule = Callable[[Extent], Exception | None]
"""The error that an extent meets, if any."""


class MemoryDisk:
    """Files by name; those given are kept, `bytearray`s without a copy, so that a test may alter them.

    `delay_s`: seconds that each call takes, or a rule for each extent (the longest counts). `fail` and `fail_write`:
    rules for the extents of reads and writes. `short`: reads fill half of the buffer and then fail.

        disk = MemoryDisk({"a": b"0123"}, fail=lambda extent: DiskError("gone") if extent.offset else None)
    """

    name = "memory"

    def __init__(
        self,
        files: Mapping[str, bytes | bytearray] | None = None,
        *,
        delay_s: float | Callable[[Extent], float] = 0.0,
        fail: Rule | None = None,
        fail_write: Rule | None = None,
        short: bool = False,
    ) -> None:
        self.files = {name: data if isinstance(data, bytearray) else bytearray(data) for name, data in (files or {}).items()}
        self.delay_s, self.fail, self.fail_write, self.short = delay_s, fail, fail_write, short
        self.reads: list[Extent] = []
        self.writes: list[Extent] = []
        self.synced: list[str] = []
        self.forgotten: list[str] = []
        self.closed = False

    @classmethod
    def of(cls, folder: str | Path) -> Self:
        """All weights of a folder, published or exported, by the path as the folder was given and by the path with links resolved."""
        files: dict[str, bytes | bytearray] = {}
        root = Path(folder)
        for path in sorted([*root.glob("*.safetensors"), *root.rglob("*.raw"), *root.rglob("manifest.json")]):
            files[str(path)] = files[os.path.realpath(path)] = bytearray(path.read_bytes())
        return cls(files)

    async def read_into(self, extents: Sequence[Extent], buffers: Sequence[memoryview], priority: Priority = Priority.SOON) -> Span:
        """Fill `buffers[i]` with the bytes of `extents[i]`, all at once when the delay is over."""
        start = await self._begin(extents, self.reads)
        for extent, buffer in pairs(extents, buffers):
            self._meet(self.fail, extent)
            data = self._file(extent.file)
            end = min(extent.end, len(data)) if not self.short else extent.offset + extent.nbytes // 2
            if (got := max(end - extent.offset, 0)) > 0:
                buffer[:got] = memoryview(data)[extent.offset : end]
            if got < extent.nbytes:
                raise truncated(extent.file, end, extent.nbytes - got)
        return Span(start, perf_counter())

    async def write(self, extents: Sequence[Extent], buffers: Sequence[memoryview]) -> Span:
        """Write `buffers[i]` to `extents[i]`."""
        start = await self._begin(extents, self.writes)
        for extent, buffer in pairs(extents, buffers):
            self._meet(self.fail_write, extent)
            data = self.files.setdefault(extent.file, bytearray())
            data.extend(bytes(max(extent.end - len(data), 0)))
            data[extent.offset : extent.end] = buffer
        return Span(start, perf_counter())

    async def sync(self, file: str) -> None:
        """Note that `file` was synced."""
        await self._begin([], self.writes)
        self._file(file)
        self.synced.append(file)

    async def forget(self, file: str) -> None:
        """Drop the bytes of `file`: nobody else would remove them."""
        await self._begin([], self.writes)
        self.files.pop(file, None)
        self.forgotten.append(file)

    async def size(self, file: str) -> int:
        """The size of `file` in bytes."""
        await self._begin([], self.reads)
        return len(self._file(file))

    async def aclose(self) -> None:
        """Refuse what comes after; the files stay, for the test to look at."""
        self.closed = True

    def __repr__(self) -> str:
        return f"<MemoryDisk {len(self.files)} files, {len(self.reads)} reads, {len(self.writes)} writes>"

    async def _begin(self, extents: Sequence[Extent], record: list[Extent]) -> float:
        if self.closed:
            raise DiskError("this disk is closed; open the runtime again")
        start = perf_counter()
        record.extend(extents)
        delay_s = self.delay_s
        await anyio.sleep(delay_s if not callable(delay_s) else max(map(delay_s, extents), default=0.0))
        return start

    def _meet(self, rule: Rule | None, extent: Extent) -> None:
        if rule is not None and (error := rule(extent)) is not None:
            raise error

    def _file(self, name: str) -> bytearray:
        try:
            return self.files[name]
        except KeyError:
            raise DiskError(f"{name}: no such file in this memory disk") from None
