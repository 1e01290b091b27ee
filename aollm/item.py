"""Items: the images and sounds of one prompt, and where their rows stand among its tokens.

The rows of an item carry ids of their own, above the vocabulary and made from its content, so that stored keys and values
are found again by ids for the same picture, and for no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Item:
    """An image or a sound: `prepared` for its tower, `rows` rows from position `first` on, that see each other if `both_ways`."""

    digest: bytes
    prepared: Tensor
    first: int
    rows: int
    both_ways: bool

    @property
    def end(self) -> int:
        """The position just past its last row."""
        return self.first + self.rows


def marked(ids: Sequence[int], items: Iterable[Item], vocabulary: int) -> list[int]:
    """`ids` with those of items' rows replaced by ids from `vocabulary` on that say which content they stand for."""
    found = list(ids)
    for item in items:
        bits = hashlib.shake_128(item.digest).digest(4 * item.rows)
        room = (1 << 32) - vocabulary
        found[item.first : item.end] = [
            vocabulary + int.from_bytes(bits[4 * row : 4 * row + 4], "big") % room for row in range(item.rows)
        ]  # fmt: skip
    return found


def whole(position: int, items: Iterable[Item]) -> int:
    """The last position up to `position` that does not part an item whose rows see each other."""
    return next((item.first for item in items if item.both_ways and item.first < position < item.end), position)
