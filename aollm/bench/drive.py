"""The drive's own speed, for a bound that a run can be held against: the model's files, read by a disk of the same kind
in pieces of the same size with as many in flight, and nothing else to do.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import anyio

from ..buffers import PAGE, Ring
from ..disk.auto import open_disk
from ..disk.base import Extent, down
from ..errors import ModelError
from ..port import Port
from ..probe import CHUNK, drive_speed

PROBE_NBYTES = 1 << 30


class Drive:
    """Where the weights of the model in `folder` lie. Its 64 MiB of memory are kept, so make it before the runtime counts."""

    def __init__(self, folder: Path, backend: str) -> None:
        self._folder, self._backend = folder, backend
        self._ring = Ring(2 * CHUNK)
        size = CHUNK - PAGE
        files = [(str(path), down(path.stat().st_size)) for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
        self._extents = deque(Extent(file, at, min(size, end - at)) for file, end in files for at in range(0, end, size))

    async def probe(self, nbytes: int = PROBE_NBYTES) -> float:
        """Bytes per second of reading about `nbytes`. Each probe goes on where the last one ended, so that no cache on the
        way to the drive has seen what it reads. Raises `DiskError`, and `ModelError` where there are no weights."""
        if not self._extents:
            raise ModelError(f"{self._folder} has no *.safetensors file to read")
        async with Port() as port:
            disk, _ = open_disk(self._backend, port, self._folder)
            try:
                speed = await drive_speed(disk, list(self._extents), self._ring, nbytes)
            finally:
                with anyio.CancelScope(shield=True):
                    await disk.aclose()
        self._extents.rotate(-(nbytes // CHUNK))
        return speed

    def __repr__(self) -> str:
        return f"<Drive read by {self._backend}, {len(self._extents)} extents>"
