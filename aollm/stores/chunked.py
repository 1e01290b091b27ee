"""Chunks of any size in one file: room that comes back is kept as gaps, and the first gap that is large enough is taken.

Gaps are apart from each other and from the file's end, so that the gaps are known from the chunks alone, whatever the
order in which they came back. It refuses to know what a chunk holds.
"""

from __future__ import annotations

from bisect import bisect_left

from ..disk.base import ALIGNMENT, Extent
from ..errors import StoreError


class ChunkedLayout:
    """Records one beside the other in `file`; first fit, else at the end."""

    name = "chunked-manifest"

    def __init__(self, file: str = "chunks") -> None:
        self.nbytes = 0
        self._file = file
        self._gaps: list[tuple[int, int]] = []  # [start, end), by offset; none touches another or the end
        self._end = 0

    def place(self, store: int, layer: int, index: int, nbytes: int) -> Extent:
        """Room for a record: the first gap it fits into, or the file's end. Only the size matters."""
        if nbytes <= 0 or nbytes % ALIGNMENT:
            raise ValueError(f"a record of {nbytes} bytes is not whole pages of {ALIGNMENT}")
        offset = next((start for start, end in self._gaps if end - start >= nbytes), self._end)
        extent = Extent(self._file, offset, nbytes)
        self._take(extent)
        return extent

    def restore(self, extent: Extent) -> None:
        """`extent` is in use since an earlier run; `StoreError` if it is no chunk, or another one lies there."""
        if extent.file != self._file or extent.offset < 0 or extent.offset % ALIGNMENT or extent.nbytes <= 0 or extent.nbytes % ALIGNMENT:
            raise StoreError(f"{extent} is no place in the file {self._file}; purge this store")
        self._take(extent)

    def drop(self, extent: Extent) -> list[str]:
        """`extent` becomes a gap; the file is kept."""
        at = bisect_left(self._gaps, (extent.offset, extent.end))
        before = self._gaps[at - 1] if at else (-1, -1)
        after = self._gaps[at] if at < len(self._gaps) else (self._end, self._end)
        if extent.file != self._file or before[1] > extent.offset or after[0] < extent.end:
            raise ValueError(f"{extent} is not in use")
        start = before[0] if before[1] == extent.offset else extent.offset
        end = after[1] if after[0] == extent.end else extent.end
        first = at - (before[1] == extent.offset)
        last = at + (at < len(self._gaps) and after[0] == extent.end)
        self._gaps[first:last] = [(start, end)] if end < self._end else []
        self._end = self._end if end < self._end else start
        self.nbytes -= extent.nbytes
        return []

    def worn(self) -> None:
        """Nothing to compact: gaps are used again."""

    def _take(self, extent: Extent) -> None:
        if extent.offset >= self._end:
            if extent.offset > self._end:
                self._gaps.append((self._end, extent.offset))
            self._end = extent.end
        else:
            at = bisect_left(self._gaps, (extent.offset + 1, 0)) - 1
            start, end = self._gaps[at] if at >= 0 else (0, 0)
            if end < extent.end:
                raise StoreError(f"two records claim the same bytes, {extent}; purge this store")
            self._gaps[at : at + 1] = [gap for gap in ((start, extent.offset), (extent.end, end)) if gap[0] < gap[1]]
        self.nbytes += extent.nbytes

    def __repr__(self) -> str:
        return f"<ChunkedLayout {self.nbytes} of {self._end} bytes in use, {len(self._gaps)} gaps>"
