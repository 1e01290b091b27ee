"""Which cells are in memory, and who owns them.

The compute thread fills cells, the event loop gives them back. During a pass nothing leaves that a later layer of the pass
may fold: what a pass will have to read is known before it begins. It refuses to know stores, and when cells are written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..maths.attention import BLOCK
from .cell import Cell
from .pool import BlockPool
from .records import Records


class Memory:
    """Cells in slots of `pool`. `share`: rows of a layer that may stay there."""

    def __init__(self, pool: BlockPool, records: Records | None) -> None:
        self.pool, self._records = pool, records
        self.share = pool.tokens
        self.passed = pool.layers
        """Layers below it are not needed again by the pass under way."""
        self.dropped = 0
        """Blocks that have left memory because others needed their room."""
        self._clean: list[dict[Cell, None]] = [{} for _ in range(pool.layers)]  # on disk too
        self._left: deque[Cell] = deque()

    def own(self, cells: Iterable[Cell]) -> None:
        """One owner more of each."""
        with self.pool.lock:
            for cell in cells:
                cell.owners += 1

    def rehouse(self, records: Records | None) -> None:
        """`records` takes the place of the former ones, in which nothing is left."""
        self._records, self.share = records, self.pool.tokens
        self._clean = [{} for _ in range(self.pool.layers)]

    def disown(self, cells: Iterable[Cell]) -> None:
        """One owner less of each; what nobody owns leaves memory, and the disk unless it is stored for good."""
        gone = []
        with self.pool.lock:
            for cell in cells:
                cell.owners -= 1
                if not cell.owners and not cell.writing:
                    gone.append(cell)
        self.forget(gone)

    def leave(self, cell: Cell) -> None:
        """One owner less, soon. For the compute thread."""
        self._left.append(cell)

    def pass_by(self, layer: int) -> None:
        """The pass is done with `layer`."""
        self.passed = layer + 1
        self.see_off()

    def see_off(self) -> None:
        """Let go of what was to be left."""
        self.disown([self._left.popleft() for _ in range(len(self._left))])

    def promote(self, cell: Cell, copy: Cell) -> None:
        """`cell` was read; `copy` has its rows in memory, where they stay."""
        if cell.slot is None and cell.owners:
            cell.slot, cell.rows = copy.slot, copy.rows
            self.written(cell)
        else:
            self.forget([copy])

    def written(self, cell: Cell) -> None:
        """The cell is on disk too: it may leave memory."""
        self._clean[cell.layer][cell] = None

    def over(self, layer: int) -> int:
        """Blocks that a layer has in memory beyond its share."""
        return -(-(self.pool.rows(layer) - self.share) // BLOCK)

    def fits(self, rows: int) -> bool:
        """Whether `rows` rows more have room now. For any thread."""
        return self.pool.all_rows + rows <= self.pool.tokens * self.pool.layers

    def evict(self, layer: int) -> None:
        """Let go of the layer's cells that are on disk too, as long as it holds more than its share."""
        while layer < self.passed and self._clean[layer] and self.pool.rows(layer) > self.share:
            self._drop(layer)

    def evict_one(self) -> bool:
        """Let go of one cell of the fullest layer that the pass is done with; whether there was one."""
        layers = [layer for layer in range(self.passed) if self._clean[layer]]
        if layers:
            self._drop(max(layers, key=self.pool.rows))
        return bool(layers)

    def forget(self, cells: Iterable[Cell]) -> None:
        """Cells that nobody owns: their slots go, and their places unless they are stored for good."""
        for cell in cells:
            self._clean[cell.layer].pop(cell, None)
            self._empty(cell)
            if cell.stored is None and self._records is not None:
                self._records.forget(cell)

    def _drop(self, layer: int) -> None:
        cell, _ = self._clean[layer].popitem()  # the newest: the next pass begins with the oldest
        self._empty(cell)
        self.dropped += 1

    def _empty(self, cell: Cell) -> None:
        if cell.slot is not None:
            self.pool.give([(cell.slot, cell.layer, cell.rows)])
            cell.slot, cell.rows = None, 0

    def __repr__(self) -> str:
        return f"<Memory {self.pool}, {sum(map(len, self._clean))} cells on disk too>"
