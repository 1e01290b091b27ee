"""Weights: the pieces of one model in the order in which a pass needs them, kept on the device or in memory, or ahead of need.

Where the device computes in the host's memory, what is kept there is used there. It refuses to know which pieces are kept, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Self

import anyio
import anyio.to_thread
from torch import Tensor

from .ahead import Ahead
from .buffers import PAGE, Arena, Lease, Ring
from .device import Device, Mark, Memory
from .disk.base import Disk
from .errors import first_of
from .families.base import Params
from .piece import Piece, pinned_nbytes, read_piece, shift_of, views
from .placement import Place
from .supply import Landing, Supply, bytes_of, move
from .trace import Trace


class Weights:
    """The pieces of one model on one disk, each at its place: on `device`, in memory, or streamed round and round.

    `ring_nbytes` of the host's memory are for what is read, `landing_nbytes` of the device's for what is moved there in each pass.
    """

    def __init__(
        self, pieces: Sequence[Piece], placement: Sequence[Place], ring_nbytes: int, landing_nbytes: int, device: Device, disk: Disk,
        trace: Trace,
    ) -> None:  # fmt: skip
        self.pieces, self.placement, self.device = pieces, placement, device
        self.streamed = [index for index, place in enumerate(placement) if place == "disk"]
        self._disk, self._trace = disk, trace
        near = ("device",) if device.apart else ("device", "host")
        self._coming = [index for index, place in enumerate(placement) if place not in near]
        self.ring = Ring(ring_nbytes)
        self._landing = Landing.of(device, landing_nbytes) if device.apart and self._coming else None
        self._undo: list[Callable[[], None]] = [device.register(self.ring.arena)]
        self._memory: Memory | None = None
        self._kept: dict[int, Params] = {}
        self._host: dict[int, Params] = {}
        self._bytes: dict[str, Tensor] = {}
        self._supply: Supply | None = None

    async def pin(self) -> None:
        """Load what stays."""
        try:
            async with anyio.create_task_group() as group:
                for index, place in enumerate(self.placement):
                    if place == "host":
                        group.start_soon(self._pin, index)
            await self._settle([index for index, place in enumerate(self.placement) if place == "device"])
        except BaseExceptionGroup as raised:
            raise first_of(raised) from raised

    async def __aenter__(self) -> Self:
        """Begin to read ahead."""
        await self.begin()
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Stop reading; nothing is in flight afterwards. To be called by the task that entered."""
        if self._supply is not None:
            supply, self._supply = self._supply, None
            await supply.__aexit__(None, None, None)

    async def begin(self) -> None:
        """Begin to read ahead, unless that has begun."""
        if self._coming and self._supply is None:
            reads, moves = (cycle([self.pieces[index] for index in own]) for own in (self.streamed, self._coming))
            supply = Supply(reads, self.ring, moves, self._landing, self._bytes, self._disk, self._trace)
            await supply.__aenter__()
            self._supply = supply

    async def restart(self) -> None:
        """Begin the round anew: after a pass that ended early."""
        await self.__aexit__()
        await self.begin()

    async def stop(self) -> None:
        """Read no further until `begin` is called: after a failure, so that what failed is tried again when it is asked for."""
        await self.__aexit__()

    def forget(self) -> None:
        """Give the memory back; nothing can be asked for afterwards."""
        for undo in self._undo:
            undo()
        for memory in (self._memory, self._landing.memory if self._landing is not None else None):
            if memory is not None:
                memory.forget()
        self._undo, self._memory, self._landing = [], None, None
        for kept in (self._kept, self._host, self._bytes):
            kept.clear()
        self.ring = Ring(PAGE)

    def pinned(self, index: int) -> Params | None:
        """The parameters of a piece that is kept where it is computed with, else None."""
        return self._kept.get(index)

    def in_memory(self, index: int) -> Params | None:
        """The parameters of a piece that is kept, on the device or in the host's memory, else None."""
        return self._kept.get(index) or self._host.get(index)

    async def next(self) -> tuple[Params, Lease]:
        """The parameters of the next piece that is not kept where it is computed with, and the lease to `release`."""
        assert self._supply is not None
        return await self._supply.next()

    def release(self, lease: Lease, mark: Mark) -> None:
        """A piece that came is not used after `mark`."""
        if self._landing is not None:
            self._landing.mark = mark
        lease.release()

    def __repr__(self) -> str:
        return f"<Weights {len(self._kept)} pieces pinned, {len(self.streamed)} streamed, {self._supply}>"

    async def _pin(self, index: int) -> None:
        """Keep a piece in the host's memory."""
        piece = self.pieces[index]
        arena = Arena(pinned_nbytes(piece), huge=False)  # small pages and whole cache lines: read a fifth faster than otherwise
        await read_piece(piece, arena, 0, "layer_load", self._disk, self._trace)
        if self.device.apart:
            self._undo.append(self.device.register(arena))
            self._bytes[piece.label], self._host[index] = bytes_of(piece, arena, 0), views(piece, arena, 0)
            return
        if shift := shift_of(piece):
            await anyio.to_thread.run_sync(arena.move, 0, shift, piece.nbytes)
        self._kept[index] = views(piece, arena, shift)

    async def _settle(self, indices: Sequence[int]) -> None:
        """Keep pieces on the device: all in one allocation, each read into the ring and moved on."""
        if not indices:
            return
        memory = self._memory = self.device.memory(sum(pinned_nbytes(self.pieces[index]) for index in indices))
        at = 0

        async def read(index: int, lease: Lease) -> int:
            await read_piece(self.pieces[index], self.ring.arena, lease.offset, "layer_load", self._disk, self._trace)
            return index

        async with Ahead(indices, lambda index: self.pieces[index].nbytes, read, self.ring) as ahead:
            for _ in indices:
                index, lease = await ahead.next()
                piece = self.pieces[index]
                self._kept[index] = await move(piece, bytes_of(piece, self.ring.arena, lease.offset), memory, at, None, self._trace)
                at += pinned_nbytes(piece)
                lease.release()
