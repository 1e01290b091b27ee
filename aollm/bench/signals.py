"""What becomes of Ctrl-C, and of the signal that ends a process, while the benchmark runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT
Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


@contextmanager
def heard() -> Iterator[None]:
    """Both raise `KeyboardInterrupt`, so that whoever ends the run gets what is measured, and neither a lane nor a folder is left
    behind. A background job would ignore Ctrl-C."""
    with _as(signal.default_int_handler, _interrupt):
        yield


@contextmanager
def held() -> Iterator[None]:
    """Both are ignored while a result is kept and printed: it takes a moment, and would be lost."""
    with _as(signal.SIG_IGN, signal.SIG_IGN):
        yield


@contextmanager
def abrupt() -> Iterator[None]:
    """Both end the process at once, before anything is measured: libraries swallow `KeyboardInterrupt` while they are imported."""
    with _as(_leave, _leave):
        yield


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)  # an event loop has its own way with it


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


@contextmanager
def _as(interrupt: Handler, end: Handler) -> Iterator[None]:
    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: end}
    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
    try:
        yield
    finally:
        for each, earlier in before.items():
            signal.signal(each, earlier)
