"""A trial of a cache: passes as the engine plays them, layer by layer, and what they ought to read.

Keys and values are a function of tokens and positions, so what a store should hold is known whatever was done to it. It
refuses to know what is tried.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

import anyio
import anyio.to_thread
import torch
from anyio.abc import TaskGroup
from torch import Tensor

from ..errors import first_of
from ..maths.attention import BLOCK, first_seen
from .cache import Cache
from .cell import Cell, copied, runs
from .pool import BlockPool
from .store import Store
from .volume import Volume


class ContractError(AssertionError):
    """A store does not do what all stores promise."""


@dataclass(eq=False, slots=True)
class Pair:
    """A store, and the tokens that its history is to be made of. `cuts`: how often a block may have been stored once more."""

    store: Store
    ids: list[int]
    cuts: int = 0


class Trial:
    """A cache at work, and pairs whose stores are in it; leaving it closes the cache, and looks for what is left behind."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.pairs: list[Pair] = []
        self.cold = 0
        """Blocks that were read."""
        pool = cache.pool
        self._most_rows = pool.tokens if cache.records is None else max((pool.tokens - BLOCK) * pool.layers // 16, 32)
        self._group: TaskGroup = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._group.start_soon(self.cache.run)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._group.cancel_scope.cancel()
        try:
            await self._group.__aexit__(kind, error, trace)
        except BaseExceptionGroup as raised:
            raise first_of(raised) from None
        finally:
            with anyio.CancelScope(shield=True):
                await self.cache.aclose()
        if error is None:
            _nothing_left(self.cache)

    async def begin(self, most: int, salt: str = "") -> Pair:
        """A new store of at most `most` tokens."""
        return await self._hold(Pair(self.cache.open(salt), []), most)

    async def find(self, ids: Sequence[int], most: int, salt: str = "") -> Pair:
        """A new store that begins with what is stored of `ids`."""
        pair = await self.begin(most, salt)
        tokens, reason = await self.cache.adopt(pair.store, ids)
        expect(tokens, pair.store.tokens, "tokens adopted and in the store")
        expect(tokens == len(ids) or reason is not None, True, "there is a reason for a miss")
        pair.ids, pair.cuts = list(ids[:tokens]), 3  # what is found may have been found, continued and stored before
        return pair

    async def fork(self, pair: Pair, most: int) -> Pair:
        """A twin of `pair`."""
        return await self._hold(Pair(pair.store.fork(), list(pair.ids), pair.cuts), most)

    async def extend(self, *parts: tuple[Pair, Sequence[int]]) -> None:
        """Append tokens to several stores side by side, in as many passes as memory needs."""
        left = [(pair, list(ids)) for pair, ids in parts]
        while left:
            rows = max(self._most_rows // len(left), 1)
            await self._pass([(pair, ids[:rows]) for pair, ids in left])
            left = [(pair, ids[rows:]) for pair, ids in left if ids[rows:]]

    async def truncate(self, pair: Pair, tokens: int) -> int:
        """Cut a store off; returns where it is."""
        wanted = min(tokens, len(pair.ids))
        left = pair.store.truncate(wanted)
        if left != wanted:
            expect((self.cache.window is not None, left), (True, 0), f"where a cut at {wanted} may lead")
        del pair.ids[left:]
        expect(pair.store.ids, pair.ids, "accepted tokens after a cut")
        pair.cuts += 1
        await self.cache.ready(pair.store)
        return left

    async def close(self, pair: Pair) -> None:
        """Give a store back."""
        self.pairs.remove(pair)
        await pair.store.aclose()

    async def check(self) -> None:
        """A pass without rows: every store has its history, as far as the next query sees it."""
        await self._pass([(pair, []) for pair in self.pairs])

    async def _hold(self, pair: Pair, most: int) -> Pair:
        tokens = self.cache.reservation(most, 1)
        if not self.cache.pool.reserve(tokens):
            await self.cache.flush()  # some stores may not have been given back yet
            expect(self.cache.pool.reserve(tokens), True, f"room for {tokens} tokens in {self.cache}")
        pair.store.reserved = tokens
        self.pairs.append(pair)
        return pair

    async def _pass(self, parts: Sequence[tuple[Pair, Sequence[int]]]) -> None:
        cache, rows = self.cache, sum(len(ids) for _, ids in parts)
        for pair, ids in parts:
            pair.store.accept(ids)
        await cache.turn(rows, rows)
        for layer in range(cache.pool.layers):
            promoted: list[tuple[Cell, Cell]] = []
            if cache.pressed(rows):
                await cache.relieve(rows)
            if rows:
                await anyio.to_thread.run_sync(self._append, layer, parts)
            for pair, ids in parts:
                await self._compare(pair, layer, [*pair.ids, *ids], first_seen(len(pair.ids), cache.window), promoted)
            cache.settle(layer, [pair.store for pair, _ in parts], promoted)
        for pair, ids in parts:
            pair.ids += ids
            expect((pair.store.tokens, pair.store.ids), (len(pair.ids), pair.ids), "tokens after a pass")

    def _append(self, layer: int, parts: Sequence[tuple[Pair, Sequence[int]]]) -> None:
        for pair, ids in parts:
            pair.store.append(layer, *content(self.cache.pool, layer, len(pair.ids), ids))

    async def _compare(self, pair: Pair, layer: int, ids: Sequence[int], first: int, promoted: list[tuple[Cell, Cell]]) -> None:
        cache, cells = self.cache, pair.store.cells(layer, first)
        wanted = range(first // BLOCK, -(-len(ids) // BLOCK))
        expect([cell.index for cell in cells], [*wanted], f"blocks of layer {layer} that a query at {first} sees")
        for run in runs(cells, cache.run_nbytes):
            if not run.cold:
                (cell,) = run.cells
                assert cell.slot is not None
                self._same(pair, cell, ids, (cell.slot.keys, cell.slot.values))
                continue
            assert cache.records is not None
            lease = await cache.ring.take(run.nbytes)
            try:
                for block in await cache.records.read(run, cache.ring.arena.bytes[lease.offset : lease.offset + run.nbytes]):
                    self.cold += 1
                    decoded = block.decode()
                    self._same(pair, block.cell, ids, decoded)
                    if cache.has_room(layer) and len(decoded[0]) == BLOCK:
                        promoted.append((block.cell, copied(cache.pool, block.cell, *decoded)))
            finally:
                lease.release()

    def _same(self, pair: Pair, cell: Cell, ids: Sequence[int], found: tuple[Tensor, Tensor]) -> None:
        """Values are at most 1: quantized once, they are off by half a 127th, and by their type's own rounding."""
        records, mine = self.cache.records, ids[cell.start : cell.start + BLOCK]
        exact = records is None or not records.codec.representation
        most = 0.0 if exact else (1 + pair.cuts) * (0.5 / 127 + torch.finfo(self.cache.pool.shape.dtype).eps)
        for name, here, wanted in zip(("keys", "values"), found, content(self.cache.pool, cell.layer, cell.start, mine), strict=True):
            off = float((here[: len(mine)].float() - wanted.float()).abs().max())
            if not off <= most:
                raise ContractError(f"{name} of layer {cell.layer}, block {cell.index} of {pair.store} are off by {off}, at most {most}")


def content(pool: BlockPool, layer: int, start: int, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The keys and values [T, K, D] that tokens `ids` at positions from `start` on have, from -1 to 1."""
    tokens = torch.tensor(ids, dtype=torch.int64)[:, None] * 7919 + torch.arange(start, start + len(ids))[:, None] * 104_729
    shape = pool.shape
    number = tokens + torch.arange(2 * shape.heads * shape.head_dim) * 31_337 + layer * 15_485_863
    rows = (number % 65_521 / 32_760 - 1).to(shape.dtype).view(len(ids), 2, shape.heads, shape.head_dim)
    return rows[:, 0], rows[:, 1]


def tokens_of(count: int, seed: int) -> list[int]:
    """Token ids that are the same in every run."""
    return Random(seed).choices(range(1 << 17), k=count)


def expect(found: object, wanted: object, what: str) -> None:
    """Raise `ContractError` unless both are equal."""
    if found != wanted:
        raise ContractError(f"{what}: found {str(found)[:300]}, not {str(wanted)[:300]}")


def _nothing_left(cache: Cache) -> None:
    pool, records = cache.pool, cache.records
    expect((pool.all_rows, pool.reserved), (0, 0), "rows filled and tokens reserved after closing")
    if records is None:
        return
    expect(cache.ring.leased, 0, "bytes of the ring in use after closing")
    kept = records.volume.index.nbytes if isinstance(records.volume, Volume) else 0
    expect(records.layout.nbytes, kept, "bytes of records on disk after closing")
    if not cache.lifecycle.persistent:
        expect(os.path.exists(records.volume.path), False, f"whether {records.volume.path} is there after closing")
