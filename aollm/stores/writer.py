"""Writing behind: whole blocks, what ended stores leave, compaction and syncs, one after the other while passes run.

What cannot be written stays in memory and is tried again; who needs its room is told why there is none. It refuses to
know when a pass begins and ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from time import monotonic

import anyio

from ..errors import AollmError
from ..maths.attention import BLOCK
from .cell import Cell
from .compaction import compact
from .lifecycle import Lifecycle
from .memory import Memory
from .records import NOBODY, Item, Records
from .residency import Residency, SpillPolicy
from .store import Store


@dataclass(frozen=True, slots=True)
class Tally:
    """What was done with cells on disk so far."""

    spills: int
    spilled_tokens: int
    compactions: int
    written_nbytes: int
    corrupt: int
    unreadable: int

    @classmethod
    def of(cls, writer: Writer, records: Records) -> Tally:
        """What `writer` did, and what `records` met."""
        return cls(
            writer.spills, writer.spilled_tokens, writer.compactions, records.written_nbytes, records.corrupt, records.unreadable,
        )  # fmt: skip


class Writer:
    """Writes cells of `memory` as `residency` and `policy` say, to `records`, and tells `lifecycle`."""

    def __init__(self, memory: Memory, records: Records, residency: Residency, lifecycle: Lifecycle, policy: SpillPolicy) -> None:
        self.failure: AollmError | None = None
        """Why the last write failed."""
        self.trouble: AollmError | None = None
        """Why something was not kept that nobody waits for."""
        self.spills = self.spilled_tokens = self.compactions = 0
        self._memory, self._records, self._residency = memory, records, residency
        self._lifecycle, self._policy = lifecycle, policy
        self._queue: deque[tuple[Store, Cell, bytes]] = deque()
        self._ending: deque[tuple[Store, Callable[[Store], None]]] = deque()
        self._passed_by: list[Cell] = []
        self._work, self._progress = anyio.Event(), anyio.Event()
        self._busy = False
        self._synced_at = monotonic()

    def settle(self, store: Store, layer: int, everything: bool = False) -> None:
        """Queue those of a layer's whole accepted blocks that are due."""
        accepted = len(store.ids)
        if self._lifecycle.persistent:  # what is found again has to have its states
            accepted = min([accepted, *store.states.tokens])
        dirty = [cell for cell in store.dirty[layer] if cell.start + BLOCK <= accepted]
        due = len(dirty) if everything else self._residency.due(len(dirty), self._memory.over(layer), self._policy.together)
        for cell in dirty[:due]:
            store.dirty[layer].remove(cell)
            if cell.place is None and not cell.writing:
                cell.writing = True
                self._queue.append((store, cell, self._name(store, cell.index)))  # of the tokens that it has now
        if due:
            self._work.set()

    def pass_by(self, cells: Iterable[Cell]) -> None:
        """A window has moved past cells."""
        self._passed_by += cells

    def end(self, store: Store, then: Callable[[Store], None]) -> None:
        """Write what `store` leaves behind, then call `then` with it."""
        self._ending.append((store, then))
        self._work.set()

    @property
    def idle(self) -> bool:
        """Whether nothing is written, and nothing waits for it."""
        return not (self._queue or self._busy or self._ending)

    async def progress(self) -> None:
        """Return when something was written, or could not be."""
        await self._progress.wait()

    async def run(self) -> None:
        """Write what is to be written, until cancelled."""
        while True:
            with anyio.move_on_after(self._policy.flush_s if self._unsynced else self._lifecycle.tends_every_s):
                await self._work.wait()
            self._work = anyio.Event()
            await self.drain()
            await self._tried(self._tend)
            if self._unsynced and monotonic() - self._synced_at >= self._policy.flush_s:
                await self._tried(self.sync)
            self._progressed()

    async def drain(self) -> None:
        """Write all that waits."""
        while self._queue or self._ending:
            await self._tried(self._let_go)  # first: a ring has no room for a block before the one a lap ago went
            await self._write()
            await self._end_one()

    async def sync(self) -> None:
        """Have what was written survive a power cut, if it outlives the runtime. Raises `DiskError`."""
        self._synced_at = monotonic()
        if self._lifecycle.persistent:
            await self._records.sync()
            await self._lifecycle.sync()

    async def aclose(self) -> None:
        """Write all that waits, and let go of the files; `run` does not run any more."""
        await self.drain()
        await self._tried(self._tend)
        await self._tried(self.sync)
        await self._tried(self._records.aclose)

    def __repr__(self) -> str:
        return f"<Writer {len(self._queue)} blocks and {len(self._ending)} ends wait{f', {self.failure}' if self.failure else ''}>"

    async def _write(self) -> None:
        """One batch of the queue. What a failure leaves unwritten stays in memory and is tried again."""
        batch = self._batch()
        if not batch:
            return
        self._busy = True
        try:
            with anyio.CancelScope(shield=True):  # a write would be waited for anyway, and written without being told of it is lost
                await self._records.write([Item(cell, BLOCK, store.number, name) for store, cell, name in batch])
                self.failure = None
                await self._lifecycle.written([(store, cell) for store, cell, _ in batch])
        except AollmError as error:
            self.failure = error
        finally:
            self._busy = False
        for store, cell, _ in batch:
            cell.writing = False
            if not cell.owners:
                self._memory.forget([cell])
            elif cell.place is not None:
                self._memory.written(cell)
                self.spills += 1
                self.spilled_tokens += BLOCK if cell.layer == 0 else 0
            elif not store.closed:
                store.dirty[cell.layer] = sorted([*store.dirty[cell.layer], cell], key=lambda cell: cell.index)
        for layer in {cell.layer for _, cell, _ in batch}:
            self._memory.evict(layer)
        self._progressed()

    def _batch(self) -> list[tuple[Store, Cell, bytes]]:
        batch: list[tuple[Store, Cell, bytes]] = []
        while self._queue and (not batch or len(batch) * self._records.record_nbytes < self._policy.batch_nbytes):
            store, cell, name = self._queue.popleft()
            if cell.owners:
                batch.append((store, cell, name))
            else:
                cell.writing = False
                self._memory.forget([cell])
        return batch

    async def _end_one(self) -> None:
        """Let one store end, once nothing of it waits."""
        if not self._ending:
            return
        store, then = self._ending[0]
        if any(queued is store for queued, *_ in self._queue):
            return
        if self.failure is None and any(store.dirty):
            for layer in range(self._memory.pool.layers):
                self.settle(store, layer, everything=True)
            if self._queue:
                return
        with anyio.CancelScope(shield=True):  # one block at most; what is half written would be neither kept nor given back
            await self._tried(partial(self._lifecycle.ended, store, self._policy.tail_tokens))
        self._ending.popleft()
        then(store)
        self._progressed()

    async def _let_go(self) -> None:
        """Windows have moved past cells: what is stored of them goes."""
        passed, self._passed_by = self._passed_by, []
        await self._lifecycle.passed(passed)

    async def _tend(self) -> None:
        """What is best done when nothing waits for it."""
        await self._let_go()
        await self._lifecycle.tend()
        self.compactions += await compact(self._records, self._lifecycle)
        if self._memory.passed == self._memory.pool.layers:  # between passes
            await self._records.bury()

    def _name(self, store: Store, index: int) -> bytes:
        return store.digest(index) if self._lifecycle.persistent and not store.private else NOBODY

    @property
    def _unsynced(self) -> bool:
        return self._lifecycle.persistent and self._records.unsynced

    async def _tried(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except AollmError as error:
            self.trouble = error

    def _progressed(self) -> None:
        self._progress.set()
        self._progress = anyio.Event()
