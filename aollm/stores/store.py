"""One sequence: which cells its history is made of, and how far it is accepted.

It appends to its last cell and shares all others. It refuses to know when cells move between memory and disk: that is
the cache's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import StoreError
from ..maths.attention import BLOCK
from .cell import Cell
from .node import digest, pack_ids
from .states import States

if TYPE_CHECKING:
    from .cache import Cache


class Store:
    """Keys and values of one sequence in cells of `cache`."""

    def __init__(self, cache: Cache, number: int, root: bytes) -> None:
        layers = cache.pool.layers
        self.number, self.root = number, root
        self.reserved = 0
        """Tokens of memory set aside for it."""
        self.states = States(len(cache.state_shapes), cache.policy.state_nbytes)
        self.ids: list[int] = []
        """The accepted tokens."""
        self.dirty: list[list[Cell]] = [[] for _ in range(layers)]
        """Whole cells that are in memory only, layer by layer."""
        self.closed = False
        self.private = False
        """Whether its keys are not those that its tokens alone would give, so that nobody may find them by tokens."""
        self._cache = cache
        self._cells: list[list[Cell]] = [[] for _ in range(layers)]
        self._first = [0] * layers  # the index of the first cell kept
        self._lengths = [0] * layers
        self._digests = [root]

    @property
    def tokens(self) -> int:
        """Tokens that every layer has."""
        return min(self._lengths, default=0) if self._lengths else min(self.states.tokens, default=0)

    def accept(self, ids: Sequence[int]) -> None:
        """The next tokens are certain."""
        self.ids.extend(ids)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Add rows [T, K, D] after the layer's last. For the compute thread."""
        done, total, pool = 0, keys.shape[0], self._cache.pool
        while done < total:
            index, offset = divmod(self._lengths[layer], BLOCK)
            rows = min(BLOCK - offset, total - done)
            cell = self._writable(layer, index)
            assert cell.slot is not None
            cell.slot.keys[offset : offset + rows] = keys[done : done + rows]
            cell.slot.values[offset : offset + rows] = values[done : done + rows]
            pool.fill(layer, max(0, offset + rows - cell.rows))
            cell.rows = max(cell.rows, offset + rows)
            self._lengths[layer] += rows
            done += rows
            if offset + rows == BLOCK:
                self.dirty[layer].append(cell)

    def cells(self, layer: int, first: int = 0) -> Sequence[Cell]:
        """The layer's history from the block of position `first` on."""
        return self._cells[layer][max(0, first // BLOCK - self._first[layer]) :]

    def length(self, layer: int) -> int:
        """Tokens that the layer has seen."""
        return self._lengths[layer]

    def truncate(self, tokens: int) -> int:
        """Forget all positions from `tokens` on; returns how many are left."""
        if self.states:
            tokens = self.states.truncate(tokens)
        if any(first * BLOCK > max(0, tokens - (self._cache.window or tokens) + 1) for first in self._first):
            tokens = 0  # what a query there would see has left the window
        left: list[Cell] = []
        for layer in range(len(self._cells)):
            left += self.cut(layer, tokens)
        del self.ids[tokens:]
        del self._digests[tokens // BLOCK + 1 :]
        self._cache.memory.disown(left)
        return tokens

    def cut(self, layer: int, tokens: int) -> list[Cell]:
        """Forget a layer's positions from `tokens` on; returns the cells that are no longer its own."""
        cells = self._cells[layer]
        self._lengths[layer] = min(self._lengths[layer], tokens)
        kept = max(0, -(-self._lengths[layer] // BLOCK) - self._first[layer])
        left = cells[kept:]
        del cells[kept:]
        if not tokens:
            self._first[layer] = 0
        self.dirty[layer] = [cell for cell in self.dirty[layer] if cell.start + BLOCK <= tokens]
        return left

    def slide(self, layer: int) -> list[Cell]:
        """Let go of the layer's cells that the window has passed."""
        if self._cache.window is None:
            return []
        passed = max(0, (self._lengths[layer] - self._cache.window + 1) // BLOCK - self._first[layer])
        left = self._cells[layer][:passed]
        del self._cells[layer][:passed]
        self._first[layer] += len(left)
        self.dirty[layer] = [cell for cell in self.dirty[layer] if cell.index >= self._first[layer]]
        return left

    def adopt(self, layer: int, cells: Sequence[Cell], first: int, length: int) -> None:
        """Begin with cells that are stored: blocks `first`… of a history of `length` tokens."""
        self._cells[layer], self._first[layer], self._lengths[layer] = list(cells), first, length

    def replaced(self, ids: Sequence[int]) -> None:
        """Its keys were turned to other positions: its tokens are `ids` now, and nobody may find them by these."""
        self.ids, self.private = list(ids), True
        del self._digests[1:]

    def rehoused(self, number: int) -> None:
        """Its cells are where they are to stay: it is called `number` from now on, and its whole cells in memory are on no disk."""
        self.number = number
        whole = [[cell for cell in cells if cell.rows == BLOCK and cell.place is None] for cells in self._cells]
        self.dirty = [[cell for cell in cells if cell.start + BLOCK <= self._lengths[layer]] for layer, cells in enumerate(whole)]

    def fork(self) -> Store:
        """A store that shares this one's cells."""
        twin = Store(self._cache, self._cache.next_number(), self.root)
        twin.states = self.states.fork()
        twin.ids, twin._digests, twin.private = list(self.ids), list(self._digests), self.private
        twin._first, twin._lengths = list(self._first), list(self._lengths)
        twin._cells = [list(cells) for cells in self._cells]
        twin.dirty = [list(cells) for cells in self.dirty]
        self._cache.memory.own(cell for cells in self._cells for cell in cells)
        self._cache.opened(twin)
        return twin

    def digest(self, index: int) -> bytes:
        """The digest of all accepted tokens up to the end of block `index`."""
        while len(self._digests) < index + 2:
            start = (len(self._digests) - 1) * BLOCK
            self._digests.append(digest(self._digests[-1], pack_ids(self.ids[start : start + BLOCK])))
        return self._digests[index + 1]

    async def flush(self) -> None:
        """Return when all whole accepted blocks are as durable as this kind of store promises."""
        await self._cache.flush()

    async def aclose(self) -> None:
        """Give everything back; what is to outlive the store is written first."""
        if not self.closed:
            self.closed = True
            await self._cache.close(self)

    def take_cells(self) -> list[Cell]:
        """All cells, which are no longer this store's."""
        cells = [cell for layer in self._cells for cell in layer]
        self._cells = [[] for _ in self._cells]
        self.dirty = [[] for _ in self._cells]
        return cells

    def replace(self, layer: int, index: int, cell: Cell) -> Cell:
        """Put `cell` in the place of the one with its index; returns that one."""
        at = index - self._first[layer]
        old = self._cells[layer][at]
        self._cells[layer][at] = cell
        return old

    def __repr__(self) -> str:
        return f"<Store {self.number}, {self.tokens} tokens>"

    def _writable(self, layer: int, index: int) -> Cell:
        cells, pool = self._cells[layer], self._cache.pool
        at = index - self._first[layer]
        if at == len(cells):
            cells.append(Cell(layer, index, pool.take()))
        elif not cells[at].writable:
            shared, own = cells[at], Cell(layer, index, pool.take())
            used = self._lengths[layer] % BLOCK
            if shared.slot is None or own.slot is None:
                raise StoreError("a block that is to be continued is not in memory")
            own.slot.keys[:used] = shared.slot.keys[:used]
            own.slot.values[:used] = shared.slot.values[:used]
            own.rows = used
            pool.fill(layer, used)
            cells[at] = own
            self._cache.memory.leave(shared)
        return cells[at]
