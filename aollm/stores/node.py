"""A node: one stored block of a sequence, and the block that it follows.

A block's digest covers all tokens up to its end, so stored sequences form trees whose shared prefixes are stored once.
It refuses to know how nodes are found, written down or removed.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from .record import Place

DIGEST_NBYTES = 16
ID_NBYTES = 4


@dataclass(slots=True, eq=False)
class Node:
    """Tokens `ids` (big-endian uint32) after those of `parent`, as block `index` of a sequence, and where its records lie.

    `places` has one for each layer, `states` the snapshots of recurrent state at its end. `used` is the sequence number
    of the last use, `stored_at` seconds of the wall clock.
    """

    digest: bytes
    parent: bytes
    index: int
    ids: bytes
    places: tuple[Place, ...]
    states: tuple[Place, ...] = ()
    used: int = 0
    stored_at: float = 0.0
    pinned: bool = False

    @property
    def rows(self) -> int:
        """Its tokens."""
        return len(self.ids) // ID_NBYTES

    @property
    def nbytes(self) -> int:
        """Bytes of its records on disk."""
        return sum(place.extent.nbytes for place in (*self.places, *self.states))

    def __repr__(self) -> str:
        return f"<Node {self.digest.hex()[:8]} block {self.index}, {self.rows} tokens{', pinned' if self.pinned else ''}>"


def root(identity: bytes, salt: str) -> bytes:
    """What the first block of a sequence has as its parent: sequences of another identity or salt never meet."""
    return hashlib.sha256(b"root\0" + identity + salt.encode()).digest()[:DIGEST_NBYTES]


def digest(parent: bytes, ids: bytes) -> bytes:
    """The name of block `ids` after `parent`."""
    return hashlib.sha256(parent + ids).digest()[:DIGEST_NBYTES]


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as big-endian uint32, whose bytes sort as the ids do; `OverflowError` for what is not one."""
    packed = array("I", ids)
    if sys.byteorder == "little":
        packed.byteswap()
    return packed.tobytes()


def common(first: bytes, second: bytes) -> int:
    """Tokens that two texts of packed ids begin with alike."""
    low, high = 0, min(len(first), len(second)) // ID_NBYTES
    while low < high:
        middle = (low + high + 1) // 2
        if first[low * ID_NBYTES : middle * ID_NBYTES] == second[low * ID_NBYTES : middle * ID_NBYTES]:
            low = middle
        else:
            high = middle - 1
    return low
