"""The rows of one pass: those of all requests side by side, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import StoreError
from .families.base import Angles, Family
from .item import Item
from .request import Answer, Request
from .stores.store import Store


@dataclass(slots=True, eq=False)
class Segment:
    """One answer's `rows` rows of a pass, from row `first` on; they stand at positions from `start` on."""

    answer: Answer
    store: Store
    first: int
    rows: int
    start: int
    missed: int | None = None
    """The position from which on its history has been lost."""
    reason: StoreError | None = None

    def miss(self, position: int, reason: StoreError) -> None:
        """A block of its history cannot be read: it leaves the pass, and goes back to where the history is whole."""
        if self.missed is None or position < self.missed:
            self.missed, self.reason = position, reason

    @property
    def items(self) -> list[Item]:
        """The images and sounds that have rows among its own."""
        return [item for item in self.answer.request.items if item.first < self.start + self.rows and item.end > self.start]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Ranges of positions that see each other in both directions."""
        return [(item.first, item.end) for item in self.items if item.both_ways]

    @property
    def leaves(self) -> bool:
        """Whether it is not to go on."""
        return self.missed is not None or self.answer.request.cancelled

    @property
    def ends_input(self) -> bool:
        """Whether its last row is the last known token, so that the next one is to be sampled."""
        return self.rows == len(self.answer.pending)

    def within(self, first: int, last: int) -> tuple[int, int, int] | None:
        """Its part of rows [first, last): the part's rows, counted from `first`, and the position of the first of them."""
        low, high = max(first, self.first), min(last, self.first + self.rows)
        return (low - first, high - first, self.start + low - self.first) if low < high else None


class Batch:
    """Segments in the order of their rows."""

    def __init__(self, parts: Sequence[tuple[Answer, Store, int]]) -> None:
        """`parts` are answers, their stores, and how many of their pending tokens ride along."""
        self.segments: list[Segment] = []
        self.ids: list[int] = []
        self.inserts: list[tuple[int, Tensor]] = []
        """Rows that take the place of embedded ones, and the first row that they take."""
        for answer, store, rows in parts:
            self.segments.append(Segment(answer, store, len(self.ids), rows, answer.position))
            self.ids.extend(answer.pending[:rows])

    @property
    def requests(self) -> set[Request]:
        """Those that ride."""
        return {segment.answer.request for segment in self.segments}

    @property
    def leaving(self) -> bool:
        """Whether anybody leaves."""
        return any(segment.leaves for segment in self.segments)

    @property
    def all_leaving(self) -> bool:
        """Whether nobody stays."""
        return all(segment.leaves for segment in self.segments)

    def without_leaving(self) -> tuple[Batch, Tensor]:
        """The batch of those who stay, and the rows to keep."""
        stay = [segment for segment in self.segments if not segment.leaves]
        batch = Batch([(segment.answer, segment.store, segment.rows) for segment in stay])
        keep = [torch.arange(segment.first, segment.first + segment.rows) for segment in stay]
        return batch, torch.cat(keep) if keep else torch.empty(0, dtype=torch.int64)

    def angles(self, family: Family) -> Angles:
        """The family's angles for all rows. A prompt's length is what it will be when it is whole, however it is cut."""
        parts = [
            family.angles(torch.arange(segment.start, segment.start + segment.rows), segment.start + len(segment.answer.pending))
            for segment in self.segments
        ]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(kind) for kind in zip(*parts, strict=True))

    def cuts(self, most: int) -> list[slice]:
        """The rows in chunks of at most `most`, cut where no rows are parted that see each other in both directions."""
        spans = [
            (segment.first + low - segment.start, segment.first + high - segment.start)
            for segment in self.segments
            for low, high in segment.spans
        ]
        cuts, first = list[slice](), 0
        while first < len(self):
            last = min(first + most, len(self))
            for low, high in spans:
                if low < last < high:
                    last = low if low > first else high
            cuts.append(slice(first, last))
            first = last
        return cuts

    def within(self, first: int, last: int) -> Iterator[tuple[Segment, int, int, int]]:
        """The segments that have rows in [first, last), as `Segment.within` tells them."""
        for segment in self.segments:
            if (part := segment.within(first, last)) is not None:
                yield segment, *part

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"<Batch {len(self.ids)} rows of {len(self.segments)} answers>"
