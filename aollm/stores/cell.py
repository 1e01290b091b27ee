"""A cell: one block of one layer, wherever it is, shared by all sequences whose history it is part of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..maths.attention import BLOCK
from .pool import BlockPool, Slot
from .record import Place


@dataclass(eq=False, slots=True)
class Cell:
    """Block `index` of `layer`: in memory (`slot`, filled for `rows` rows), on disk (`place`), or both.

    What was stored never changes: whoever wants to write to a shared or stored cell copies it first.
    """

    layer: int
    index: int
    slot: Slot | None = None
    rows: int = 0
    place: Place | None = None
    owners: int = 1
    writing: bool = False
    stored: bytes | None = None
    """The digest under which its place is kept for good, whoever owns it."""

    @property
    def start(self) -> int:
        """The position of its first row."""
        return self.index * BLOCK

    @property
    def writable(self) -> bool:
        """Whether rows may be added or overwritten in place."""
        return self.slot is not None and self.owners == 1 and self.place is None and not self.writing


@dataclass(frozen=True, slots=True)
class Run:
    """Cells that follow each other in a sequence and are read, or found in memory, together."""

    cells: tuple[Cell, ...]

    @property
    def cold(self) -> bool:
        """Whether they have to be read."""
        return self.cells[0].slot is None

    @property
    def nbytes(self) -> int:
        """Bytes of their records."""
        return sum(cell.place.extent.nbytes for cell in self.cells if cell.place is not None)


def runs(cells: Sequence[Cell], most_nbytes: int) -> Iterator[Run]:
    """Cells in memory one by one; those on disk in runs of at most `most_nbytes`, cut at positions that all who share them agree on."""
    cold: list[Cell] = []
    for cell in cells:
        if cell.slot is None and cell.place is not None:
            together = max(1, most_nbytes // cell.place.extent.nbytes)
            if cold and cell.index // together != cold[-1].index // together:
                yield Run(tuple(cold))
                cold = []
            cold.append(cell)
            continue
        if cold:
            yield Run(tuple(cold))
            cold = []
        yield Run((cell,))
    if cold:
        yield Run(tuple(cold))


def copied(pool: BlockPool, cell: Cell, keys: Tensor, values: Tensor) -> Cell:
    """A cell like `cell` that is in memory and has these rows [R, K, D]. For the compute thread."""
    slot, rows = pool.take(), keys.shape[0]
    slot.keys[:rows], slot.values[:rows] = keys, values
    pool.fill(cell.layer, rows)
    return Cell(cell.layer, cell.index, slot, rows)
