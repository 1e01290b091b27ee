"""Lanes: when the drive read, when the processor computed and when it waited, as rows of blocks over the same time.

Pure functions of events; each column shows how much of its time a lane was busy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .terminal import Row
from .trace import READS, Event

BLOCKS = " ▁▂▃▄▅▆▇█"
LANES = (("reads", "cyan", READS), ("compute", "green", frozenset({"compute"})), ("stalls", "yellow", frozenset({"stall"})))
"""Name, style and events of each lane."""


def last_passes(events: Iterable[Event], first_piece: str, count: int) -> tuple[float, ...]:
    """When the last `count` whole passes began, and when the next one did; fewer if there were fewer, empty if none."""
    starts = sorted(event.start for event in events if event.name == "compute" and event.label == first_piece)
    return tuple(starts[-count - 1 :]) if len(starts) > 1 else ()


def picture(events: Sequence[Event], bounds: Sequence[float], width: int) -> list[Row]:
    """A ruler over the passes that begin at `bounds` (seconds), then the lanes, `width` columns of blocks each."""
    start, end = bounds[0], bounds[-1]
    rows: list[Row] = [[(" " * 10, ""), (_ruler(bounds, width), "dim")]]
    for name, style, kinds in LANES:
        spans = merged([(event.start, event.end) for event in events if event.name in kinds], start, end)
        busy = sum(high - low for low, high in spans) / (end - start)
        rows.append([(f"  {name:<8}", ""), (blocks(spans, start, end, width), style), (f" {busy:4.0%}", "dim")])
    return rows


def merged(spans: Sequence[tuple[float, float]], start: float, end: float) -> list[tuple[float, float]]:
    """The union of `spans` within `start` to `end`, in order."""
    union: list[tuple[float, float]] = []
    for low, high in sorted((max(low, start), min(high, end)) for low, high in spans):
        if low >= high:
            continue
        if union and low <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], high)
        else:
            union.append((low, high))
    return union


def blocks(spans: Sequence[tuple[float, float]], start: float, end: float, width: int) -> str:
    """`width` columns, each as high as the part of its time that `spans` (merged) cover."""
    step = (end - start) / width
    covered = [0.0] * width
    for low, high in spans:
        first, last = int((low - start) / step), min(int((high - start) / step), width - 1)
        for column in range(first, last + 1):
            left = start + column * step
            covered[column] += max(0.0, min(high, left + step) - max(low, left)) / step
    return "".join(BLOCKS[min(8, max(round(share * 8), share > 0.02))] for share in covered)


def _ruler(bounds: Sequence[float], width: int) -> str:
    """Where each pass begins, and how long it took."""
    start, end = bounds[0], bounds[-1]
    at = [round((bound - start) / (end - start) * width) for bound in bounds]
    ruler = ""
    for low, high, begun, ended in zip(at, at[1:], bounds, bounds[1:]):
        ruler += f"├─ one pass, {(ended - begun) * 1e3:.0f} ms ".ljust(high - low, "─")[: high - low]
    return ruler
