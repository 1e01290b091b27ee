"""The order in which a chunk of rows folds its history: block by block, those in memory at once, those on disk in runs.

Both sides follow it: who reads ahead, and who folds. During a pass it does not change, but for what the pass appends.
A run that several decoding answers share, as branches of one prompt do, is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .batch import Batch, Segment
from .families.base import Family
from .maths.attention import first_seen
from .stores.cell import Run, runs

Part = tuple[Segment, int, int, int]
"""A segment's rows [low, high) of a chunk, and the position of the first."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A run, and the numbers of the parts that fold it."""

    run: Run
    users: tuple[int, ...]


def itinerary(parts: Sequence[Part], layer: int, window: int | None, most_nbytes: int) -> Iterator[Stop]:
    """The stops of `parts` in `layer`; runs on disk have at most `most_nbytes`."""
    routes = [
        list(runs(segment.store.cells(layer, first_seen(position, window)), most_nbytes)) for segment, _, _, position in parts
    ]  # fmt: skip
    shared: dict[tuple[int, ...], list[int]] = {}
    for number, ((_, low, high, _), route) in enumerate(zip(parts, routes, strict=True)):
        if high - low == 1 and len(parts) > 1:
            for run in route:
                if run.cold:
                    shared.setdefault(_name(run), []).append(number)
    for number, route in enumerate(routes):
        for run in route:
            users = shared.get(_name(run), []) if run.cold else []
            if number not in users:
                yield Stop(run, (number,))
            elif number == users[0]:
                yield Stop(run, tuple(users))


def reads(batch: Batch, family: Family, first_piece: int, chunk_rows: int, most: int | None, most_nbytes: int) -> Iterator[Run]:
    """What a pass reads from its piece `first_piece` on, in the order in which it folds it."""
    for step in family.steps[first_piece:]:
        if step.attends is None:
            continue
        window = family.kv.window(step.attends, most)
        for cut in batch.cuts(chunk_rows):
            parts = list(batch.within(cut.start, cut.stop))
            for stop in itinerary(parts, step.attends, window, most_nbytes):
                if stop.run.cold:
                    yield stop.run


def _name(run: Run) -> tuple[int, ...]:
    return tuple(map(id, run.cells))
