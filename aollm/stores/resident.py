"""The `resident` store: full history in memory, in blocks that forks share."""

from __future__ import annotations

from collections.abc import Sequence

import anyio.to_thread
from torch import Tensor

from ..maths.attention import BLOCK, Block
from .pool import BlockPool, Slot

MANY = 128
"""Slots whose memory takes milliseconds to give back: longer than an event loop should wait."""


class ResidentStore:
    """Keys and values of one sequence in slots of `pool`."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._slots: list[list[Slot]] = [[] for _ in range(pool.layers)]
        self._lengths = [0] * pool.layers

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Add rows [T, K, D] after the layer's last."""
        done, total = 0, keys.shape[0]
        while done < total:
            index, offset = divmod(self._lengths[layer], BLOCK)
            rows = min(BLOCK - offset, total - done)
            slot = self._writable(layer, index)
            slot.keys[offset : offset + rows] = keys[done : done + rows]
            slot.values[offset : offset + rows] = values[done : done + rows]
            self._lengths[layer] += rows
            done += rows

    def blocks(self, layer: int) -> Sequence[Block]:
        """The layer's history."""
        length = self._lengths[layer]
        return [
            Block(start, slot.keys[: length - start], slot.values[: length - start])
            for start, slot in zip(range(0, length, BLOCK), self._slots[layer], strict=True)
        ]

    def truncate(self, tokens: int) -> None:
        """Forget all positions from `tokens` on."""
        self._pool.give(self._cut(tokens))

    def fork(self) -> ResidentStore:
        """A store that shares this one's slots."""
        twin = ResidentStore(self._pool)
        twin._lengths = list(self._lengths)
        twin._slots = [list(slots) for slots in self._slots]
        for slots in self._slots:
            for slot in slots:
                slot.owners += 1
        return twin

    async def flush(self) -> None:
        """Nothing to do: it promises nothing past the process."""

    async def aclose(self) -> None:
        """Give all slots back."""
        slots = self._cut(0)
        if len(slots) < MANY:
            self._pool.give(slots)
        else:
            await anyio.to_thread.run_sync(self._pool.give, slots)

    def __repr__(self) -> str:
        return f"<ResidentStore {max(self._lengths, default=0)} tokens>"

    def _cut(self, tokens: int) -> list[Slot]:
        """Keep `tokens` tokens; returns the slots that nothing is left in."""
        over: list[Slot] = []
        for layer, slots in enumerate(self._slots):
            self._lengths[layer] = min(self._lengths[layer], tokens)
            kept = -(-self._lengths[layer] // BLOCK)
            over += slots[kept:]
            del slots[kept:]
        return over

    def _writable(self, layer: int, index: int) -> Slot:
        slots = self._slots[layer]
        if index == len(slots):
            slots.append(self._pool.take())
        elif slots[index].owners > 1:
            shared, own = slots[index], self._pool.take()
            used = self._lengths[layer] % BLOCK
            own.keys[:used] = shared.keys[:used]
            own.values[:used] = shared.values[:used]
            self._pool.give([shared])
            slots[index] = own
        return slots[index]
