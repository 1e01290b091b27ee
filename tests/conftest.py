"""What every test gets: both event loops, a failure when a test blocks its loop, and, where several processes share the tests, a
core for each. Knows nothing of aollm."""

import functools
import inspect
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Generator
from typing import Any

if sys.platform == "linux" and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})  # before torch counts them: tiny models need no more

import anyio.lowlevel
import pytest
import torch  # noqa: F401  its first import takes seconds, and must not count as a blocked loop

BLOCKED_AFTER_S = 4.0


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pytest_sessionstart() -> None:
    """A shell that starts a job in the background has it ignore Ctrl-C, and so would the programs that are interrupted here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_root") and os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    test = pyfuncitem.obj
    if (example := getattr(test, "hypothesis", None)) is not None:
        if inspect.iscoroutinefunction(example.inner_test) and not hasattr(example.inner_test, "watched"):
            example.inner_test = watched(example.inner_test)
    elif inspect.iscoroutinefunction(test):
        pyfuncitem.obj = watched(test)
    return (yield)


def watched(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """The same test, failing when its loop stands still for longer than `BLOCKED_AFTER_S`."""

    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        loop = anyio.lowlevel.current_token().native_token
        soon = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon  # asyncio's name, trio's name
        done, blocked_in = threading.Event(), list[str]()
        watch = threading.Thread(target=watch_loop, args=(soon, threading.get_ident(), done, blocked_in), daemon=True)
        watch.start()
        try:
            await test(*args, **kwargs)
        finally:
            done.set()
            watch.join()
        if blocked_in:
            pytest.fail(f"the event loop stood still for more than {BLOCKED_AFTER_S} s, in:\n{blocked_in[0]}", pytrace=False)

    run.watched = True  # type: ignore[attr-defined]
    return run


def watch_loop(soon: Callable[[Callable[[], None]], object], thread_id: int, done: threading.Event, blocked_in: list[str]) -> None:
    """Asks the loop to answer, again and again; notes where its thread is when an answer takes too long."""
    while not done.wait(0.1):
        answered, asked = threading.Event(), time.monotonic()
        soon(answered.set)
        while not answered.wait(0.02) and not done.is_set():
            if time.monotonic() - asked > BLOCKED_AFTER_S:
                blocked_in.append("".join(traceback.format_stack(sys._current_frames()[thread_id])[-8:]))
                return
