"""One call's operations, whoever carries them out: counted down, and waited for even when nobody wants them any more.

Memory belongs to the drive while an operation runs on it; so a cancelled transfer drops what has not begun and waits
for the rest. It refuses to know how operations are carried out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter

import anyio

from .base import Span

Call = Callable[[], object]


class Transfer:
    """`count` operations: each begins and finishes in any thread, and the caller wakes after the last.

    `post` has a call run on the event loop; `poll` lets completions in when nobody else does.
    """

    def __init__(self, count: int, post: Callable[[Call], None], poll: Call | None = None) -> None:
        self._post, self._poll = post, poll
        self._done = anyio.Event()
        self._lock = threading.Lock()
        self._waiting, self._running = count, 0
        self._dropped = False
        self._error: BaseException | None = None
        self._start = self._end = 0.0

    def begin(self) -> bool:
        """Whether an operation whose turn has come is still wanted; if it is, `finish` must follow."""
        with self._lock:
            if self._dropped:
                return False
            self._start = self._start or perf_counter()
            self._waiting -= 1
            self._running += 1
            return True

    def finish(self, error: BaseException | None = None) -> None:
        """One operation ended; after an error those that have not begun are dropped."""
        with self._lock:
            self._running -= 1
            self._error = self._error or error
            self._dropped = self._dropped or error is not None
            if self._running or (self._waiting and not self._dropped):
                return
            self._end = perf_counter()
        self._post(self._done.set)

    async def wait(self) -> Span:
        """Until all operations ended; raises the first error."""
        try:
            await self._done.wait()
        except BaseException:
            await self._settle()
            raise
        if self._error is not None:
            raise self._error
        return Span(self._start, self._end)

    async def _settle(self) -> None:
        """Drop what has not begun and wait for the rest. Polls, so that a second cancellation changes nothing."""
        with self._lock:
            self._dropped = True
        with anyio.CancelScope(shield=True):
            while self._running:
                if self._poll is not None:
                    self._poll()
                try:
                    await anyio.sleep(0.001)
                except anyio.get_cancelled_exc_class():  # asyncio's own cancel() goes through the shield; the first one is raised anyway
                    continue

    def __repr__(self) -> str:
        return f"<Transfer {self._waiting} waiting, {self._running} running>"
