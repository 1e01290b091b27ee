"""What happened when: one list of intervals, and the figures that follow from it.

Rooms append events; nothing here knows what they do. Speeds, stalls and the bound are functions of events, never
counters kept beside them. Times are `time.perf_counter()` seconds, sizes are bytes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

EventName = Literal[
    "layer_load", "experts_load", "kvload", "kvsave", "kvcompact", "gds_read", "safetensor_read", "safetensor_pread",
    "offloaded_cpu_to_cuda", "compute", "stall",
]  # fmt: skip
StoragePath = Literal["gds", "safetensor-io", "cpu-offloaded-artifacts", "disk-kv-cache", "torch-artifact-io"]

KEPT_EVENTS = 32_768
"""Events kept; older ones are forgotten, so that a service can run for months."""
OUT_OF_ORDER_S = 1.0
"""How much later than another event that ended after it one may be added: reads are noted when their task goes on."""


@dataclass(frozen=True, slots=True)
class Event:
    """One interval: `start` and `end` in seconds, `layer` -1 where there is none, `rows` of input that it served."""

    name: EventName
    start: float
    end: float
    layer: int = -1
    request: int = -1
    nbytes: int = 0
    path: StoragePath | None = None
    rows: int = 0
    label: str = ""


class Trace:
    """The newest events of one runtime, in the order in which they ended."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)

    def add(self, event: Event) -> None:
        """Remember one interval; safe from any thread."""
        self._events.append(event)

    def between(self, start: float, end: float) -> list[Event]:
        """The events that touch the interval, in the order in which they came."""
        found: list[Event] = []
        for event in reversed(list(self._events)):
            if event.end < start - OUT_OF_ORDER_S:
                break
            if event.end >= start and event.start <= end:
                found.append(event)
        return found[::-1]

    def save(self, path: str | Path) -> None:
        """Write all events as Chrome-trace JSON (load it in Perfetto or chrome://tracing)."""
        events = list(self._events)
        Path(path).write_text(json.dumps({"traceEvents": list(chrome_events(events)), "displayTimeUnit": "ms"}))

    def __repr__(self) -> str:
        return f"<Trace {len(self._events)} events>"


READS: frozenset[str] = frozenset({"safetensor_pread", "safetensor_read", "gds_read", "kvload"})
"""Events that moved bytes from a drive. `layer_load` contains one of them and does not count again."""


def chrome_events(events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """Events as Chrome-trace "complete" events: microseconds, one lane a kind; overlapping reads take further lanes."""
    lanes: dict[str, list[float]] = {}
    for event in sorted(events, key=lambda event: event.start):
        ends = lanes.setdefault(event.name, [])
        row = next((i for i, end in enumerate(ends) if end <= event.start), len(ends))
        ends[row : row + 1] = [event.end]
        yield {
            "name": event.label or event.name, "cat": event.name, "ph": "X", "pid": 1, "tid": f"{event.name} {row}",
            "ts": event.start * 1e6, "dur": (event.end - event.start) * 1e6,
            "args": {"layer": event.layer, "request": event.request, "bytes": event.nbytes, "path": event.path, "rows": event.rows},
        }  # fmt: skip


def summary(events: Iterable[Event]) -> dict[str, dict[str, float]]:
    """Count, bytes and the spread of durations (milliseconds) of each kind of event."""
    kinds: dict[str, list[Event]] = {}
    for event in events:
        kinds.setdefault(event.name, []).append(event)
    return {name: _spread(kind) for name, kind in kinds.items()}


def profile(events: list[Event], wall_s: float, drive_bytes_per_second: float | None) -> dict[str, Any]:
    """The `native_runtime_profile`: what was read, how long compute waited, and how near the run came to its bound.

    The bound is max(bytes read / the drive's speed, compute time); `fraction_of_bound` is bound / wall time. The drive's
    speed is the probed one, or what it reached while reads were in flight where that was more.
    `limiter` is `disk` when the drive's part is the larger, `memory` when compute is but its rows are so few that it
    only reads weights from memory (up to 32 rows cost what one costs), else `compute`.
    """
    reads = [event for event in events if event.name in READS]
    nbytes = sum(event.nbytes for event in reads)
    if drive_bytes_per_second and (busy := covered(reads)):
        drive_bytes_per_second = max(drive_bytes_per_second, nbytes / busy)
    compute = [event for event in events if event.name == "compute"]
    compute_s = sum(event.end - event.start for event in compute)
    disk_s = nbytes / drive_bytes_per_second if drive_bytes_per_second else 0.0
    rows = fmean(event.rows for event in compute) if compute else 0.0
    bound = max(disk_s, compute_s)
    return {
        "storage_paths": sorted({event.path for event in events if event.path}),
        "events": summary(events),
        "bytes_read": nbytes,
        "bytes_written": sum(event.nbytes for event in events if event.name in ("kvsave", "kvcompact")),
        "drive_bytes_per_second": drive_bytes_per_second,
        "fraction_of_bound": bound / wall_s if wall_s > 0 else None,
        "limiter": "disk" if disk_s >= compute_s else "memory" if rows <= 32 else "compute",
    }


def covered(events: Iterable[Event]) -> float:
    """Seconds during which at least one of the events was under way."""
    seconds, reached = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.start):
        seconds += max(event.end - max(event.start, reached), 0.0)
        reached = max(reached, event.end)
    return seconds


def _spread(kind: list[Event]) -> dict[str, float]:
    times = sorted((event.end - event.start) * 1e3 for event in kind)
    return {
        "count": len(times), "total_ms": sum(times), "min_ms": times[0], "median_ms": median(times),
        "p95_ms": times[min(len(times) - 1, int(len(times) * 0.95))], "max_ms": times[-1], "mean_ms": fmean(times),
        "bytes": sum(event.nbytes for event in kind),
    }  # fmt: skip
