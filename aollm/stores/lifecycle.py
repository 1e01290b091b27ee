"""How long what is stored lives: what happens to cells that were written, and to stores that end.

`RuntimeScoped`: nothing outlives the runtime. The other way is in `persistent.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .cell import Cell
from .record import Place
from .records import NOBODY
from .store import Store


@dataclass(frozen=True, slots=True)
class Prefix:
    """What is stored of a prompt: `tokens` of it, as `cells` layer by layer from block `first` on, and why there is not more."""

    tokens: int
    reason: str | None
    first: int = 0
    cells: tuple[tuple[Cell, ...], ...] = ()
    states: tuple[int, tuple[Place, ...]] = (0, ())
    """After how many tokens there are states, and where."""


class Lifecycle(Protocol):
    """What happens to cells that were written, and to stores that end."""

    name: str
    persistent: bool
    tends_every_s: float
    """Seconds after which `tend` has work even if nothing was written."""

    @property
    def kept(self) -> tuple[int, int]:
        """Records of keys and values that are stored for good, and the tokens that these are of."""
        ...

    def root(self, salt: str) -> bytes:
        """What the digests of sequences with `salt` begin with."""
        ...

    async def find(self, root: bytes, ids: Sequence[int], window: int | None) -> Prefix:
        """The longest stored prefix of `ids`."""
        ...

    async def written(self, items: Sequence[tuple[Store, Cell]]) -> None:
        """Cells have their places."""
        ...

    async def ended(self, store: Store, least: int) -> None:
        """A store is about to give its cells back; keep a last block of at least `least` tokens."""
        ...

    async def passed(self, cells: Sequence[Cell]) -> None:
        """A window has moved past cells: their bytes are not needed again."""
        ...

    def stored_in(self, file: str) -> list[Place]:
        """Places in a file that are kept for good, whether a sequence shares them or not."""
        ...

    async def moved(self, places: Mapping[Place, Place]) -> None:
        """Records lie elsewhere now; when this returns, that would survive a power cut."""
        ...

    async def states(self, prefix: Prefix, shapes: Sequence[tuple[int, ...]]) -> tuple[int, list[Tensor]]:
        """The states that are stored, and after how many tokens of the prefix. Raises `StoreError`."""
        ...

    async def damaged(self, name: bytes) -> None:
        """A block is not what was stored."""
        ...

    async def sync(self) -> None:
        """Have what is said of written records survive a power cut."""
        ...

    async def tend(self) -> None:
        """There is time to let go of what is too much."""
        ...


class RuntimeScoped:
    """Nothing outlives the runtime."""

    name, persistent, tends_every_s = "runtime-scoped", False, math.inf
    kept = 0, 0

    def __init__(self, reason: str = "nothing is kept between runs (kv_cache_lifecycle is runtime-scoped)") -> None:
        """`reason`: why a prompt finds nothing of itself."""
        self._reason = reason

    def root(self, salt: str) -> bytes:
        """No digests are needed."""
        return NOBODY

    async def find(self, root: bytes, ids: Sequence[int], window: int | None) -> Prefix:
        """Nothing."""
        return Prefix(0, self._reason)

    async def written(self, items: Sequence[tuple[Store, Cell]]) -> None:
        """Nothing to do."""

    async def ended(self, store: Store, least: int) -> None:
        """Nothing to keep."""

    async def passed(self, cells: Sequence[Cell]) -> None:
        """Nothing to do: nobody else keeps them."""

    def stored_in(self, file: str) -> list[Place]:
        """None."""
        return []

    async def moved(self, places: Mapping[Place, Place]) -> None:
        """Nothing to tell anybody."""

    async def states(self, prefix: Prefix, shapes: Sequence[tuple[int, ...]]) -> tuple[int, list[Tensor]]:
        """None."""
        return 0, []

    async def damaged(self, name: bytes) -> None:
        """Nobody would find it."""

    async def sync(self) -> None:
        """Nothing is said anywhere."""

    async def tend(self) -> None:
        """Nothing to let go."""
