"""The KV cache of one runtime: stores for sequences, and room for what a pass adds to them.

Decisions are made on the event loop, between the layers of a pass and between passes. It refuses to know where on disk
cells lie, and which requests the sequences belong to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread

from ..buffers import PAGE, Ring
from ..errors import StoreError
from ..maths.attention import BLOCK
from .cell import Cell, copied
from .home import Home
from .interruptible import Interruptible
from .lifecycle import Lifecycle
from .memory import Memory
from .pool import BlockPool, Slot
from .record import DamageError, Place
from .records import Loaded, Records
from .residency import Residency, SpillPolicy
from .store import Store
from .writer import Tally, Writer

MANY = 64
"""Slots whose memory takes milliseconds to give back: longer than an event loop should wait."""


class Cache:
    """Stores for sequences, in `pool` and, where there are `records`, on disk. `window`: tokens that a sequence keeps at most.

    Stored blocks are read into `ring`, at most `run_nbytes` at a time. `states`: shapes of what other layers carry along.
    """

    def __init__(
        self, pool: BlockPool, records: Records | None, residency: Residency, lifecycle: Lifecycle, policy: SpillPolicy,
        window: int | None = None, ring_nbytes: int = 0, run_nbytes: int = 0, states: Sequence[tuple[int, ...]] = (),
    ) -> None:  # fmt: skip
        self.pool, self.records, self.lifecycle, self.policy = pool, records, lifecycle, policy
        self.window, self.state_shapes = window, states
        self.ring, self.run_nbytes = Ring(max(ring_nbytes, PAGE)), run_nbytes
        self.memory = Memory(pool, records)
        self.writer = Writer(self.memory, records, residency, lifecycle, policy) if records is not None else None
        self.evictions = self.evicted_tokens = 0
        self.displaced = 0
        """Idle stores that were closed to make room."""
        self.idle: dict[int, Store] = {}
        """Stores that sessions keep while nothing is asked of them, the longest idle first."""
        self.freed: Callable[[], None] = lambda: None
        """Called when memory was given back."""
        self.compute: Callable[..., Awaitable[Any]] = anyio.to_thread.run_sync
        """Runs a function where torch may compute and slots are filled."""
        self.writing = Interruptible()
        """What `run` does."""
        self._stores: dict[int, Store] = {}
        self._numbers = 0
        self._former: list[Tally] = []

    def next_number(self) -> int:
        """A number that no other sequence has, in this cache or on disk."""
        if self.records is not None:
            return self.records.volume.next_sequence()
        self._numbers += 1
        return self._numbers

    def reservation(self, tokens: int, sequences: int) -> int:
        """Tokens of memory to set aside for sequences of at most `tokens` tokens together: where there is a disk, their last blocks."""
        return tokens if self.records is None else min(tokens, sequences * BLOCK)

    def open(self, salt: str = "") -> Store:
        """An empty store."""
        store = Store(self, self.next_number(), self.lifecycle.root(salt))
        self.opened(store)
        return store

    def opened(self, store: Store) -> None:
        """`store` begins to share in the cache."""
        self._stores[store.number] = store

    async def adopt(self, store: Store, ids: Sequence[int]) -> tuple[int, str | None]:
        """Begin an empty store with the longest stored prefix of `ids`; returns its tokens, and why there are not more."""
        found = await self.lifecycle.find(store.root, ids, self.window)
        tokens, reason = found.tokens, found.reason
        try:
            if self.state_shapes and tokens:
                tokens, states = await self.lifecycle.states(found, self.state_shapes)
                if tokens < found.tokens:
                    reason = reason or f"states are stored at the ends of blocks alone, the last of them at {tokens} tokens"
                found = await self.lifecycle.find(store.root, ids[:tokens], self.window)  # what was found may have gone meanwhile
                tokens = tokens if found.tokens == tokens else 0
                if tokens:
                    store.states.restore(tokens, [*states])
            if not tokens:
                return 0, reason
            for layer, cells in enumerate(found.cells):
                cells = cells[: -(-tokens // BLOCK) - found.first]
                self.memory.own(cells)
                store.adopt(layer, cells, found.first, tokens)
            store.accept(ids[:tokens])
            await self.ready(store)
        except StoreError as error:
            await self.missed(store, tokens // BLOCK * BLOCK, error)
            return store.truncate(tokens // BLOCK * BLOCK if not self.state_shapes else 0), str(error)
        return tokens, reason

    async def ready(self, store: Store) -> None:
        """Have the last, incomplete block of each layer in memory and the store's own, so that it can be continued whatever
        leaves memory until then. Raises `StoreError`."""
        for layer in range(self.pool.layers):
            length = store.length(layer)
            if self.records is None or not length % BLOCK:
                continue
            while not (cell := store.cells(layer, length - 1)[0]).writable:
                source = cell.slot or await self.records.read_apart(cell)
                own = await self.compute(_own, self.pool, cell, length % BLOCK, source)
                if isinstance(source, Slot) and cell.slot is not source:  # it left memory while it was copied
                    self.memory.forget([own])
                else:
                    self.memory.disown([store.replace(layer, cell.index, own)])

    async def missed(self, store: Store, position: int, reason: StoreError) -> None:
        """What is stored of `store` at `position` could not be read. If that is because it is damaged, nobody is to find it again."""
        if isinstance(reason, DamageError):
            for layer in range(self.pool.layers):
                for cell in store.cells(layer, position)[:1]:
                    if cell.stored is not None:
                        await self.lifecycle.damaged(cell.stored)

    async def close(self, store: Store) -> None:
        """Take a store's cells back; where they are stored for good, what is not yet written is written first."""
        self.idle.pop(store.number, None)
        if self.lifecycle.persistent and self.writer is not None:
            self.writer.end(store, self._ended)
            return
        cells = store.take_cells()
        for first in range(0, len(cells), MANY):
            self.memory.disown(cells[first : first + MANY])
            await anyio.lowlevel.checkpoint()
        self._ended(store)

    def rest(self, store: Store) -> None:
        """A session keeps `store` while nothing is asked of it: it needs no more room than it fills."""
        needed = min(store.reserved, self.reservation(store.tokens, 1))
        self.pool.release(store.reserved - needed)
        store.reserved = needed
        self.idle[store.number] = store

    def branch(self, store: Store) -> Store | None:
        """A twin of an idle store, or None while there is no room for what it must have in memory."""
        needed = self.reservation(store.tokens, 1)
        if not self.pool.reserve(needed):
            return None
        twin = store.fork()
        twin.reserved = needed
        self.idle[twin.number] = twin
        return twin

    async def close_idle(self, keep: Store | None) -> bool:
        """Close the store that has been idle for longest, to make room; whether there was one."""
        for store in self.idle.values():
            if store is not keep:
                await store.aclose()
                self.displaced += 1
                return True
        return False

    async def turn(self, rows: int, tails: int) -> None:
        """Before a pass that adds `rows` rows to a layer, at most `tails` of which stay in last blocks: make room.

        Raises `StoreError` when memory is full and nothing can be written.
        """
        self.memory.pass_by(self.pool.layers - 1)
        if self.records is not None:
            await self.records.bury()
            growth = tails * self.pool.layers + 2 * rows
            self.memory.share = max(0, self.pool.tokens - growth // self.pool.layers)
            await self.relieve(growth)
        self.memory.passed = 0

    def pressed(self, rows: int) -> bool:
        """Whether `rows` rows more have no room now. For the compute thread."""
        return self.records is not None and not self.memory.fits(rows)

    async def relieve(self, rows: int) -> None:
        """Return when `rows` rows more have room: what is on disk too leaves memory, and what is not is written. Raises
        `StoreError` when it cannot be."""
        while self.writer is not None and not self.memory.fits(rows):
            if self.memory.evict_one():
                continue
            if self.writer.idle:
                if self.writer.failure is None:
                    for store in self._stores.values():
                        for layer in range(self.memory.passed):
                            self.writer.settle(store, layer, everything=True)
                if self.writer.idle and self.writer.failure is None:
                    return  # what is in memory was set aside for whoever has it
            if not self.writer.idle:
                await self.writer.progress()
            if self.writer.idle and self.writer.failure is not None:
                raise StoreError(f"the KV cache is full and cannot be written: {self.writer.failure}") from self.writer.failure

    def settle(self, layer: int, stores: Sequence[Store], promoted: Sequence[tuple[Cell, Cell]] = ()) -> None:
        """The pass is done with `layer`: its whole blocks may go. `promoted`: cells that were read, and copies of them in memory."""
        self.memory.pass_by(layer)
        for cell, copy in promoted:
            self.memory.promote(cell, copy)
        for store in stores:
            passed = store.slide(layer)
            self.evictions += len(passed)
            self.evicted_tokens += BLOCK * len(passed) if layer == 0 else 0
            self.memory.disown(passed)
            if self.writer is not None:
                self.writer.pass_by(passed)
                self.writer.settle(store, layer)
        self.memory.evict(layer)

    def tallies(self) -> list[Tally]:
        """What was done with cells on disk, in this home and in former ones."""
        now = [Tally.of(self.writer, self.records)] if self.writer is not None and self.records is not None else []
        return [*self._former, *now]

    def has_room(self, layer: int) -> bool:
        """Whether a block of `layer` that was read may stay in memory. For the compute thread."""
        return self.memory.over(layer) < 0 and self.writer is not None and self.writer.idle

    async def run(self) -> None:
        """Write behind, until cancelled."""
        await self.writing.run(self._write_behind)

    def rehouse(self, home: Home, places: Mapping[Cell, Place]) -> Records | None:
        """Go on in `home`, between passes and while nothing is written: all idle histories are in memory but for `places`, where
        those cells lie now. Returns the records that were left, of which nothing is in use; only for what is gone with its runtime."""
        left = self.records
        self._former = self.tallies()
        if left is not None:
            for cell in list(left.placed.values()):
                left.forget(cell)
        self.records, self.policy, self.pool.tokens = home.records, home.policy, home.tokens
        self.ring, self.run_nbytes = Ring(max(home.ring_nbytes, PAGE)), home.run_nbytes
        self.memory.rehouse(home.records)
        self.writer = None
        if home.records is not None:
            self.writer = Writer(self.memory, home.records, home.residency, self.lifecycle, home.policy)
            for cell, place in places.items():
                home.records.keep(cell, place)
        for store in self._stores.values():
            store.rehoused(self.next_number())
        self._stores, self.idle = ({store.number: store for store in stores.values()} for stores in (self._stores, self.idle))
        for store in self.idle.values():
            needed = self.reservation(store.tokens, 1)
            self.pool.release(store.reserved - needed)
            store.reserved = needed
        return left

    async def flush(self) -> None:
        """Return when all whole accepted blocks are written and durable. Raises `StoreError` or `DiskError`."""
        if (writer := self.writer) is None:
            return
        for store in self._stores.values():
            for layer in range(self.pool.layers):
                writer.settle(store, layer, everything=True)
        while not writer.idle:
            await writer.progress()
        if writer.failure is not None:
            raise writer.failure
        await writer.sync()

    async def aclose(self) -> None:
        """Write what is to outlive the runtime, and give everything back; nothing else runs any more."""
        self.memory.passed = self.pool.layers
        for store in list(self._stores.values()):
            await store.aclose()
        if self.writer is not None:
            await self.writer.aclose()

    def __repr__(self) -> str:
        return f"<Cache {len(self._stores)} stores, {self.memory}>"

    async def _write_behind(self) -> None:
        await (self.writer.run() if self.writer is not None else anyio.sleep_forever())

    def _ended(self, store: Store) -> None:
        self.memory.see_off()
        self._stores.pop(store.number, None)
        self.memory.disown(store.take_cells())
        self.pool.release(store.reserved)
        store.reserved = 0
        self.freed()


def _own(pool: BlockPool, cell: Cell, rows: int, source: Slot | Loaded) -> Cell:
    keys, values = source.decode() if isinstance(source, Loaded) else (source.keys, source.values)
    return copied(pool, cell, keys[:rows], values[:rows])
