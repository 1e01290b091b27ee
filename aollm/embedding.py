"""The embedding table: rows by token id, from memory where the table is kept there, else row by row from the drive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .buffers import PAGE, Arena
from .checkpoint import TensorEntry
from .compute import Compute
from .disk.base import Disk, Extent, Priority
from .families.base import Family
from .trace import Event, Trace
from .weights import Weights

FEW = 64
"""Rows that the event loop may gather by itself. It must not do what torch does with several threads: a second team of them
beside the compute thread's makes both wait for each other without spinning, which slows every pass by a tenth."""
AT_ONCE = 256
"""Rows asked for in one call: a long prompt must not hold the event loop up."""


class Embedding:
    """Rows of `entry` [vocabulary, hidden]: from a tied head that is kept, from a table of its own after `pin`, else read."""

    def __init__(self, entry: TensorEntry, family: Family, weights: Weights, disk: Disk, compute: Compute, trace: Trace) -> None:
        self._entry, self._family, self._disk, self._compute, self._trace = entry, family, disk, compute, trace
        self._row_nbytes = entry.extent.nbytes // entry.shape[0]
        heads = [index for index, piece in enumerate(weights.pieces) if piece.step is None]
        kept = [weights.in_memory(index) for index in heads]
        self._blocks = [block["head"] for block in kept if block is not None] if family.head == family.embedding else []
        self._apart = weights.device.apart
        places = {weights.device.holds(block) for block in self._blocks}
        if len(self._blocks) != len(heads) or len(places) != 1:  # rows of one pass come from one place
            self._blocks = []

    async def pin(self) -> None:
        """Keep the whole table in memory."""
        extent = self._entry.extent
        offset = extent.offset % PAGE if extent.offset % 8 == 0 else 0
        arena = Arena(offset + extent.nbytes)
        await self._disk.read_into([extent], [arena.bytes[offset : offset + extent.nbytes]])
        self._blocks = [arena.tensor(offset, self._family.dtype, self._entry.shape)]

    async def rows(self, ids: Sequence[int]) -> Tensor:
        """[T, hidden] for T token ids."""
        if self._blocks:
            return self._kept(ids) if len(ids) <= FEW and not self._apart else await self._compute.run(self._kept, ids)
        order = {number: row for row, number in enumerate(dict.fromkeys(ids))}
        out = torch.empty(len(order), self._family.hidden, dtype=self._family.dtype)
        memory = memoryview(out.view(torch.uint8).numpy().data).cast("B")
        extents = [
            Extent(self._entry.extent.file, self._entry.extent.offset + number * self._row_nbytes, self._row_nbytes) for number in order
        ]
        buffers = [memory[at : at + self._row_nbytes] for at in range(0, memory.nbytes, self._row_nbytes)]
        for at in range(0, len(extents), AT_ONCE):
            span = await self._disk.read_into(extents[at : at + AT_ONCE], buffers[at : at + AT_ONCE], Priority.NOW)
            nbytes = sum(extent.nbytes for extent in extents[at : at + AT_ONCE])
            self._trace.add(Event("safetensor_pread", span.start, span.end, nbytes=nbytes, path="safetensor-io", label="embedding rows"))
        return (
            await self._compute.run(out.index_select, 0, torch.tensor([order[number] for number in ids])) if len(order) < len(ids) else out
        )

    def forget(self) -> None:
        """Give the memory back."""
        self._blocks.clear()

    def _kept(self, ids: Sequence[int]) -> Tensor:
        size = self._blocks[0].shape[0]
        return torch.stack([self._blocks[number // size][number % size] for number in ids])
