"""What becomes of Ctrl-C, and of the signal that ends a process, while the benchmark runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def heard() -> Iterator[None]:
    """Both raise `KeyboardInterrupt`, so that whoever ends the run gets what is measured, and no lane is left behind."""
    with _as(signal.default_int_handler):
        yield


@contextmanager
def held() -> Iterator[None]:
    """Both are ignored while a result is kept and printed: it takes a moment, and would be lost."""
    with _as(signal.SIG_IGN):
        yield


@contextmanager
def _as(handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    before = {each: signal.signal(each, handler) for each in ENDING}
    try:
        yield
    finally:
        for each, earlier in before.items():
            signal.signal(each, earlier)
