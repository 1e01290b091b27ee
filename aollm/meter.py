"""A meter of one answer, or of several at once: what is shown while it is written, and what is said when it has been.

Every figure comes from the runtime's events and from the clock.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import Any

import psutil

from .buffers import size
from .request import Request
from .runtime import Runtime
from .terminal import Row, spinner
from .trace import READS

LIMITERS = {"disk": "disk", "memory": "memory speed", "compute": "compute"}
"""What limits a run, for people."""
WINDOW_S = 3.0
RECENT_TOKENS = 64


class Meter:
    """Counts from when it is made; `add` one token after the other."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.start = perf_counter()
        self.tokens = 0
        self.first_s: float | None = None
        self._passes = runtime.engine.passes
        self._recent: deque[float] = deque(maxlen=RECENT_TOKENS)

    def add(self) -> None:
        """One more token has come."""
        self.tokens += 1
        self._recent.append(perf_counter())
        if self.first_s is None:
            self.first_s = self._recent[0] - self.start

    def live(self, progress: float) -> Row:
        """The state of this moment; `progress` is that of the pass under way, which is shown while the prompt is read."""
        now = perf_counter()
        since = max(self.start, now - WINDOW_S)
        events = self.runtime.trace.between(since, now)
        read = sum(event.nbytes for event in events if event.name in READS and event.end <= now)
        stalled = sum(min(event.end, now) - max(event.start, since) for event in events if event.name == "stall")
        if self.first_s is None:
            doing = f"reading the prompt {progress:4.0%}"
        elif len(self._recent) > 1:
            doing = speed((len(self._recent) - 1) / (self._recent[-1] - self._recent[0]))
        else:
            doing = "writing"
        parts = [doing]
        if self.runtime.plan.streamed_nbytes_per_pass:
            last = self.runtime.plan.pieces[-1]
            passes = sum(event.name == "compute" and event.label == last for event in events)
            parts += [f"reads {rate(read / (now - since))}"] + ([f"{amount(read / passes)} a pass"] if passes > 1 else [])
            parts.append(f"stalled {stalled / (now - since):.0%}")
        return [(f"{spinner()} ", "cyan"), (" · ".join([*parts, memory(self.runtime)]), "dim")]

    def figures(self, request: Request | None = None) -> dict[str, Any]:
        """What is known when the answer to `request` has ended: seconds, tokens per second, bytes, shares of the time, the bound,
        and what was predicted."""
        wall = perf_counter() - self.start
        if request is None or not self.tokens:
            profile = self.runtime.profile(self.start)
        else:
            profile = self.runtime.profile_of(request, self.start, self.first_s, wall, self.tokens)
        events, nbytes = (profile["events"], profile["bytes_read"]) if profile else ({}, 0)
        stall_s = events.get("stall", {}).get("total_ms", 0.0) / 1e3
        return {
            "tokens": self.tokens, "seconds": wall, "tokens_per_second": self.tokens / wall, "first_token_seconds": self.first_s,
            "passes": self.runtime.engine.passes - self._passes, "bytes_read": nbytes,
            "bytes_read_per_second": nbytes / wall, "stall_share": min(1.0, stall_s / wall),
            "limiter": profile and profile["limiter"], "fraction_of_bound": profile and profile["fraction_of_bound"],
            "rss_bytes": psutil.Process().memory_info().rss, "memory_bytes": self.runtime.plan.memory, "profile": profile,
        }  # fmt: skip

    def summary(self, request: Request | None = None) -> Row:
        """`figures` as one line."""
        found = self.figures(request)
        parts = [f"{count(found['tokens'], 'token')} in {found['seconds']:.1f} s, {speed(found['tokens_per_second'])}"]
        if self.first_s is not None:
            parts.append(f"first after {self.first_s:.2f} s")
        if found["bytes_read"]:
            parts.append(f"read {amount(found['bytes_read'])} at {rate(found['bytes_read_per_second'])}")
            parts.append(f"stalled {found['stall_share']:.0%}")
        if self.tokens and found["fraction_of_bound"] is not None:
            parts.append(f"limited by {LIMITERS[found['limiter']]}, at {found['fraction_of_bound']:.0%} of the bound")
        if foretold := (found["profile"] or {}).get("predicted"):
            parts.append(f"foretold {foretold['seconds']:.1f} s")
        return [(" · ".join([*parts, memory(self.runtime)]), "dim")]


def duration(seconds: float) -> str:
    """Seconds for people: `0.25 s`, `42 s`, `10 min`, `1 h 45 min`."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


def opening(runtime: Runtime) -> list[Row]:
    """What is done while a runtime opens: how much of what is to stay in memory has been read."""
    plan = runtime.planned
    rows = f"opening {runtime.config.model_reference}"
    if plan is not None and plan.pinned_nbytes:
        read = sum(event.nbytes for event in runtime.trace.between(0, perf_counter()) if event.name in READS)
        rows += f" · {size(min(read, plan.pinned_nbytes))} of {size(plan.pinned_nbytes)} to keep in memory"
    return [[(f"{spinner()} ", "cyan"), (rows, "dim")]]


def memory(runtime: Runtime) -> str:
    """Memory that the process has, of what it may have."""
    return f"memory {size(psutil.Process().memory_info().rss)} of {size(runtime.plan.memory)}"


def reused(request: Request) -> str:
    """How much of a prompt was found in the KV cache, and why there was not more."""
    found, whole = request.prefix_hit_tokens, len(request.prompt)
    reason = f" ({request.prefix_miss_reason})" if request.prefix_miss_reason else ""
    return f"{found:,} of {count(whole, 'prompt token')} came from the KV cache{reason}"


def amount(nbytes: float) -> str:
    """Bytes as drives count them: `5.8 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def rate(bytes_per_second: float) -> str:
    """`1.24 GB/s`."""
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def speed(tokens_per_second: float) -> str:
    """`23.4 tokens/s`, or seconds a token where one takes longer than that."""
    if 0 < tokens_per_second < 0.5:
        return f"{1 / tokens_per_second:.1f} s a token"
    return f"{tokens_per_second:.1f} tokens/s"


def count(number: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
