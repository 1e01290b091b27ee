"""Towers at work: images and sounds into rows, once each, their weights streamed step by step and given back.

Rows are kept while there is room, so that the passes of a prompt, its turns and its branches share them. It refuses to
know what a tower computes, and where in a prompt the rows go.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from .buffers import Ring
from .compute import FOREIGN, Compute
from .device import Device, Mark
from .disk.base import Disk
from .errors import ModelError
from .families.base import Params, Tower
from .item import Item
from .piece import Piece
from .placement import ring_nbytes
from .supply import Landing, Supply, landing_nbytes
from .trace import Event, Trace

DEPTH = 1
"""Pieces that are read ahead of the one that is computed with."""
KEPT_ROWS = 2048
"""Rows of images or sounds that are kept, or more if one can have more."""


class Towers:
    """The tower of one model as its `pieces`, and the newest rows it gave, at most `kept_nbytes` of them."""

    def __init__(self, pieces: Sequence[Piece], kept_nbytes: int, disk: Disk, compute: Compute, trace: Trace, device: Device) -> None:
        self._pieces, self._kept_nbytes, self._disk, self._compute, self._trace = pieces, kept_nbytes, disk, compute, trace
        self._device = device
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
        device, ring = self._device, Ring(tower_ring_nbytes(self._pieces))
        landing = Landing.of(device, landing_nbytes(self._pieces, DEPTH)) if device.apart else None
        x = item.prepared
        try:
            async with Supply(self._pieces, ring, self._pieces, landing, {}, self._disk, self._trace) as supply:
                for piece in self._pieces:
                    weights, lease = await supply.next()
                    x, mark = await self._compute.run(self._step, piece, weights, x)
                    if landing is not None:
                        landing.mark = mark
                    lease.release()
            self.runs += 1
            return await self._compute.run(device.fetch, x) if device.apart else x
        finally:
            if landing is not None:
                landing.memory.forget()

    def _step(self, piece: Piece, weights: Params, x: Tensor) -> tuple[Tensor, Mark]:
        assert piece.step is not None
        start = perf_counter()
        try:
            next(piece.step.run(weights, self._device.put(x), ()))
        except StopIteration as done:
            rows: Tensor = done.value
        except FOREIGN as error:
            raise ModelError(f"{piece.label} of the tower could not be computed: {error}") from error
        self._trace.add(Event("compute", start, perf_counter(), piece.layer, rows=rows.shape[0], label=f"tower {piece.label}"))
        return rows, self._device.mark()

    def __repr__(self) -> str:
        return f"<Towers {len(self._pieces)} pieces, {len(self._kept)} items kept>"


def tower_nbytes(tower: Tower | None, pieces: Sequence[Piece], context: int) -> tuple[int, int]:
    """What a tower needs for its largest item in a prompt of `context` tokens, and what is set aside for rows that it has given."""
    if tower is None:
        return 0, 0
    shape = tower.largest(context)
    rows = max(tower.rows(torch.empty(shape, device="meta")), KEPT_ROWS)
    return tower_ring_nbytes(pieces) + tower.activation_nbytes(shape), rows * tower.text_hidden * tower.dtype.itemsize


def tower_ring_nbytes(pieces: Sequence[Piece]) -> int:
    """Bytes of the ring that a tower's weights stream through."""
    return ring_nbytes([piece.nbytes for piece in pieces], DEPTH)
