"""The stored blocks that a pass folds, read ahead of need in the order of its itinerary."""

from __future__ import annotations

from collections.abc import Iterator

from .ahead import Ahead
from .batch import Batch
from .buffers import Lease
from .errors import StoreError
from .itinerary import reads
from .stores.cell import Run
from .stores.records import Loaded
from .sweep import Model


class Gathering:
    """For one pass after the other: `begin`, `next` for each run that is not in memory, `stop`."""

    def __init__(self, model: Model) -> None:
        self._model, self._cache = model, model.cache
        self._ahead: Ahead[Run, list[Loaded]] | None = None

    async def begin(self, batch: Batch, piece: int) -> None:
        """Begin to read what `batch` will fold from `piece` on, if there is anything."""
        if next(self._plan(batch, piece), None) is not None:
            ahead = Ahead(self._plan(batch, piece), lambda run: run.nbytes, self._load, self._cache.ring)
            await ahead.__aenter__()
            self._ahead = ahead

    async def next(self) -> tuple[list[Loaded], Lease] | StoreError:
        """The next run and the lease that holds it, or why it cannot be had."""
        assert self._ahead is not None
        try:
            return await self._ahead.next()
        except StoreError as error:
            return error

    async def stop(self) -> None:
        """Read no further; nothing is in flight afterwards. To be called by the task that began."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            await ahead.__aexit__(None, None, None)

    def _plan(self, batch: Batch, piece: int) -> Iterator[Run]:
        cache = self._cache
        if cache.records is None:
            return iter(())
        return reads(batch, self._model.family, piece, self._model.chunk_rows, cache.window, cache.run_nbytes)

    async def _load(self, run: Run, lease: Lease) -> list[Loaded]:
        assert self._cache.records is not None
        return await self._cache.records.read(run, self._cache.ring.arena.bytes[lease.offset : lease.offset + run.nbytes])

    def __repr__(self) -> str:
        return f"<Gathering {self._ahead or 'nothing'}>"
