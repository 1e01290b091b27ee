"""Work that goes on until it is cancelled, and that somebody can have stand still for a while. It refuses to know what work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio


class Interruptible:
    """`run` in one task; `pause` and `resume` in another."""

    def __init__(self) -> None:
        self._scope: anyio.CancelScope | None = None
        self._stopped, self._resumed = anyio.Event(), anyio.Event()
        self._resumed.set()

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Await `work`, and begin it anew after each pause, until cancelled."""
        while True:
            while not self._resumed.is_set():  # there may have been another pause before this had its turn
                await self._resumed.wait()
            with anyio.CancelScope() as self._scope:
                await work()
            self._scope = None
            self._stopped.set()

    async def pause(self) -> None:
        """Cancel the work, and return when it has ended; it begins again after `resume`, which is to be called in any case."""
        self._stopped, self._resumed = anyio.Event(), anyio.Event()
        if self._scope is not None:
            self._scope.cancel()
            await self._stopped.wait()

    def resume(self) -> None:
        """Let it begin again."""
        self._resumed.set()

    def __repr__(self) -> str:
        return f"<Interruptible {'at work' if self._scope is not None else 'still'}>"
