"""Pages of one capacity in one file: a page table, so that movement follows page boundaries.

A page holds the record of a whole block; what is larger takes adjacent pages. Free pages are used again, lowest first.
It refuses to know what a page holds.
"""

from __future__ import annotations

from ..disk.base import ALIGNMENT, Extent
from ..errors import StoreError
from .chunked import ChunkedLayout

FILE = "pages"


class PagedLayout:
    """Records in the file `pages`, each from the start of a page of `page_nbytes` bytes."""

    name = "paged-manifest"
    format = "aollm-kv-paged"

    def __init__(self, page_nbytes: int) -> None:
        if page_nbytes <= 0 or page_nbytes % ALIGNMENT:
            raise ValueError(f"page_nbytes is {page_nbytes}, not a multiple of {ALIGNMENT}")
        self.nbytes = 0
        self._page_nbytes = page_nbytes
        self._pages = ChunkedLayout(FILE)  # of whole pages only: first fit is then lowest first

    def place(self, store: int, layer: int, index: int, nbytes: int) -> Extent:
        """The lowest page that is free, or as many adjacent ones as the record takes."""
        if nbytes <= 0 or nbytes % ALIGNMENT:
            raise ValueError(f"a record of {nbytes} bytes is not whole pages of {ALIGNMENT}")
        offset = self._pages.place(store, layer, index, self._up(nbytes)).offset
        self.nbytes += nbytes
        return Extent(FILE, offset, nbytes)

    def restore(self, extent: Extent) -> None:
        """`extent` is in use since an earlier run; `StoreError` if it begins no page, or another record lies there."""
        if extent.offset % self._page_nbytes or extent.nbytes % ALIGNMENT:
            raise StoreError(f"{extent} is no place in a store of pages of {self._page_nbytes} bytes; purge this store")
        self._pages.restore(self._whole(extent))
        self.nbytes += extent.nbytes

    def drop(self, extent: Extent) -> list[str]:
        """Its pages are free; the file is kept."""
        emptied = self._pages.drop(self._whole(extent))
        self.nbytes -= extent.nbytes
        return emptied

    def worn(self) -> None:
        """Nothing to compact: pages are used again."""

    def _whole(self, extent: Extent) -> Extent:
        return Extent(extent.file, extent.offset, self._up(extent.nbytes))

    def _up(self, nbytes: int) -> int:
        return -(-nbytes // self._page_nbytes) * self._page_nbytes

    def __repr__(self) -> str:
        return f"<PagedLayout {self._pages.nbytes // self._page_nbytes} pages of {self._page_nbytes} bytes in use>"
