"""One lane of the benchmark, run in this process: requests of one kind on one model, as many as are asked for or time allows.

What is measured is kept from request to request, so that an interrupted probe has something to say. It refuses to know
what its figures are compared with.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import anyio
import anyio.to_thread

from ..compute import Compute, processors
from ..disk.auto import open_disk
from ..outlook import choose
from ..port import Port
from ..reference import find
from ..runtime import Runtime
from ..session import Session
from ..settings import RuntimeConfig
from ..stores.presets import PRESETS
from ..survey import AUTO
from . import pagecache
from .figures import Measured, measured
from .measure import random_prompts
from .process import started_s
from .scratch import Scratch
from .spread import Parts, spread, steady
from .yardstick import Yardstick

SHARP = {"temperature": 0.0}
EVEN = {"temperature": 100.0}
"""Draws nearly evenly, so that hardly an answer ends before its length."""
ROUNDS, PATIENCE = 64, 6
SUMMED_UP = ("ttft_seconds", "pass_seconds", "prompt_tokens_per_second", "output_tokens_per_second", "open_seconds")
TOPICS = ("fox", "duck", "cat", "whale", "wren", "goat", "hare", "mole")
PLANNED = (
    "family", "dtype", "device", "backend", "specialization_state", "specialization_reason", "kv_cache_strategy", "disk_backend",
    "weights_nbytes", "pinned_nbytes", "streamed_nbytes_per_pass", "max_rows", "chunk_rows", "memory",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What a lane does: each kind of request `iterations` times, and more, up to `ROUNDS` times, until `seconds` are over."""

    mode: str
    config: RuntimeConfig
    prompt: str = "Once upon a time"
    max_new_tokens: int = 32
    iterations: int = 3
    prompt_scale_tokens: tuple[int, ...] = (32, 128, 512)
    output_scale_tokens: tuple[int, ...] = (16, 64, 128)
    session_turns: int = 4
    session_max_new_tokens: int = 16
    seconds: float = 0.0


@dataclass(slots=True)
class Point:
    """Requests of one kind: what sets it apart from the lane's other kinds, and what they took."""

    about: dict[str, Any]
    requests: list[Measured] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All requests' figures, and the cache, chunking and profile of the last one."""
        medians = {name: median(known) for name in SUMMED_UP if (known := self._known(name))}
        return {**self.about, "median": medians, "requests": [each.figures for each in self.requests], **self.requests[-1].state}

    def _known(self, name: str) -> list[float]:
        return [each.figures[name] for each in self.requests if each.figures.get(name) is not None]


class Probe:
    """Call `run`, then `result`, which may also be called when `run` was interrupted."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._points: dict[str, Point] = {}
        self._times: dict[str, list[Sequence[Parts]]] = {}
        self._facts: dict[str, Any] = {}
        self._yardstick: Yardstick
        self._deadline = 0.0

    async def run(self) -> None:
        """Measure. Raises what `Runtime.open` and `Runtime.stream` do, and `StoreError` where no cache can be made."""
        self._facts["startup_seconds"] = started_s()
        config = self._work.config
        folder = await find(config.model_reference, config.models_dir)
        with await anyio.to_thread.run_sync(Scratch, config.cache_dir) as scratch:
            async with Port() as port:
                compute = Compute(port, processors())
                try:
                    self._yardstick = Yardstick.of(compute, folder, config.offload_cpu_layers is not None)
                    try:
                        await self._yardstick.take()
                        await MODES[self._work.mode](self, config.model_copy(update={"cache_dir": scratch}), folder)
                    finally:
                        self._facts["yardstick"] = self._yardstick.summary()
                finally:
                    compute.close()

    def result(self) -> dict[str, Any]:
        """What is measured so far: points with their requests, values to compare, and the machine's own speed meanwhile."""
        return {
            "bench": "probe", "mode": self._work.mode, "model": Path(self._work.config.model_reference).name, **self._facts,
            "points": {name: point.as_dict() for name, point in self._points.items() if point.requests},
            "values": {name: {**spread([*chain(*rounds)]), "steady": steady(rounds)} for name, rounds in self._times.items()},
        }  # fmt: skip

    async def cold(self, config: RuntimeConfig, folder: Path) -> None:
        """One request of a process that has not opened the model before, whose files are not in the page cache."""
        self._facts["page_cache"] = await anyio.to_thread.run_sync(pagecache.drop, folder)
        async with self._opened(config, warm=False) as runtime:
            one = await self._measure("cold", {}, runtime, self._work.prompt, self._work.max_new_tokens, SHARP)
            self._note("cold", *([self._facts["open_seconds"], *first] for first in one.first_s))
            self._note("cold-cpu", [self._facts["open_cpu_seconds"] + one.figures["first_cpu_seconds"]])
            await self._yardstick.take(16)

    async def warm(self, config: RuntimeConfig, folder: Path) -> None:
        """The same request again and again."""
        async with self._opened(config) as runtime:
            for _ in self._rounds():
                await self._yardstick.take()
                one = await self._measure("warm", {}, runtime, self._work.prompt, self._work.max_new_tokens, SHARP)
                self._note("decode", *one.decode_s)
                self._note("first-token", *one.first_s)

    async def prompt_scaling(self, config: RuntimeConfig, folder: Path) -> None:
        """Prompts of random tokens, each longer than the one before; other ones in each round, so that none is found in a cache."""
        async with self._opened(config) as runtime:
            for number, count in self._pairs(runtime, self._work.prompt_scale_tokens, 2):
                await self._yardstick.take()
                one = await self._measure(f"{count}", {"tokens": count}, runtime, _prompt(runtime, count, number), 2, SHARP)
                self._note(f"prefill-{count}", *one.first_s)

    async def output_scaling(self, config: RuntimeConfig, folder: Path) -> None:
        """Answers of several lengths, whose tokens are drawn nearly evenly, so that they do not end before."""
        async with self._opened(config) as runtime:
            for number, count in self._pairs(runtime, self._work.output_scale_tokens, 64):
                await self._yardstick.take()
                drawn = {**EVEN, "seed": number}
                one = await self._measure(f"{count}", {"tokens": count}, runtime, self._work.prompt, count, drawn)
                self._note("decode", *one.decode_s)

    async def session_growth(self, config: RuntimeConfig, folder: Path) -> None:
        """Conversations, each turn of which goes on from the keys and values of the turns before."""
        async with self._opened(config) as runtime:
            for _ in self._rounds():
                async with runtime.session() as session:
                    for turn in range(self._work.session_turns):
                        await self._yardstick.take()
                        await self._turn(runtime, session, turn)

    async def reopen_session_growth(self, config: RuntimeConfig, folder: Path) -> None:
        """Conversations whose runtime is closed after each turn; the next one finds keys and values on disk."""
        changed: dict[str, Any] = {"kv_cache_lifecycle": "persistent"}
        if config.kv_cache_strategy == AUTO or PRESETS[config.kv_cache_strategy].layout is None:
            changed["kv_cache_strategy"] = "paged"  # what has no layout keeps nothing between runtimes
        for number in self._rounds():
            said: Sequence[Any] = ()
            scratch = config.cache_dir / f"{number}"
            for turn in range(self._work.session_turns):
                kept = RuntimeConfig.of(config, {**changed, "cache_dir": scratch})
                async with self._opened(kept, warm=False) as runtime, runtime.session(said) as session:
                    opened_s = self._facts["open_seconds"]
                    await self._yardstick.take()
                    one = await self._turn(runtime, session, turn)
                    one.figures["open_seconds"] = opened_s
                    said = session.messages

    async def plan(self, config: RuntimeConfig, folder: Path) -> None:
        """The plan alone, again and again; the first one counts what it imports. No weight is read."""
        async with Port() as port:
            disk, reason = open_disk(config.disk_backend, port, folder)
            try:
                self._deadline = perf_counter() + self._work.seconds
                for number in range(ROUNDS):
                    start, cpu_s = perf_counter(), process_time()
                    outlook = await choose(config, folder, disk, reason)
                    if not number:
                        self._facts["first_seconds"] = perf_counter() - start
                        continue
                    self._note("plan", [perf_counter() - start])
                    self._note("plan-cpu", [process_time() - cpu_s])
                    await self._yardstick.take(2)
                    if self._enough(number):
                        break
            finally:
                with anyio.CancelScope(shield=True):
                    await disk.aclose()
        self._facts["plan"] = {name: getattr(outlook.plan, name) for name in PLANNED}

    async def _turn(self, runtime: Runtime, session: Session, turn: int) -> Measured:
        """One turn of a conversation; its point holds that turn of all conversations."""
        stream = session.stream(f"Tell me a story about a {TOPICS[turn % len(TOPICS)]}.", max_new_tokens=self._work.session_max_new_tokens)
        one = await measured(runtime, stream)
        self._points.setdefault(f"{turn + 1}", Point({"turn": turn + 1})).requests.append(one)
        self._note("decode", *one.decode_s)
        return one

    async def _measure(
        self, name: str, about: dict[str, Any], runtime: Runtime, prompt: str | list[int], tokens: int, drawn: dict[str, Any]
    ) -> Measured:  # fmt: skip
        one = await measured(runtime, runtime.stream(prompt, max_new_tokens=tokens, **drawn))
        self._points.setdefault(name, Point(about)).requests.append(one)
        return one

    @asynccontextmanager
    async def _opened(self, config: RuntimeConfig, warm: bool = True) -> AsyncIterator[Runtime]:
        """A runtime, whose first pass is behind it unless it is not to be `warm`."""
        start, cpu_s = perf_counter(), process_time()
        async with Runtime.open(config) as runtime:
            self._facts["open_seconds"], self._facts["open_cpu_seconds"] = perf_counter() - start, process_time() - cpu_s
            self._facts["plan"] = {name: getattr(runtime.plan, name) for name in PLANNED}
            self._deadline = self._deadline or perf_counter() + self._work.seconds
            if warm:
                await runtime.generate(self._work.prompt, max_new_tokens=4)
                await self._yardstick.take_drive()
            yield runtime
            await self._yardstick.take_drive()

    def _rounds(self) -> Iterator[int]:
        """The numbers of the rounds: as many as were asked for, and as time allows besides."""
        for number in range(max(ROUNDS, self._work.iterations)):
            if self._enough(number):
                return
            yield number

    def _enough(self, rounds: int) -> bool:
        """Whether no further round, or part of one, is needed after so many. Where the values are not steady yet, because other
        processes leave nothing alone, there is more time, `PATIENCE` times as much."""
        over_s = perf_counter() - self._deadline
        if rounds < self._work.iterations or over_s < 0:
            return False
        return over_s > (PATIENCE - 1) * self._work.seconds or all(steady(each) is not False for each in self._times.values())

    def _pairs(self, runtime: Runtime, counts: Sequence[int], besides: int) -> Iterator[tuple[int, int]]:
        """The number of each round with each of `counts`, as far as time allows; counts of tokens that do not fit the context with
        `besides` others are left out, and said to be."""
        most = runtime.plan.max_context_tokens
        self._facts["left_out"] = {str(count): f"the context has {most} tokens" for count in counts if count + besides > most}
        for number in self._rounds():
            for count in counts:
                if count + besides <= most and not self._enough(number):
                    yield number, count

    def _note(self, name: str, *seconds: Parts) -> None:
        if seconds:
            self._times.setdefault(name, []).append(seconds)

    def __repr__(self) -> str:
        return f"<Probe {self._work.mode}, {sum(len(point.requests) for point in self._points.values())} requests>"


MODES: dict[str, Callable[[Probe, RuntimeConfig, Path], Awaitable[None]]] = {
    "cold": Probe.cold,
    "warm": Probe.warm,
    "prompt-scaling": Probe.prompt_scaling,
    "output-scaling": Probe.output_scaling,
    "session-growth": Probe.session_growth,
    "reopen-session-growth": Probe.reopen_session_growth,
    "plan": Probe.plan,
}


def _prompt(runtime: Runtime, tokens: int, number: int) -> list[int]:
    return random_prompts(runtime, runtime.plan.vocabulary, 1, tokens, f"{tokens}-{number}")[0]
