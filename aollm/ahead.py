"""The one look-ahead: load what a plan names, in order, as far ahead as buffers allow.

A lease is taken before its load starts, so memory bounds the distance. Results come in order; a failed load raises
where its result is asked for, and nowhere else. It refuses to know what it loads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar

import anyio
from anyio.abc import TaskGroup

from .buffers import Lease, Ring
from .errors import AollmError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class _Slot(Generic[Result]):
    lease: Lease
    ready: anyio.Event = field(default_factory=anyio.Event)
    result: Result | None = None
    error: AollmError | None = None


class Ahead(Generic[Item, Result]):
    """`async with Ahead(plan, nbytes, load, ring) as ahead`, then `await ahead.next()` for each item of `plan`.

    `in_turn`: a load begins when the one before it is done.
    """

    def __init__(
        self, plan: Iterable[Item], nbytes: Callable[[Item], int], load: Callable[[Item, Lease], Awaitable[Result]], ring: Ring,
        in_turn: bool = False,
    ) -> None:  # fmt: skip
        self._plan, self._nbytes, self._load, self._ring, self._in_turn = plan, nbytes, load, ring, in_turn
        self._slots: deque[_Slot[Result]] = deque()
        self._grown = anyio.Event()
        self._group: TaskGroup = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._group.start_soon(self._feed)
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Cancel what is being loaded, wait for it, and hand back what nobody took."""
        self._group.cancel_scope.cancel()
        try:
            await self._group.__aexit__(None, None, None)
        finally:
            while self._slots:
                self._slots.popleft().lease.release()

    async def next(self) -> tuple[Result, Lease]:
        """The next item's result and the lease that holds it, to be released by the caller."""
        while not self._slots:
            await self._grown.wait()
        slot = self._slots[0]
        await slot.ready.wait()
        self._slots.popleft()
        if slot.error is not None:
            slot.lease.release()
            raise slot.error
        assert slot.result is not None
        return slot.result, slot.lease

    def __repr__(self) -> str:
        return f"<Ahead {sum(slot.ready.is_set() for slot in self._slots)} ready, {len(self._slots)} begun>"

    async def _feed(self) -> None:
        for item in self._plan:
            slot = _Slot[Result](await self._ring.take(self._nbytes(item)))
            self._slots.append(slot)
            self._grown.set()
            self._grown = anyio.Event()
            if self._in_turn:
                await self._fill(item, slot)
            else:
                self._group.start_soon(self._fill, item, slot)

    async def _fill(self, item: Item, slot: _Slot[Result]) -> None:
        try:
            slot.result = await self._load(item, slot.lease)
        except AollmError as error:
            slot.error = error
        slot.ready.set()
