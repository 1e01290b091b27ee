"""What a strategy makes of a cache: where its cells lie on disk, if they do, and how much memory there is beside.

It refuses to know how a cache comes to live in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..maths.attention import BLOCK
from .records import Records
from .residency import Residency, SpillPolicy


@dataclass(frozen=True, slots=True)
class Home:
    """`tokens` of memory, and `records` for what it has no room for; stored blocks are read into a ring of `ring_nbytes`, at most
    `run_nbytes` at a time. A pass adds `most_rows` rows at most."""

    records: Records | None
    residency: Residency
    policy: SpillPolicy
    tokens: int
    most_rows: int
    ring_nbytes: int = 0
    run_nbytes: int = 0

    def reservation(self, tokens: int, sequences: int = 1) -> int:
        """Tokens of memory to set aside for sequences of at most `tokens` tokens together: where there is a disk, their last blocks."""
        return tokens if self.records is None else min(tokens, sequences * BLOCK)

    async def aclose(self) -> None:
        """Let go of its files; nothing lives in it."""
        if self.records is not None:
            await self.records.aclose()
