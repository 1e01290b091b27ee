"""The one thread that computes: layers, heads and draws.

A call costs one hop (about 50 µs), so callers hand over whole runs of layers, not single operations.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

import anyio
import torch

from .port import Port

Result = TypeVar("Result")

FOREIGN = (RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError, AssertionError, MemoryError)
"""What torch and a family's code may raise on weights or settings that they cannot cope with."""


BUSY = 0.75
"""The load of a processor from which on what is measured of it is noisy and too low."""


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class Compute:
    """Runs functions one after the other in its own thread, inside `torch.inference_mode()`."""

    def __init__(self, port: Port, threads: int) -> None:
        self._port = port
        self._threads = threads
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="aollm-compute", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)` in the compute thread. Cancelling waits for it: what it writes to stays in use until then."""
        done = anyio.Event()
        outcome: list[Any] = [None, None]

        def call() -> None:
            try:
                outcome[0] = function(*args)
            except BaseException as error:  # carried to the caller, whatever it is
                outcome[1] = error
            self._port.post(done.set)

        self._calls.put(call)
        with anyio.CancelScope(shield=True):
            await done.wait()
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result

    def close(self) -> None:
        """End the thread once its last call is done."""
        self._calls.put(None)
        self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while (call := self._calls.get()) is not None:
                call()
                del call  # it holds all that it was called with
