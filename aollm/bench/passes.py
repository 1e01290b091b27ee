"""Passes over the weights, told from a trace alone: when each began and ended, what it read, computed and waited for.

A pass begins with the stall for its embedding rows. The bytes of a pass are those of the reads that its computations
used: each computation on a piece takes the oldest read of that piece that none has taken yet.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from ..trace import READS, Event


@dataclass(slots=True)
class Pass:
    """One pass: `start` and `end` in `time.perf_counter()` seconds, `rows` of input that it took to the end."""

    start: float
    end: float
    rows: int = 0
    nbytes: int = 0
    compute_s: float = 0.0
    stall_s: float = 0.0
    marks: list[float] = field(default_factory=list)
    """When its computations began and ended, in order."""

    @property
    def seconds(self) -> float:
        """From its start to the start of the next one."""
        return self.end - self.start

    @property
    def parts(self) -> list[float]:
        """Its seconds, cut where a computation began or ended: each of them short enough to be left alone by other processes."""
        marks = [self.start, *sorted(self.marks), self.end]
        return [later - earlier for earlier, later in pairwise(marks)]


def passes_of(events: Iterable[Event], end: float | None = None) -> list[Pass]:
    """All passes in order; each lasts until the next one begins, the last one until `end`, or until its last computation ended."""
    by_end = sorted(events, key=lambda event: event.end)
    starts = sorted(event.start for event in by_end if event.name == "stall" and event.label == "embedding")
    if end is None:
        end = max((event.end for event in by_end if event.name in ("compute", "stall")), default=0.0)
    passes = [Pass(start, until) for start, until in zip(starts, [*starts[1:], end], strict=False)]
    unused: dict[str, deque[int]] = {}
    for event in by_end:
        if event.name in READS:
            unused.setdefault(event.label, deque()).append(event.nbytes)
        elif event.name in ("compute", "stall") and (number := bisect_right(starts, event.start)):
            current = passes[number - 1]
            if event.name == "stall":
                current.stall_s += event.end - event.start
                continue
            current.compute_s += event.end - event.start
            current.marks += (event.start, event.end)
            current.rows = event.rows
            if reads := unused.get(event.label):
                current.nbytes += reads.popleft()
    return passes
