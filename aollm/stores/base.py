"""What a store is: one sequence's keys and values, and nothing else.

The sweep appends rows and reads blocks; where bytes are and when they move is the store's affair. It refuses to know
tokens, requests and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor

from ..maths.attention import Block


class Store(Protocol):
    """Keys and values of one sequence, layer by layer. Positions count from 0."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Add rows [T, K, D] after the layer's last; the bytes are copied."""
        ...

    def blocks(self, layer: int) -> Sequence[Block]:
        """The layer's history as blocks that are in memory now, cut at multiples of `maths.attention.BLOCK`."""
        ...

    def truncate(self, tokens: int) -> None:
        """Forget all positions from `tokens` on, in every layer: drafts that were rejected, passes that were not finished."""
        ...

    def fork(self) -> Self:
        """A store with the same history that shares its blocks until one of the two writes to them."""
        ...

    async def flush(self) -> None:
        """Return when everything appended is as durable as this kind of store promises."""
        ...

    async def aclose(self) -> None:
        """Give memory, files and locks back."""
        ...
