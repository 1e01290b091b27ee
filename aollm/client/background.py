"""A thread with an event loop, in which one runtime is open, and what other threads ask of it.

What is asked is an errand: it runs in the loop, and what it gives out crosses by a queue, so the loop never waits for a thread,
and a thread wakes the loop only after the loop has waited for it to catch up. Everything that ends something returns at once, so
that a finalizer may call it in any thread. It refuses to know what an errand does.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import anyio
import anyio.abc

from ..disk.base import Disk
from ..errors import RequestError
from ..request import OUTBOX
from ..runtime import Runtime
from ..settings import RuntimeConfig

Part = TypeVar("Part")
Give = Callable[[Part], Awaitable[None]]

CLOSED = "the client was closed before this was answered"
STANDS_STILL = (
    "this thread runs an event loop, which would stand still meanwhile: "
    "use aollm.Runtime there, or call the client in a worker thread, such as anyio.to_thread.run_sync or asyncio.to_thread gives"
)


class End:
    """Nothing more will be given out."""


END = End()


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class Errand(Generic[Part]):
    """Work that runs in the loop of `background` for another thread, which takes the parts that it gives out, in order."""

    def __init__(self, background: Background, work: Callable[[Runtime, Give[Part]], Awaitable[None]]) -> None:
        self._background = background
        self._work = work
        self._parts: SimpleQueue[Part | End | _Failed] = SimpleQueue()
        self._scope: anyio.CancelScope | None = None
        self._caught_up: anyio.Event | None = None
        self._left = False

    def begin(self) -> None:
        """Have the loop begin with it. Raises `RequestError` when the loop has ended."""
        try:
            self._background.begin(self)
        except RequestError as error:
            self._parts.put(_Failed(error))  # for whoever else waits
            raise

    def take(self) -> Part | End:
        """The next part, waited for, or `END`; raises what the work raised."""
        part = self._parts.get()
        if isinstance(part, _Failed | End):
            self._parts.put(part)  # for whoever asks again
            if isinstance(part, _Failed):
                raise part.error
            return part
        if (caught_up := self._caught_up) is not None and self._parts.qsize() <= OUTBOX // 2:
            self._background.post(caught_up.set)
        return part

    def cancel(self) -> None:
        """Nobody will take any more. Returns at once; for any thread, a finalizer's too."""
        if not self._left:
            self._left = True
            self._background.post(self._leave)

    async def run(self, runtime: Runtime) -> None:
        """In the loop: do the work, and say how it ended."""
        end: End | _Failed = _Failed(RequestError(CLOSED))
        try:
            with anyio.CancelScope() as self._scope:
                if not self._left:
                    await self._work(runtime, self._give)
                end = END
        except BaseException as error:  # carried to the thread that waits, whatever it is
            if not isinstance(error, Exception):
                raise
            end = _Failed(error)
        finally:
            self._parts.put(END if self._left else end)

    def refuse(self) -> None:
        """In the loop: it comes too late."""
        self._parts.put(_Failed(RequestError(CLOSED)))

    async def _give(self, part: Part) -> None:
        self._parts.put(part)
        if self._parts.qsize() >= OUTBOX:  # the reader is slow: its request is to pause, as it would for a slow task
            self._caught_up = anyio.Event()
            if self._parts.qsize() >= OUTBOX:  # it may have caught up before it could see that it is waited for
                await self._caught_up.wait()
            self._caught_up = None

    def _leave(self) -> None:
        if self._scope is not None:
            self._scope.cancel()


class Background:
    """A thread with an event loop, in which one runtime is open and errands run. It keeps nobody alive who asks."""

    def __init__(self, config: RuntimeConfig, disk: Disk | None) -> None:
        self._process = os.getpid()
        self._opened: Future[Runtime] = Future()
        self._lock = threading.Lock()
        self._ended = False
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: Context
        self._life: anyio.CancelScope
        self._errands: anyio.abc.TaskGroup
        self._thread = threading.Thread(target=self._work, args=(config, disk), name="aollm-client", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    @property
    def runtime(self) -> Runtime:
        """The runtime, once `wait` has returned."""
        return self._opened.result()

    def wait(self) -> None:
        """Return when the runtime is open; raises what opening raised."""
        self._opened.result()

    def begin(self, errand: Errand[Any]) -> None:
        """Have `errand` run; it is told the end in any case. Raises `RequestError` when there is no loop for it."""
        if self._process != os.getpid():
            raise RequestError("this client was opened before the process was forked; make a RuntimeClient in each process")
        if threading.current_thread() is self._thread:
            raise RequestError("this is the client's own thread, and would wait for itself: use its runtime there")
        with self._lock:
            if self._ended:
                raise RequestError(f"the client's runtime has ended{f' ({self._error})' if self._error else ''}; make another one")
            self.post(lambda: self._start(errand))

    def post(self, call: Callable[[], object]) -> None:
        """Have the loop run `call()`, if it still runs. Returns at once."""
        if self._loop is not None and self._process == os.getpid():
            try:
                self._loop.call_soon_threadsafe(call, context=self._context)
            except RuntimeError:  # the loop is closed: nothing of it is left to be changed
                pass

    def end(self) -> None:
        """Have the runtime close and the thread end. Returns at once, because a finalizer may run in any thread, this one too."""
        self._ended = True
        self.post(lambda: self._life.cancel())

    def close(self) -> None:
        """`end`, and wait for it; raises what went wrong in closing."""
        if self._process != os.getpid():
            return
        self.end()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            error, self._error = self._error, None
            if error is not None:
                raise error

    def _work(self, config: RuntimeConfig, disk: Disk | None) -> None:
        try:
            anyio.run(self._serve, config, disk)
        except BaseException as error:  # carried to whoever waits, whatever it is
            self._fail(error)
        finally:
            if not self._opened.done():
                self._opened.set_exception(RequestError(CLOSED))
            atexit.unregister(self.close)

    def _fail(self, error: BaseException) -> None:
        if self._opened.done():
            self._error = error
        else:
            self._opened.set_exception(error)

    async def _serve(self, config: RuntimeConfig, disk: Disk | None) -> None:
        with anyio.CancelScope() as self._life:
            self._context = copy_context()  # says that this is anyio's loop, which the asker's own does not
            self._loop = asyncio.get_running_loop()  # from here on `end` finds it; before, it is seen on the next line
            if self._ended:
                return
            async with Runtime.open(config, disk=disk) as runtime, anyio.create_task_group() as self._errands:
                self._opened.set_result(runtime)
                try:
                    await anyio.sleep_forever()
                finally:
                    with self._lock:  # whoever holds it posts before the loop is left
                        self._ended = True

    def _start(self, errand: Errand[Any]) -> None:
        if self._ended:
            errand.refuse()
        else:
            self._errands.start_soon(errand.run, self.runtime)

    def __repr__(self) -> str:
        return repr(self.runtime) if self._opened.done() and not self._opened.exception() else "not open yet"


def check_thread() -> None:
    """Raises `RequestError` in a thread whose event loop would stand still while the thread waits."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        trio = sys.modules.get("trio")
        if trio is None or not trio.lowlevel.in_trio_run():
            return
    if "ipykernel" not in sys.modules:  # a notebook's loop waits for its cell, whatever the cell does
        raise RequestError(STANDS_STILL)
