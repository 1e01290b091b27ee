"""One round of a measurement: requests that start together on an open runtime, and what they took.

It refuses to know what the figures are held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from random import Random
from statistics import median
from time import perf_counter

import anyio

from ..errors import RequestError, first_of
from ..runtime import Runtime
from ..stream import TokenStream
from .passes import Pass, passes_of
from .process import io_cpu_s, read_nbytes

BEAT_S = 0.005
QUIET_S = 0.1


@dataclass(frozen=True, slots=True)
class Round:
    """What `requests` requests did together. The first pass is a prefill, and so is every one with more rows than requests."""

    requests: int
    tokens: int
    seconds: float
    first_token_s: list[float]
    prefill: list[Pass]
    decode: list[Pass]
    lateness_s: list[float]
    io_cpu_share: float | None

    @property
    def seconds_per_pass(self) -> float:
        """Median over the passes that only decode."""
        return median(each.seconds for each in self.decode)

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together, in the passes that only decode."""
        return sum(each.rows for each in self.decode) / sum(each.seconds for each in self.decode)


def random_prompts(runtime: Runtime, vocabulary: int, count: int, tokens: int, seed: str) -> list[list[int]]:
    """`count` prompts of `tokens` random ids, none of which ends an answer; the same for the same seed."""
    random = Random(seed)
    ids = [number for number in range(vocabulary) if number not in runtime.text.stop_ids]
    return [random.choices(ids, k=tokens) for _ in range(count)]


async def run_round(runtime: Runtime, prompts: Sequence[Sequence[int]], tokens: int) -> Round:
    """Start all prompts in one pass, decode up to `tokens` tokens of each, and wait until reading ahead has come to rest.

    Raises `RequestError` when no pass only decoded, because every answer ended with its first token.
    """
    first_token_s: list[float] = []
    made = 0

    async def read(stream: TokenStream) -> None:
        nonlocal made
        async for token in stream:
            made += 1
            if token.index == 0:
                first_token_s.append(perf_counter() - start)

    lateness_s: list[float] = []
    cpu_s, start = io_cpu_s(), perf_counter()
    try:
        async with anyio.create_task_group() as group, AsyncExitStack() as stack:
            group.start_soon(watch, lateness_s)
            streams = [await stack.enter_async_context(runtime.stream(prompt, max_new_tokens=tokens)) for prompt in prompts]
            async with anyio.create_task_group() as readers:
                for stream in streams:
                    readers.start_soon(read, stream)
            group.cancel_scope.cancel()
    except ExceptionGroup as raised:
        raise first_of(raised) from raised
    end, cpu_end_s = perf_counter(), io_cpu_s()
    passes = [each for each in passes_of(runtime.trace.between(0, end), end) if each.start >= start]
    decode = [each for each in passes[1:] if each.rows <= len(prompts)]
    if not decode:
        raise RequestError("every answer ended with its first token, so no pass only decoded; take another --seed")
    share = None
    if cpu_s is not None and cpu_end_s is not None and runtime.plan.disk_backend == "threads":  # other disks read elsewhere
        share = (cpu_end_s - cpu_s) / (end - start)
    await settle()
    prefill = [each for each in passes if each not in decode]
    return Round(len(prompts), made, end - start, first_token_s, prefill, decode, lateness_s, share)


async def settle(limit_s: float = 30.0) -> bool:
    """Wait until this process reads nothing any more; False when it still did after `limit_s`."""
    with anyio.move_on_after(limit_s):
        before = read_nbytes()
        while True:
            await anyio.sleep(QUIET_S)
            now = read_nbytes()
            if now is None or before is None or now - before < 1 << 16:  # looking at the counters is itself a small read
                return True
            before = now
    return False


async def watch(lateness_s: list[float]) -> None:
    """How late the event loop is: a beat every 5 ms, and by how much each came after its time."""
    while True:
        due = perf_counter() + BEAT_S
        await anyio.sleep(BEAT_S)
        lateness_s.append(max(perf_counter() - due, 0.0))
