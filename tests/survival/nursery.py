"""Children of one process that has imported everything and has no threads: each starts in milliseconds, and may die.

What a child tells comes back as JSON lines, however it ends. It refuses to know what children do.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
import torch

from .checking import check
from .load import script
from .opening import Kind
from .promises import Promises

LONGEST_S = 40.0
Work = Callable[[Callable[[list[Any]], None]], None]


@dataclass(slots=True)
class Child:
    """A running child: its number, and the pipe it tells through."""

    pid: int
    pipe: int
    heard: bytearray = field(default_factory=bytearray)

    def end(self, kill_after_s: float | None = None, longest_s: float = LONGEST_S) -> tuple[int, list[list[Any]]]:
        """Wait for its end, or kill it so long after it first told something; returns its exit code (negative: the signal)
        and what it told."""
        deadline, killed = monotonic() + longest_s, False
        timed = kill_after_s is None
        while True:
            if self.heard and not timed and kill_after_s is not None:
                deadline, timed = monotonic() + kill_after_s, True
            ready, _, _ = select.select([self.pipe], [], [], max(0.0, deadline - monotonic()))
            if not ready:
                if not killed:
                    os.kill(self.pid, signal.SIGKILL)
                killed, deadline = True, monotonic() + LONGEST_S
                continue
            part = os.read(self.pipe, 1 << 16)
            if not part:
                break
            self.heard += part
        os.close(self.pipe)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        events = [json.loads(line) for line in self.heard.split(b"\n")[:-1]]
        if killed and (kill_after_s is None or not self.heard):
            events.append(["stuck", "", 0])
        return code, events


def warm() -> None:
    """Have all that children use be imported and computed once. Threads that this needs have ended when it returns."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for preset in ("log-structured-journal", "quantized-cold-tier"):
            kind, promises = Kind(preset), Promises(False)
            root = Path(folder) / preset
            anyio.run(script, root, kind, promises.tell)
            if said := anyio.run(check, root, kind, promises):
                raise RuntimeError(f"{preset} fails where nothing is broken: {said}")
    gc.collect()
    gc.freeze()
    if (threads := threading.active_count()) != 1:
        raise RuntimeError(f"{threads - 1} threads are left, which no child would have")


def start(work: Work) -> Child:
    """Fork, and run `work(emit)` in the child, which ends with 0, or with 1 and an event `raised`."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writes)
        return Child(pid, reads)
    code = 1
    try:
        os.close(reads)

        def emit(event: list[Any]) -> None:
            os.write(writes, json.dumps(event).encode() + b"\n")

        try:
            work(emit)
            code = 0
        except BaseException as error:  # whatever it is, the parent is to know
            emit(["raised", repr(error), traceback.format_exc()[-3000:]])
    finally:
        os._exit(code)


def ask(work: Callable[[], Any]) -> Any:
    """What `work()` returns in a child of its own; `RuntimeError` with the child's traceback."""
    code, events = start(lambda emit: emit(["returned", work(), 0])).end()
    if code or not events or events[-1][0] != "returned":
        raise RuntimeError(f"a child ended with {code}: {events[-1:]}")
    return events[-1][1]


def beside(works: list[Callable[[], Any]]) -> list[Any]:
    """What each of `works` returns, in children that run at the same time."""
    children = [start(lambda emit, work=work: emit(["returned", work(), 0])) for work in works]
    ended = [child.end(longest_s=36_000.0) for child in children]
    for code, events in ended:
        if code or not events or events[-1][0] != "returned":
            raise RuntimeError(f"a lane ended with {code}: {events[-1:]}")
    return [events[-1][1] for _, events in ended]
