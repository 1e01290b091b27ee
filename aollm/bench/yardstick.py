"""A fixed piece of work, measured between the requests of a run: what the machine gives in these minutes.

Shared machines are by half faster or slower from one minute to the next, and so is this work. Times divided by it can be
held against those of another day. It refuses to know models.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.nn import functional

from ..compute import Compute
from .drive import Drive
from .spread import Parts, quiet

WIDTH, LAYERS, OPERATIONS, PARTS = 256, 8, 10, 6
"""Small products one after the other: what a pass over weights that fit the processor's caches is made of."""
PRODUCT = (8192, 4096)
"""64 MiB of bfloat16, more than caches hold: what a pass over larger weights is made of."""
LARGE_NBYTES = 64 << 20
DRIVE_NBYTES = 256 << 20


class Yardstick:
    """Call `take` between requests, `summary` at the end; make it before a runtime counts the memory in use.

    `kind` is `operations`, or `products` for weights beyond the caches.
    """

    def __init__(self, compute: Compute, kind: str = "operations", drive: Drive | None = None) -> None:
        """`compute`: a thread of its own, with as many torch threads as the runtime's."""
        self.kind = kind
        self._compute, self._drive = compute, drive
        self._seconds: list[Parts] = []
        self._drive_speeds: list[float] = []
        if kind == "products":
            self._weights = [torch.zeros(PRODUCT, dtype=torch.bfloat16)]
        else:
            self._weights = [torch.full((WIDTH, WIDTH), 0.01) for _ in range(LAYERS)]

    @classmethod
    def of(cls, compute: Compute, folder: Path, streams: bool) -> Yardstick:
        """The one that suits the weights in `folder`; with the drive in it where they are large, or are said to stream."""
        large = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file()) > LARGE_NBYTES
        return cls(compute, "products" if large else "operations", Drive(folder, "auto") if large or streams else None)

    async def take(self, times: int = 4) -> None:
        """Measure the work `times` times."""
        for _ in range(times):
            self._seconds.append(await self._compute.run(self._work))

    async def take_drive(self) -> None:
        """Measure the drive, where it counts. Raises `DiskError`."""
        if self._drive is not None:
            self._drive_speeds.append(await self._drive.probe(DRIVE_NBYTES))

    def summary(self) -> dict[str, Any]:
        """`seconds` of the undisturbed work, how often it was measured, and the drive's best speed."""
        return {
            "kind": self.kind,
            "seconds": quiet(self._seconds) if self._seconds else None,
            "count": len(self._seconds),
            "drive_bytes_per_second": max(self._drive_speeds, default=None),
        }

    def _work(self) -> Parts:
        row = torch.ones(1, self._weights[0].shape[1], dtype=self._weights[0].dtype)
        marks = [perf_counter()]
        if self.kind == "products":
            functional.linear(row, self._weights[0])
            marks.append(perf_counter())
        else:
            hidden = row
            for _ in range(PARTS):
                for number in range(OPERATIONS):
                    hidden = functional.silu(functional.linear(hidden, self._weights[number % LAYERS]) * 0.01 + row).narrow(0, 0, 1)
                marks.append(perf_counter())
        return [later - earlier for earlier, later in pairwise(marks)]

    def __repr__(self) -> str:
        return f"<Yardstick {self.kind}, {len(self._seconds)} times>"
