"""Which whole blocks are written, and when: decisions about counts, without a block in hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..errors import ConfigError


class Residency(Protocol):
    """`due(dirty, over, together)`: of a layer's `dirty` whole blocks, how many to write now, oldest first, when the layer holds
    `over` blocks more than its share, and writes are best made of `together` blocks."""

    @property
    def mode(self) -> str: ...

    def due(self, dirty: int, over: int, together: int) -> int: ...


@dataclass(frozen=True, slots=True)
class FullyResident:
    """Nothing is ever written."""

    mode: str = "fully-resident"

    def due(self, dirty: int, over: int, together: int) -> int:
        """None."""
        return 0


@dataclass(frozen=True, slots=True)
class BufferedTail:
    """Everything is written soon after it is whole; what fits stays in memory too."""

    mode: str = "buffered-tail"

    def due(self, dirty: int, over: int, together: int) -> int:
        """All, once there are enough for one write, or memory is short."""
        return dirty if dirty >= together or over > 0 else 0


@dataclass(frozen=True, slots=True)
class WriteBack:
    """The newest blocks stay hot and unwritten; only what the hot region has no room for goes to the cold tier."""

    mode: str = "tiered-write-back"

    def due(self, dirty: int, over: int, together: int) -> int:
        """What is over, oldest first."""
        return min(dirty, max(over, 0))


@dataclass(frozen=True, slots=True)
class SpillPolicy:
    """Amounts that follow from the platform and the resources at hand; no format depends on them."""

    policy_id: str
    together: int
    """Whole blocks of a layer that make one write."""
    batch_nbytes: int
    """Bytes that are written in one go, between two looks at what else there is to do."""
    flush_s: float
    """Seconds after which what was written is made durable."""
    tail_tokens: int
    """A last, incomplete block is stored when a sequence ends with at least so many tokens in it."""
    state_nbytes: int
    """Bytes of state snapshots that a sequence keeps in memory."""


def spill_policy(record_nbytes: int, share_nbytes: int, direct: bool, state_nbytes: int = 64 << 20) -> SpillPolicy:
    """A policy for records of a size, a share of memory, and files that can be written past the page cache or not.

    Writes of a megabyte reach a drive's speed; where the share is small, less is gathered.
    """
    if record_nbytes < 1 or share_nbytes < 0:
        raise ConfigError(f"a record of {record_nbytes} bytes in a share of {share_nbytes} is no sound configuration")
    wanted = 1 << 20 if direct else 4 << 20
    together = max(1, min(wanted, share_nbytes // 32) // record_nbytes)
    batch = max(record_nbytes, min(16 << 20, share_nbytes // 8))
    kind = "direct" if direct else "buffered"
    return SpillPolicy(f"{kind}-{together}x-{batch >> 10}KiB", together, batch, 1.0, 32, state_nbytes)
