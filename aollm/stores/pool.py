"""Memory for keys and values: blocks of one size, so that nothing ever needs defragmenting.

A block is address space until it is written to: a short sequence costs the pages that it fills, not the block. What may
be filled in all is bounded by reservations, made when a sequence is admitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..buffers import PAGE, Arena, pages
from ..maths.attention import BLOCK


@dataclass(eq=False, slots=True)
class Slot:
    """Room for one block of one layer: keys and values [S, K, D], S at most BLOCK, and how many sequences share it."""

    index: int
    keys: Tensor
    values: Tensor
    owners: int = 1


class BlockPool:
    """Slots for `heads` × `head_dim` keys and values in `layers` layers; at most `tokens` tokens of them are ever filled.

    `sequences` bounds how many sequences there can be at once, and `longest` the tokens of each: one may leave its last
    block half empty.
    """

    def __init__(self, tokens: int, sequences: int, longest: int, layers: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.layers = layers
        self.tokens = tokens
        self.reserved = 0
        self._shape = (min(BLOCK, longest), heads, head_dim)
        self._half = pages(self._shape[0] * heads * head_dim * dtype.itemsize)
        slots = layers * (tokens // BLOCK + 2 * sequences)
        self._arena = Arena(slots * 2 * self._half, huge=False)
        # All views now: made one by one in the compute thread they would lie scattered over the memory that a pass frees again,
        # and keep the allocator from using it for the next layer.
        everything = self._arena.tensor(0, dtype, (slots, 2, self._half // dtype.itemsize))
        rows, size = self._shape[0], self._shape[0] * heads * head_dim
        halves = everything[:, :, :size].view(slots, 2, rows, heads, head_dim)  # [slots, 2, S, K, D]
        self._free = [Slot(index, keys, values) for index, (keys, values) in enumerate(halves.unbind(0))]

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
        slot = self._free.pop()
        slot.owners = 1
        return slot

    def give(self, slots: Sequence[Slot]) -> None:
        """One owner fewer of each; the pages of what has none left go back to the system, which takes time for many."""
        for slot in slots:
            slot.owners -= 1
            if not slot.owners:
                self._arena.drop(slot.index * 2 * self._half, 2 * self._half)
                self._free.append(slot)

    def forget(self) -> None:
        """Give all memory back; no slot can be used afterwards."""
        self._free.clear()
        self._arena = Arena(PAGE, huge=False)

    def __repr__(self) -> str:
        return f"<BlockPool {self.reserved} of {self.tokens} tokens reserved>"
