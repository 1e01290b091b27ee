"""Memory for keys and values: slots of one size, so that nothing ever needs defragmenting, and how full they are.

A slot is address space until it is written to: a short sequence costs the pages that it fills, not the slot. What may be
filled in all is bounded by reservations, made when a sequence is admitted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..buffers import PAGE, Arena, pages
from ..maths.attention import BLOCK
from .shape import Shape


@dataclass(frozen=True, eq=False, slots=True)
class Slot:
    """Room for one block of one layer: keys and values [S, K, D], S at most BLOCK."""

    index: int
    keys: Tensor
    values: Tensor


class BlockPool:
    """Slots for keys and values of `shape`; at most `tokens` tokens of each layer are ever filled.

    `sequences` bounds how many sequences there can be at once, and `longest` the tokens of each: one may leave its last
    block half empty. The compute thread takes and fills slots, the event loop gives them back.
    """

    def __init__(self, tokens: int, sequences: int, longest: int, shape: Shape) -> None:
        self.shape, self.layers, self.tokens = shape, shape.layers, tokens
        self.reserved = 0
        self.lock = threading.Lock()
        """Held while owners are counted."""
        rows = min(BLOCK, longest)
        self._half = pages(rows * shape.row_nbytes)
        slots = shape.layers * (tokens // rows + 2 * sequences + 1)
        self._arena = Arena(slots * 2 * self._half, huge=False)
        # All views now: made one by one in the compute thread they would lie scattered over the memory that a pass frees again,
        # and keep the allocator from using it for the next layer.
        everything = self._arena.tensor(0, shape.dtype, (slots, 2, self._half // shape.dtype.itemsize))
        size = rows * shape.heads * shape.head_dim
        halves = everything[:, :, :size].view(slots, 2, rows, shape.heads, shape.head_dim)  # [slots, 2, S, K, D]
        self._free = [Slot(index, keys, values) for index, (keys, values) in enumerate(halves.unbind(0))]
        self._filled, self._emptied = [0] * shape.layers, [0] * shape.layers  # rows; each list has one thread that writes it

    @staticmethod
    def nbytes(tokens: int, sequences: int, layers: int, row_nbytes: int) -> int:
        """Bytes that `tokens` tokens of `sequences` sequences fill at most, whole pages counted."""
        return 2 * layers * (tokens * row_nbytes + (sequences + tokens // BLOCK) * (PAGE if row_nbytes % PAGE else 0))

    def reserve(self, tokens: int) -> bool:
        """Set `tokens` tokens aside, if they are there."""
        if self.reserved + tokens > self.tokens:
            return False
        self.reserved += tokens
        return True

    def release(self, tokens: int) -> None:
        """Give a reservation back."""
        self.reserved -= tokens

    def take(self) -> Slot:
        """A slot of zeros."""
        return self._free.pop()

    def fill(self, layer: int, rows: int) -> None:
        """`rows` rows of slots of `layer` have been written. For the compute thread."""
        self._filled[layer] += rows

    def give(self, slots: Iterable[tuple[Slot, int, int]]) -> None:
        """Slots with the layer and the rows that they were filled for; their pages go back to the system, which takes time for many."""
        for slot, layer, rows in slots:
            self._arena.drop(slot.index * 2 * self._half, 2 * self._half)
            self._emptied[layer] += rows
            self._free.append(slot)

    def rows(self, layer: int) -> int:
        """Rows of `layer` that are in memory."""
        return self._filled[layer] - self._emptied[layer]

    @property
    def spare(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of keys."""
        return self.shape.row_nbytes

    @property
    def all_rows(self) -> int:
        """Rows of all layers that are in memory; at most `tokens` × `layers`."""
        return sum(self._filled) - sum(self._emptied)

    def forget(self) -> None:
        """Give all memory back; no slot can be used afterwards."""
        self._free.clear()
        self._arena = Arena(PAGE, huge=False)

    def __repr__(self) -> str:
        return f"<BlockPool {self.reserved} of {self.tokens} tokens reserved, {self.all_rows} rows filled>"
