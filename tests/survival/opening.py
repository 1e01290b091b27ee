"""One run of a persistent cache without a model: opened as a runtime does it, used by `body`, and closed.

Small files, small memory and one disk thread, so that everything happens soon and in the same order each time.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread

from aollm.disk.base import Disk, Extent
from aollm.disk.portable import PortableDisk
from aollm.disk.threads import ThreadsDisk
from aollm.errors import StoreError
from aollm.maths.attention import BLOCK
from aollm.port import Port
from aollm.stores.cache import Cache
from aollm.stores.identity import Identity
from aollm.stores.journal import JournalLayout
from aollm.stores.layout import Layout
from aollm.stores.persistent import Persistent
from aollm.stores.pool import BlockPool
from aollm.stores.presets import PRESETS, Preset
from aollm.stores.record import record_nbytes
from aollm.stores.records import Records
from aollm.stores.residency import SpillPolicy
from aollm.stores.segmented import SegmentedLayout
from aollm.stores.volume import Volume
from aollm.trace import Trace

from .sequences import SHAPE

WINDOW = 2 * BLOCK
MEMORY_TOKENS = 6 * BLOCK
Body = Callable[[Cache], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A preset, a disk, and what may be kept."""

    preset: str
    disk: str = "threads"
    max_bytes: int | None = None
    weights: str = "1"

    @property
    def row(self) -> Preset:
        """The preset's row of the table."""
        return PRESETS[self.preset]

    @property
    def window(self) -> int | None:
        """Tokens that a sequence keeps."""
        return WINDOW if self.row.windowed else None

    @property
    def record_nbytes(self) -> int:
        """Bytes of a whole block of one layer on disk."""
        return record_nbytes(self.row.codec.payload_nbytes(BLOCK, SHAPE.row_nbytes, SHAPE.dtype.itemsize))

    @property
    def identity(self) -> Identity:
        """What the payload depends on."""
        return Identity({"weights": self.weights, "codec": self.row.codec.representation, "window": str(self.window)})

    def layout(self) -> Layout:
        """The preset's, but with files that are soon full and soon worn."""
        assert self.row.layout is not None
        found = self.row.layout(self.record_nbytes, self.window)
        if isinstance(found, JournalLayout):
            return JournalLayout(4)
        return SegmentedLayout(3 * self.record_nbytes) if isinstance(found, SegmentedLayout) else found


async def session(root: Path, kind: Kind, body: Body) -> None:
    """Open, `await body(cache)`, close. Raises `AollmError`s as they come."""
    async with Port() as port:
        disk: Disk = ThreadsDisk(port, 1) if kind.disk == "threads" else PortableDisk(1)
        try:
            cache = await _cache(root, kind, disk)
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(cache.run)
                    try:
                        await body(cache)
                    finally:
                        group.cancel_scope.cancel()
            finally:
                with anyio.CancelScope(shield=True):
                    await cache.aclose()
                cache.pool.forget()
        finally:
            with anyio.CancelScope(shield=True):
                await disk.aclose()


async def _cache(root: Path, kind: Kind, disk: Disk) -> Cache:
    layout = kind.layout()
    volume = await anyio.to_thread.run_sync(lambda: Volume.open(root, kind.identity, kind.row.persistence_format, BLOCK, SHAPE.layers))
    try:
        for node in volume.index.nodes():
            for place in (*node.places, *node.states):
                layout.restore(Extent(os.path.basename(place.extent.file), place.extent.offset, place.extent.nbytes))
    except (StoreError, ValueError) as error:
        volume.close()
        raise StoreError(f"{volume.path} cannot be continued: {error}") from error
    records = Records(disk, volume, layout, kind.row.codec, SHAPE, Trace())
    pool = BlockPool(MEMORY_TOKENS, 8, 8 * BLOCK, SHAPE)
    policy = SpillPolicy("survival", 1, 2 * kind.record_nbytes, 3600.0, 32, 1 << 20)
    return Cache(pool, records, kind.row.residency, Persistent(volume, records, kind.max_bytes), policy, kind.window, 1 << 20, 1 << 18)
