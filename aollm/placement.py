"""Placement: which pieces are kept in memory and which stream. Pure arithmetic on sizes."""

from __future__ import annotations

from collections.abc import Sequence


def spread(sizes: Sequence[int], room: int) -> frozenset[int]:
    """Choose pieces to pin in `room` bytes: as many as fit, spread evenly over the pass, so that the drive never waits."""
    total = sum(sizes)
    if total <= room:
        return frozenset(range(len(sizes)))
    pinned: set[int] = set()
    share, credit, left = room / total, 0.0, room
    for index, nbytes in enumerate(sizes):
        credit += share * nbytes
        if credit >= nbytes / 2 and nbytes <= left:
            pinned.add(index)
            credit -= nbytes
            left -= nbytes
    for index in sorted(set(range(len(sizes))) - pinned, key=lambda index: (-sizes[index], index)):
        if sizes[index] <= left:  # what rounding left over
            pinned.add(index)
            left -= sizes[index]
    return frozenset(pinned)


def ring_nbytes(sizes: Sequence[int], depth: int) -> int:
    """Bytes of the stream ring: what `depth` + 1 pieces of the round take that follow each other, and at least two of the
    largest, so that one is read while another is computed with. The round has no end, so it wraps around."""
    if not sizes:
        return 0
    count = min(depth + 1, len(sizes) + 1)
    round_ = list(sizes) * 3
    return max(2 * max(sizes), *(sum(round_[at : at + count]) for at in range(len(sizes))))


def band(layers: int, kept: int, policy: str) -> range:
    """The layers that an explicit placement keeps: the first, the last, or `kept` in the middle (`auto` is `middle-band`)."""
    kept = min(kept, layers)
    first = {"prefix": 0, "suffix": layers - kept}.get(policy, (layers - kept) // 2)
    return range(first, first + kept)
