"""The supply: pieces one after the other, read ahead of need, and carried on to a device whose memory is another one.

Two looks ahead in a row there: from the drive into the host's ring, and from that, or from where a piece is kept in the host's
memory, into a ring on the device. A copy begins when there is room, and runs beside what is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Self

import anyio.to_thread
import torch
from torch import Tensor

from .ahead import Ahead
from .buffers import Arena, Lease, Ring
from .compute import FOREIGN
from .device import Device, Mark, Memory
from .disk.base import Disk
from .errors import ModelError
from .families.base import Params
from .piece import Piece, pinned_nbytes, read_piece, shift_of, views
from .placement import ring_nbytes
from .trace import Event, Trace


@dataclass(eq=False, slots=True)
class Landing:
    """Where pieces arrive on a device: leases of its memory, and the mark behind what was last used of it."""

    ring: Ring
    memory: Memory
    mark: Mark = None

    @classmethod
    def of(cls, device: Device, nbytes: int) -> Self:
        """A landing of `nbytes`."""
        return cls(Ring(nbytes, backed=False), device.memory(nbytes))


class Supply:
    """`async with Supply(...) as supply`, then `next()` for each piece of `reads`, or of `moves` where there is a `landing`.

    `moves` are pieces that are read and others, of which `kept` holds the bytes by label.
    """

    def __init__(
        self, reads: Iterable[Piece], ring: Ring, moves: Iterable[Piece], landing: Landing | None, kept: Mapping[str, Tensor],
        disk: Disk, trace: Trace,
    ) -> None:  # fmt: skip
        self._kept, self._ring, self._landing, self._disk, self._trace = kept, ring, landing, disk, trace
        self._reading: Ahead[Piece, Any] = Ahead(reads, lambda piece: piece.nbytes, self._read, ring)
        self._moving: Ahead[Piece, Params] | None = None
        if landing is not None:
            self._moving = Ahead(moves, pinned_nbytes, self._move, landing.ring, in_turn=True)

    async def __aenter__(self) -> Self:
        await self._reading.__aenter__()
        if self._moving is not None:
            await self._moving.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Stop; nothing is in flight afterwards. To be called by the task that entered."""
        try:
            if self._moving is not None:
                await self._moving.__aexit__(*raised)
        finally:
            await self._reading.__aexit__(*raised)

    async def next(self) -> tuple[Params, Lease]:
        """The next piece's parameters where they are computed with, and the lease that holds them."""
        found: tuple[Params, Lease] = await (self._moving or self._reading).next()
        return found

    def __repr__(self) -> str:
        return f"<Supply {self._reading}{f', {self._moving} moved' if self._moving is not None else ''}>"

    async def _read(self, piece: Piece, lease: Lease) -> Params | Tensor:
        """The piece's parameters, or its bytes, if they are to go on."""
        await read_piece(piece, self._ring.arena, lease.offset, "layer_load", self._disk, self._trace)
        return views(piece, self._ring.arena, lease.offset) if self._landing is None else bytes_of(piece, self._ring.arena, lease.offset)

    async def _move(self, piece: Piece, lease: Lease) -> Params:
        assert self._landing is not None
        source, held = self._kept.get(piece.label), None
        if source is None:
            source, held = await self._reading.next()
        try:
            return await move(piece, source, self._landing.memory, lease.offset, self._landing.mark, self._trace)
        finally:
            if held is not None:
                held.release()


def landing_nbytes(pieces: Sequence[Piece], depth: int) -> int:
    """Bytes of a landing through which `pieces` go round, `depth` ahead of the one that is computed with."""
    return ring_nbytes([pinned_nbytes(piece) for piece in pieces], depth)


def bytes_of(piece: Piece, arena: Arena, at: int) -> Tensor:
    """The bytes of a piece that was read to offset `at`."""
    return arena.tensor(at, torch.uint8, (piece.nbytes,))


async def move(piece: Piece, source: Tensor, memory: Memory, at: int, after: Mark, trace: Trace) -> Params:
    """Copy a piece's bytes to offset `at` of a device's memory, behind `after`; returns its parameters there."""
    return await anyio.to_thread.run_sync(_move, piece, source, memory, at + shift_of(piece), after, trace)


def _move(piece: Piece, source: Tensor, memory: Memory, at: int, after: Mark, trace: Trace) -> Params:
    start = perf_counter()
    try:
        memory.fill(at, source, after)
        found = views(piece, memory, at)
    except FOREIGN as error:
        raise ModelError(f"{piece.label} could not be moved to the device: {error}") from error
    trace.add(moved(start, piece.layer, source.nbytes, piece.label))
    return found


def moved(start: float, layer: int, nbytes: int, label: str) -> Event:
    """The event of bytes that have been copied to a device since `start`."""
    return Event("offloaded_cpu_to_cuda", start, perf_counter(), layer, nbytes=nbytes, path="cpu-offloaded-artifacts", label=label)
