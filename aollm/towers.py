"""Towers at work: images and sounds into rows, once each, their weights streamed step by step and given back.

Rows are kept while there is room, so that the passes of a prompt, its turns and its branches share them. It refuses to
know what a tower computes, and where in a prompt the rows go.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from torch import Tensor

from .ahead import Ahead
from .buffers import Lease, Ring
from .compute import FOREIGN, Compute
from .disk.base import Disk
from .errors import ModelError
from .families.base import Params
from .item import Item
from .placement import ring_nbytes
from .trace import Event, Trace
from .weights import Piece, read_piece, views

DEPTH = 1
"""Pieces that are read ahead of the one that is computed with."""


class Towers:
    """The tower of one model as its `pieces`, and the newest rows it gave, at most `kept_nbytes` of them."""

    def __init__(self, pieces: Sequence[Piece], kept_nbytes: int, disk: Disk, compute: Compute, trace: Trace) -> None:
        self._pieces, self._kept_nbytes, self._disk, self._compute, self._trace = pieces, kept_nbytes, disk, compute, trace
        self._kept: dict[bytes, Tensor] = {}
        self.runs = 0

    async def rows(self, item: Item) -> Tensor:
        """[n, hidden] of an item, from memory or from the tower. Not to be called twice at a time."""
        found = self._kept.pop(item.digest, None)
        if found is None:
            found = await self._run(item)
        self._kept[item.digest] = found
        while len(self._kept) > 1 and sum(rows.nbytes for rows in self._kept.values()) > self._kept_nbytes:
            del self._kept[next(iter(self._kept))]
        return found

    def forget(self) -> None:
        """Give the memory back."""
        self._kept.clear()

    async def _run(self, item: Item) -> Tensor:
        ring = Ring(tower_ring_nbytes(self._pieces))

        async def load(piece: Piece, lease: Lease) -> Params:
            await read_piece(piece, ring.arena, lease.offset, "layer_load", self._disk, self._trace)
            return views(piece, ring.arena, lease.offset)

        x = item.prepared
        async with Ahead(self._pieces, lambda piece: piece.nbytes, load, ring) as ahead:
            for piece in self._pieces:
                weights, lease = await ahead.next()
                x = await self._compute.run(self._step, piece, weights, x)
                lease.release()
        self.runs += 1
        return x

    def _step(self, piece: Piece, weights: Params, x: Tensor) -> Tensor:
        assert piece.step is not None
        start = perf_counter()
        try:
            next(piece.step.run(weights, x, ()))
        except StopIteration as done:
            rows: Tensor = done.value
        except FOREIGN as error:
            raise ModelError(f"{piece.label} of the tower could not be computed: {error}") from error
        self._trace.add(Event("compute", start, perf_counter(), piece.layer, rows=rows.shape[0], label=f"tower {piece.label}"))
        return rows

    def __repr__(self) -> str:
        return f"<Towers {len(self._pieces)} pieces, {len(self._kept)} items kept>"


def tower_ring_nbytes(pieces: Sequence[Piece]) -> int:
    """Bytes of the ring that a tower's weights stream through."""
    return ring_nbytes([piece.nbytes for piece in pieces], DEPTH)
