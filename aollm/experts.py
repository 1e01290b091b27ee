"""Experts: weights of those that rows were routed to, kept in memory where they are asked for often, else read when they are.

Slots of one size hold whichever experts were read last; when another is wanted, the one that was asked for least gives
way, older questions counting less. No expert is ever left out. It refuses to know who routes, and what experts compute.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Self

import anyio
from anyio.abc import TaskGroup

from .buffers import Arena, pages
from .device import Device
from .disk.base import Disk, Priority
from .errors import AollmError
from .families.base import Params
from .piece import Piece, read_piece, views
from .trace import Event, Trace

Key = tuple[int, int]
"""A layer and the number of one of its experts."""
HALF_LIFE = 128
"""Passes after which a question counts half."""
TRUSTED = 0.8
"""Share of guesses about what the next layer will have to read that must have come true lately for it to be read on a guess."""
RECENT = 1 / 64
"""Weight of one layer's guesses in that share."""
FEW_ROWS = 64
"""Rows of which all experts' results are held until they are summed, so that experts may come in any order."""


@dataclass(eq=False, slots=True)
class _Slot:
    offset: int
    key: Key | None = None
    params: Params | None = None
    error: AollmError | None = None
    users: int = 0
    loading: bool = False
    ready: anyio.Event = field(default_factory=anyio.Event)


@dataclass(eq=False, slots=True)
class _Fetch:
    """What one layer of a pass asked for."""

    keys: list[Key]
    start: float
    slots: deque[_Slot] = field(default_factory=deque)
    grown: anyio.Event = field(default_factory=anyio.Event)
    used: deque[_Slot] = field(default_factory=deque)
    taken: int = 0
    nbytes: int = 0
    over: bool = False


class ExpertCache:
    """The experts of one model, of which `slots` have room in memory. Enter it before anything is asked for; all methods are
    for the task that did."""

    def __init__(self, pieces: Mapping[Key, Piece], slots: int, slot_nbytes: int, disk: Disk, trace: Trace, device: Device) -> None:
        self._pieces, self._disk, self._trace = pieces, disk, trace
        self._arena = Arena(slots * slot_nbytes, huge=False)
        self._undo = device.register(self._arena)
        self._slots = [_Slot(number * slot_nbytes) for number in range(slots)]
        self._where: dict[Key, _Slot] = {}
        self._asked: dict[Key, float] = {}
        self._passes: dict[int, int] = {}
        self._freed = anyio.Event()
        self._fetch: _Fetch | None = None
        self._guess: dict[int, list[int]] = {}  # of one layer
        self._right = 0.0
        self._loading = 0
        self._group: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        self._group = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Stop reading; nothing is in flight afterwards. To be called by the task that entered."""
        assert self._group is not None
        self.stop()
        self._group.cancel_scope.cancel()
        await self._group.__aexit__(None, None, None)

    @property
    def all_fit(self) -> bool:
        """Whether none ever gives way to another."""
        return len(self._slots) >= len(self._pieces)

    def fetch(self, layer: int, numbers: Sequence[int], rows: int, likely: tuple[int, list[int]] | None = None) -> list[int]:
        """Begin to read those of a layer's experts `numbers` (ascending) that are not in memory; returns the order in which
        `next` has them: for few rows those that are in memory first.

        `likely`, a later layer and experts of it, are read when nothing else is, if such guesses have been good.
        """
        assert self._group is not None
        self._judge(layer, numbers)
        keys = [(layer, number) for number in numbers]
        self._note(layer, keys)
        if rows <= FEW_ROWS:
            keys.sort(key=lambda key: key not in self._where)
        self._fetch = _Fetch(keys, perf_counter())
        self._group.start_soon(self._feed, self._fetch)
        if likely is not None:
            self._guess = {likely[0]: [number for number in likely[1] if (likely[0], number) not in self._where]}
        return [number for _, number in keys]

    async def next(self) -> list[Params]:
        """The weights of those that come next in the order, one or more, to be used until `release` is called for as many."""
        fetch = self._fetch
        assert fetch is not None
        while not fetch.slots:
            await fetch.grown.wait()
        await fetch.slots[0].ready.wait()
        found: list[Params] = []
        while fetch.slots and fetch.slots[0].ready.is_set():
            slot = fetch.slots[0]
            if slot.error is not None:
                if found:
                    break
                raise slot.error
            fetch.used.append(fetch.slots.popleft())
            assert slot.params is not None
            found.append(slot.params)
        fetch.taken += len(found)
        if fetch.taken == len(fetch.keys):
            event = Event("experts_load", fetch.start, perf_counter(), fetch.keys[0][0], nbytes=fetch.nbytes, rows=len(fetch.keys))
            self._trace.add(event)
        return found

    def release(self, count: int) -> None:
        """The first `count` of those in use are not used any more."""
        if self._fetch is not None:
            for _ in range(min(count, len(self._fetch.used))):
                self._leave(self._fetch.used.popleft())

    def stop(self) -> None:
        """Ask for no more: the pass is over, or has ended early."""
        if self._fetch is not None:
            self._fetch.over = True
            for slot in (*self._fetch.used, *self._fetch.slots):
                self._leave(slot)
            self._fetch = None
            self._guess = {}
            self._wake()

    def forget(self) -> None:
        """Give the memory back; nothing can be asked for afterwards."""
        self._undo()
        self._slots, self._where, self._arena, self._undo = [], {}, Arena(0), lambda: None

    @property
    def in_memory(self) -> int:
        """Experts that are in memory."""
        return len(self._where)

    def __repr__(self) -> str:
        return f"<ExpertCache {self.in_memory} of {len(self._pieces)} in {len(self._slots)} slots>"

    async def _feed(self, fetch: _Fetch) -> None:
        for key in fetch.keys:
            slot = self._where.get(key)
            while slot is None or slot.error is not None:
                if (slot := self._free(fetch)) is not None:
                    self._begin(slot, key, fetch)
                    break
                await self._freed.wait()
                if fetch.over:
                    return
                slot = self._where.get(key)
            assert slot is not None
            slot.users += 1
            fetch.slots.append(slot)
            fetch.grown.set()
            fetch.grown = anyio.Event()
        if self._right >= TRUSTED:
            await self._read_likely(fetch)

    async def _read_likely(self, fetch: _Fetch) -> None:
        """Read what the next layer will probably ask for, one expert at a time, while nothing that was asked for is read."""
        for layer, numbers in self._guess.items():
            for number in numbers:
                while self._loading and fetch is self._fetch:
                    await self._freed.wait()
                if fetch is not self._fetch:
                    return
                slot = self._free(fetch) if (layer, number) not in self._where else None
                if slot is not None and slot.key not in self._wanted(fetch):
                    self._begin(slot, (layer, number), None)

    def _judge(self, layer: int, numbers: Sequence[int]) -> None:
        """See how much of what was guessed of a layer it does ask for."""
        guessed = self._guess.pop(layer, None)
        self._guess = {}
        if guessed:
            self._right += RECENT * (len(set(guessed) & set(numbers)) / len(guessed) - self._right)

    def _free(self, fetch: _Fetch) -> _Slot | None:
        """The slot of the expert that was asked for least, of those that are not in use; one that is still wanted only if need be."""
        idle = [slot for slot in self._slots if not slot.users and not slot.loading]
        wanted = self._wanted(fetch)
        return min(idle, key=lambda slot: (slot.key in wanted, self._score(slot)), default=None)

    def _wanted(self, fetch: _Fetch) -> set[Key]:
        """What this layer asked for, and what the next one probably will."""
        return {*fetch.keys, *((layer, number) for layer, numbers in self._guess.items() for number in numbers)}

    def _score(self, slot: _Slot) -> float:
        return -math.inf if slot.key is None or slot.error is not None else self._asked.get(slot.key, -math.inf)

    def _begin(self, slot: _Slot, key: Key, fetch: _Fetch | None) -> None:
        """Read an expert into a slot, for a fetch that asked for it or for none."""
        assert self._group is not None
        if slot.key is not None and self._where.get(slot.key) is slot:
            del self._where[slot.key]
        self._where[key] = slot
        slot.key, slot.params, slot.error, slot.loading, slot.ready = key, None, None, True, anyio.Event()
        self._loading += 1
        if fetch is not None:
            fetch.nbytes += self._pieces[key].read_nbytes
        self._group.start_soon(self._load, slot, self._pieces[key], Priority.PERHAPS if fetch is None else Priority.SOON)

    async def _load(self, slot: _Slot, piece: Piece, priority: Priority) -> None:
        try:
            await read_piece(piece, self._arena, slot.offset, None, self._disk, self._trace, priority)
            slot.params = views(piece, self._arena, slot.offset)
        except AollmError as error:
            slot.error = error
        slot.loading = False
        self._loading -= 1
        slot.ready.set()
        self._wake()

    def _leave(self, slot: _Slot) -> None:
        slot.users -= 1
        self._wake()

    def _wake(self) -> None:
        self._freed.set()
        self._freed = anyio.Event()

    def _note(self, layer: int, keys: Sequence[Key]) -> None:
        """Count a question. A score is the base-2 logarithm of a count in which each question weighs twice as much as one
        `HALF_LIFE` passes before it, so scores never change by themselves."""
        now = self._passes[layer] = self._passes.get(layer, -1) + 1
        age = now / HALF_LIFE
        for key in keys:
            known = self._asked.get(key)
            self._asked[key] = age + math.log2(1 + (2.0 ** (known - age) if known is not None else 0.0))


def slot_nbytes(pieces: Mapping[Key, Piece]) -> int:
    """Bytes of a slot that has room for any expert."""
    return pages(max((piece.nbytes for piece in pieces.values()), default=0))
