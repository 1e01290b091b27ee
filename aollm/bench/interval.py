"""An interval of a run as three lanes of bars: reads, computations and stalls. Made from events, or from a file of them.

A file is a trace (`trace.save`), of which the last pass is taken, or a result of `overlap`, which holds one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..trace import READS, Event
from .passes import passes_of

Bar = tuple[float, float, int]
"""Start and end in seconds from the interval's start, and bytes."""


@dataclass(frozen=True, slots=True)
class Interval:
    """`seconds` of a run. What is known of model, drive and bound goes into the title of its picture."""

    seconds: float
    reads: tuple[Bar, ...]
    compute: tuple[Bar, ...]
    stalls: tuple[Bar, ...]
    model: str = ""
    drive_bytes_per_second: float | None = None
    fraction_of_bound: float | None = None

    @property
    def bytes_per_second(self) -> float:
        """Read within the interval; of a read that reaches out of it, the part inside."""
        return sum(nbytes for _, _, nbytes in self.reads) / self.seconds

    def lanes(self) -> dict[str, Any]:
        """The bars as JSON has them, to the microsecond."""
        lanes = {"reads": self.reads, "compute": self.compute, "stalls": self.stalls}
        rounded = {
            name: [[round(start, 6), round(end, 6), nbytes] for start, end, nbytes in bars if end - start > 1e-6]
            for name, bars in lanes.items()
        }
        return {"seconds": round(self.seconds, 6), **rounded}


def interval_of(events: Sequence[Event], start: float, end: float) -> Interval:
    """What happened from `start` to `end`, in `time.perf_counter()` seconds."""
    kinds = (READS, {"compute"}, {"stall"})
    reads, compute, stalls = (tuple(_bars((event for event in events if event.name in kind), start, end)) for kind in kinds)
    return Interval(end - start, reads, compute, stalls)


def load(path: Path) -> Interval:
    """The interval that a file holds. Raises `ConfigError` for one that cannot be read or holds none."""
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "traceEvents" in found:
            return _last_pass([_event(entry) for entry in found["traceEvents"]])
        if isinstance(found, dict) and "lanes" in found:
            return _of_result(found)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or not of aollm's making: {type(error).__name__}: {error}") from error
    raise ConfigError(f"{path} is neither a trace (runtime.trace.save) nor a result of `python -m aollm.bench overlap --output`")


def _last_pass(events: Sequence[Event]) -> Interval:
    passes = [each for each in passes_of(events) if each.rows]
    if not passes:
        raise ValueError("it holds no pass over the weights")
    last = passes[-1]
    end = max(event.end for event in events if event.name in ("compute", "stall") and last.start <= event.start <= last.end)
    return interval_of(events, last.start, end)


def _of_result(found: dict[str, Any]) -> Interval:
    lanes = found["lanes"]
    reads, compute, stalls = (tuple(_bar(*bar) for bar in lanes[name]) for name in ("reads", "compute", "stalls"))
    drive, fraction = lanes.get("drive_bytes_per_second"), lanes.get("fraction_of_bound")
    if (seconds := _number(lanes["seconds"])) <= 0:
        raise ValueError("its lanes last no time")
    return Interval(
        seconds, reads, compute, stalls, str(found.get("model", "")),
        None if drive is None else _number(drive), None if fraction is None else _number(fraction),
    )  # fmt: skip


def _event(entry: dict[str, Any]) -> Event:
    """The event that `trace.chrome_events` made this entry of."""
    start, facts = _number(entry["ts"]) / 1e6, entry["args"]
    return Event(
        entry["cat"], start, start + _number(entry["dur"]) / 1e6, facts["layer"], facts["request"], int(facts["bytes"]),
        facts["path"], int(facts["rows"]), str(entry["name"]),
    )  # fmt: skip


def _bars(events: Iterable[Event], start: float, end: float) -> Iterable[Bar]:
    for event in sorted(events, key=lambda event: event.start):
        low, high = max(event.start, start), min(event.end, end)
        if low < high:
            yield low - start, high - start, round(event.nbytes * (high - low) / (event.end - event.start))


def _bar(start: object, end: object, nbytes: object) -> Bar:
    low, high = _number(start), _number(end)
    if not 0 <= low < high:
        raise ValueError(f"a bar from {low} to {high} s cannot be drawn")
    return low, high, int(_number(nbytes))


def _number(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number to draw")
    return float(value)
