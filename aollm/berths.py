"""Berths: room on a device for two experts, the one that is computed with and the one that comes.

Experts live in the host's memory, or come from the drive; a device whose memory is another one gets them when rows are sent to
them. The copy of one runs while the one before it is computed with.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Self

from .buffers import pages
from .device import Device, Mark
from .families.base import Params
from .piece import LINE, Piece
from .supply import moved
from .trace import Trace

BERTHS = 2


class Berths:
    """Berths of `nbytes` each on `device`, taken in turn. For the compute thread."""

    def __init__(self, device: Device, nbytes: int, trace: Trace) -> None:
        self.device, self._nbytes, self._trace = device, nbytes, trace
        self._memory = device.memory(BERTHS * nbytes)
        self._marks: list[Mark] = [None] * BERTHS
        self._last = 0

    @classmethod
    def of(cls, device: Device, experts: Iterable[Piece], trace: Trace) -> Self | None:
        """Berths for any of `experts`; None where they are computed with in the host's memory, or there are none."""
        nbytes = max(map(berth_nbytes, experts), default=0) if device.apart else 0
        return cls(device, nbytes, trace) if nbytes else None

    def take(self, weights: Params, layer: int) -> Params:
        """The same weights on the device, until `BERTHS` more have been taken."""
        start = perf_counter()
        self._marks[self._last] = self.device.mark()  # behind what the last one was used for
        self._last = (self._last + 1) % BERTHS
        at, nbytes, found = self._last * self._nbytes, 0, {}
        for name, tensor in weights.tensors.items():
            self._memory.fill(at, tensor, self._marks[self._last])
            found[name] = self._memory.tensor(at, tensor.dtype, tuple(tensor.shape))
            at += -(-tensor.nbytes // LINE) * LINE
            nbytes += tensor.nbytes
        self._trace.add(moved(start, layer, nbytes, f"layer {layer} expert"))
        return Params(found)

    def forget(self) -> None:
        """Give the memory back."""
        self._memory.forget()


def berth_nbytes(piece: Piece) -> int:
    """Bytes of a berth for an expert: each of its tensors begins with a cache line."""
    return pages(piece.nbytes + LINE * len(piece.params))
