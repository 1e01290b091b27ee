"""Records one after the other in segment files: writing is sequential, and what was written together lies together.

Room is never used again; a segment goes when nothing lives in it. It refuses to know what a record holds.
"""

from __future__ import annotations

import re

from ..disk.base import ALIGNMENT, Extent
from ..errors import StoreError

SEGMENT = re.compile(r"segment-(\d{6,})")


class SegmentedLayout:
    """Files `segment-000000`, `segment-000001`, ... of `segment_nbytes` bytes at most; a larger record has one of its own."""

    name = "streamed-segmented"

    def __init__(self, segment_nbytes: int = 64 << 20) -> None:
        if segment_nbytes <= 0 or segment_nbytes % ALIGNMENT:
            raise ValueError(f"segment_nbytes is {segment_nbytes}, not a multiple of {ALIGNMENT}")
        self.nbytes = 0
        self._segment_nbytes = segment_nbytes
        self._live: dict[str, set[Extent]] = {}
        self._current, self._end = 0, 0
        self._left: list[str] = []  # segments that were empty when the next one began: no drop will name them

    def place(self, store: int, layer: int, index: int, nbytes: int) -> Extent:
        """Room behind the last record, or in the next segment when this one is full."""
        if nbytes <= 0 or nbytes % ALIGNMENT:
            raise ValueError(f"a record of {nbytes} bytes is not whole pages of {ALIGNMENT}")
        if self._end and self._end + nbytes > self._segment_nbytes:
            if self._file not in self._live:
                self._left.append(self._file)
            self._current, self._end = self._current + 1, 0
        extent = Extent(self._file, self._end, nbytes)
        self._end = extent.end
        self._add(extent)
        return extent

    def restore(self, extent: Extent) -> None:
        """`extent` is in use since an earlier run; new records begin a segment behind it."""
        match = SEGMENT.fullmatch(extent.file)
        if match is None or extent in self._live.get(extent.file, ()):
            raise StoreError(f"{extent} is no place in a store of segments, or is named twice; purge this store")
        if int(match[1]) >= self._current:
            self._current, self._end = int(match[1]) + 1, 0
        self._add(extent)

    def drop(self, extent: Extent) -> list[str]:
        """Returns its segment if nothing lives in it and it is not the one being written, and those that were left empty."""
        live = self._live.get(extent.file, set())
        if extent not in live:
            raise ValueError(f"{extent} is not in use")
        live.remove(extent)
        self.nbytes -= extent.nbytes
        emptied, self._left = self._left, []
        if not live:
            del self._live[extent.file]
            if extent.file != self._file:
                emptied.append(extent.file)
        return emptied

    def worn(self) -> None:
        """Segments are not compacted."""

    @property
    def _file(self) -> str:
        return f"segment-{self._current:06}"

    def _add(self, extent: Extent) -> None:
        self._live.setdefault(extent.file, set()).add(extent)
        self.nbytes += extent.nbytes

    def __repr__(self) -> str:
        return f"<SegmentedLayout {self.nbytes} bytes in {len(self._live)} segments, at {self._file}+{self._end}>"
