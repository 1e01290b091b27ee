"""What a layout is: where in which file the next record goes, and what becomes of room that is given back.

Layouts are arithmetic: they touch no file and wait for nothing. File names are relative to the volume's folder; offsets
and sizes are whole pages.
"""

from __future__ import annotations

from typing import Protocol

from ..disk.base import Extent


class Layout(Protocol):
    """The files of one volume. All records that were placed or restored, and not dropped, lie apart from each other."""

    name: str
    """The persistence format."""

    def place(self, store: int, layer: int, index: int, nbytes: int) -> Extent:
        """Room for block `index` of `layer` of the sequence `store`: `nbytes` bytes, a multiple of the page."""
        ...

    def restore(self, extent: Extent) -> None:
        """`extent` is in use since an earlier run."""
        ...

    def drop(self, extent: Extent) -> list[str]:
        """`extent` is free again; returns the files that nothing is left in, to be removed before more is written to them."""
        ...

    def worn(self) -> str | None:
        """A file that is to be compacted, or None. What is placed from now on goes to another file; the caller places
        anew what lives in it, and drops the old places."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of records in use."""
        ...
