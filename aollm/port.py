"""The completion port: where other threads hand results to the event loop.

One queue, one descriptor, one task. Whoever finishes something in another thread posts a call; the pump runs it on
the loop, on asyncio and trio alike. It refuses to know what was finished.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Self

import anyio
from anyio.abc import TaskGroup


class Port:
    """`async with Port() as port`: calls posted from any thread run on the event loop, in order."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        if not _EVENTFD:
            self._reader, self._writer = socket.socketpair()
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if self._reader is None else self._reader.fileno()
        if self._reader is not None and self._writer is not None:
            self._reader.setblocking(False)
            self._writer.setblocking(False)
        self._group: TaskGroup
        self._pumping: anyio.CancelScope
        self._closed = False
        self.polls: list[Callable[[], object]] = []
        """Called on every wake-up: a ring that signals `fd` by itself reaps its completions here."""

    def post(self, call: Callable[[], object]) -> None:
        """Have `call()` run on the event loop; returns at once. Safe from any thread, and nothing once the port is closed."""
        if not self._closed:
            self._calls.put(call)
            self._wake()

    async def __aenter__(self) -> Self:
        """Begin to run what is posted."""
        self._group, self._pumping = anyio.create_task_group(), anyio.CancelScope(shield=True)
        await self._group.__aenter__()
        self._group.start_soon(self._pump)
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Run nothing more, and give the descriptor back. Until then no cancellation ends the port: whoever is cancelled may
        still wait for what another thread finishes."""
        self._pumping.cancel()
        try:
            await self._group.__aexit__(None, None, None)
        finally:
            self._close()

    def drain(self) -> None:
        """Run what has been posted so far."""
        for _ in range(self._calls.qsize()):  # not what these calls post: that has its own wake-up
            try:
                call = self._calls.get_nowait()
            except Empty:
                return
            call()

    async def _pump(self) -> None:
        with self._pumping:
            while True:
                await anyio.wait_readable(self.fd)
                self._rest()
                for poll in self.polls:
                    poll()
                self.drain()

    def _close(self) -> None:
        self._closed = True
        if self._reader is None or self._writer is None:
            os.close(self.fd)
        else:
            self._reader.close()
            self._writer.close()

    def _wake(self) -> None:
        if self._writer is None:
            os.eventfd_write(self.fd, 1)
            return
        try:
            self._writer.send(b"\0")
        except BlockingIOError:  # the loop already has a wake-up waiting
            pass

    def _rest(self) -> None:
        try:
            if self._reader is None:
                os.eventfd_read(self.fd)
            else:
                self._reader.recv(4096)
        except BlockingIOError:  # somebody else took the wake-up
            pass


_EVENTFD = sys.platform == "linux"
