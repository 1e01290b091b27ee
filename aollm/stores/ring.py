"""A ring of slots per sequence and layer, for a history of which only the end is kept.

Block `index` has slot `index` modulo the number of slots, so that the room of blocks that slid out of the window is
taken again. It refuses to know how long the window is, and to drop what lies in the way.
"""

from __future__ import annotations

import re

from ..disk.base import ALIGNMENT, Extent
from ..errors import StoreError

RING = re.compile(r"store-\d+\.layer-(\d+|none)\.ring")


class RingLayout:
    """Files `store-7.layer-3.ring` of `slots` slots of `record_nbytes` bytes."""

    name = "sliding-window-ring-buffer"

    def __init__(self, slots: int, record_nbytes: int) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}, not at least 1")
        if record_nbytes <= 0 or record_nbytes % ALIGNMENT:
            raise ValueError(f"record_nbytes is {record_nbytes}, not a multiple of {ALIGNMENT}")
        self.nbytes = 0
        self._slots, self._record_nbytes = slots, record_nbytes
        self._live: dict[str, dict[int, Extent]] = {}  # by file and slot

    def place(self, store: int, layer: int, index: int, nbytes: int) -> Extent:
        """The block's slot; `StoreError` while the block that had it a lap ago has not been dropped."""
        if not 0 < nbytes <= self._record_nbytes or nbytes % ALIGNMENT:
            raise ValueError(f"a record of {nbytes} bytes is not whole pages of {ALIGNMENT}, or larger than {self._record_nbytes}")
        file = f"store-{store}.layer-{layer if layer >= 0 else 'none'}.ring"
        extent = Extent(file, index % self._slots * self._record_nbytes, nbytes)
        self._add(extent)
        return extent

    def restore(self, extent: Extent) -> None:
        """`extent` is in use since an earlier run; `StoreError` if it fills no slot, or another record lies there."""
        slot, skip = divmod(extent.offset, self._record_nbytes)
        if not RING.fullmatch(extent.file) or skip or not 0 <= slot < self._slots or not 0 < extent.nbytes <= self._record_nbytes:
            raise StoreError(f"{extent} is no place in a ring of {self._slots} slots of {self._record_nbytes} bytes; purge this store")
        self._add(extent)

    def drop(self, extent: Extent) -> list[str]:
        """Its slot is free; returns its file if that was the last slot in use."""
        slots, slot = self._live.get(extent.file, {}), extent.offset // self._record_nbytes
        if slots.get(slot) != extent:
            raise ValueError(f"{extent} is not in use")
        del slots[slot]
        self.nbytes -= extent.nbytes
        if slots:
            return []
        del self._live[extent.file]
        return [extent.file]

    def worn(self) -> None:
        """Nothing to compact: slots are used again."""

    def _add(self, extent: Extent) -> None:
        slots, slot = self._live.setdefault(extent.file, {}), extent.offset // self._record_nbytes
        if slot in slots:
            raise StoreError(f"slot {slot} of {extent.file} is still in use; drop the block that left the window first")
        slots[slot] = extent
        self.nbytes += extent.nbytes

    def __repr__(self) -> str:
        return f"<RingLayout {sum(map(len, self._live.values()))} slots in {len(self._live)} rings in use>"
