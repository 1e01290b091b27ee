"""Compaction: what lives in a worn file is written anew, in order, and the file goes. Deterministic; nothing is ever in one place less.

The new records are durable before anything points to them, and what points to them before the old ones go.
"""

from __future__ import annotations

import os

from ..buffers import PAGE
from .lifecycle import Lifecycle
from .record import Place, unpack
from .records import Records


async def compact(records: Records, lifecycle: Lifecycle) -> bool:
    """Compact one worn file, if there is one. Raises `DiskError` or `StoreError`, and then the file stays as it was."""
    name = records.layout.worn()
    if name is None:
        return False
    file = os.path.join(records.volume.path, name)
    own = [cell.place for (where, _), cell in records.placed.items() if where == file and cell.place is not None]
    moved: dict[Place, Place] = {}
    try:
        for place in sorted({*own, *lifecycle.stored_in(file)}, key=lambda place: place.extent.offset):
            record = await records.read_bytes(place)
            header, check = unpack(record)
            (moved[place],) = await records.put([(header, [record[PAGE : PAGE + header.nbytes]], check, 0)], "kvcompact")
        if lifecycle.persistent:
            await records.sync()
        await lifecycle.moved(moved)
    except BaseException:
        records.free(new for new in moved.values() if new not in lifecycle.stored_in(new.extent.file))  # some are pointed to already
        raise
    for old, new in moved.items():
        cell = records.placed.pop((file, old.extent.offset), None)
        kept = bool(lifecycle.persistent and new in lifecycle.stored_in(new.extent.file))
        if cell is not None:
            cell.place = new
            records.placed[new.extent.file, new.extent.offset] = cell
        if cell is not None or kept:
            records.free([old])
        else:
            records.free([new])  # it was let go, with its old place, while it was moved
    return True
