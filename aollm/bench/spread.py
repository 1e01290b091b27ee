"""Many times of the same thing in a few figures.

Other processes only ever add time, so the low end of many times is the thing itself, and wanders by a few percent from run to
run where medians wander by half. Times of parts are better than whole ones: the shorter a part, the likelier it was left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

QUIET, AGREED = 0.05, 1.06

Parts = Sequence[float]
"""The seconds of one thing, in parts that come one after the other."""


def at(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values are (nearest rank)."""
    return sorted(values)[round(share * (len(values) - 1))]


def quiet(times: Sequence[Parts]) -> float:
    """What one takes when nothing disturbs it: the sum over its parts of their 5th percentiles. Those that are not cut as most
    of them are do not count."""
    usual, _ = Counter(len(parts) for parts in times).most_common(1)[0]
    return sum(at(part, QUIET) for part in zip(*(parts for parts in times if len(parts) == usual), strict=True))


def spread(times: Sequence[Parts]) -> dict[str, Any]:
    """Count, quiet value, median, p95 and the largest, in seconds."""
    whole = [sum(parts) for parts in times]
    return {"count": len(whole), "quiet": quiet(times), "p50": median(whole), "p95": at(whole, 0.95), "max": max(whole)}


def steady(rounds: Sequence[Sequence[Parts]]) -> bool | None:
    """Whether the quiet values of every other round and of those between agree, so that they are what they seem; None of one
    round. Where other processes leave hardly a part alone, they do not."""
    if len(rounds) < 2:
        return None
    low, high = sorted(quiet([times for one in half for times in one]) for half in (rounds[::2], rounds[1::2]))
    return high <= AGREED * low
