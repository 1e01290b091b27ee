"""How long what is stored lives: with its runtime, or for good.

`Persistent` gives whole blocks to the volume's index once all their layers are written, finds the longest stored prefix
of a prompt again, and lets go of what is too much or too old. A block is named by the digest of all tokens up to its end.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import anyio.to_thread
import torch
from torch import Tensor

from ..errors import StoreError
from ..maths.attention import BLOCK, first_seen
from .cell import Cell
from .codec import raw_bytes
from .index import Found
from .node import Node, digest, pack_ids, root
from .record import PAGE, Kind, Place, payload_sum
from .records import NOBODY, Item, Records
from .retention import excess
from .store import Store
from .volume import Volume


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

    name, persistent = "runtime-scoped", False

    def root(self, salt: str) -> bytes:
        """No digests are needed."""
        return NOBODY

    async def find(self, root: bytes, ids: Sequence[int], window: int | None) -> Prefix:
        """Nothing."""
        return Prefix(0, "nothing is kept between runs (kv_cache_lifecycle is runtime-scoped)")

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


class Persistent:
    """Blocks that outlive the runtime, in `volume`, within `max_bytes` and `max_age_s`."""

    name, persistent = "persistent", True

    def __init__(self, volume: Volume, records: Records, max_bytes: int | None = None, max_age_s: float | None = None) -> None:
        self._volume, self._records = volume, records
        self._max_bytes, self._max_age_s = max_bytes, max_age_s
        self._unfinished: dict[bytes, dict[int, Cell]] = {}
        self._live: dict[bytes, tuple[Cell, ...]] = {}  # the cells of nodes that sequences share
        self._tended = (0, 0.0)

    def root(self, salt: str) -> bytes:
        """A digest of the model's identity and the salt."""
        return root(self._volume.identity.digest, salt)

    async def find(self, root: bytes, ids: Sequence[int], window: int | None) -> Prefix:
        """The longest stored prefix, by comparing ids; it counts as used now."""
        found = await anyio.to_thread.run_sync(self._volume.lookup, root, ids)
        found, first = _seen(found, window)
        if not found.tokens:
            return Prefix(0, found.reason or "nothing is stored")
        for node in found.nodes:
            node.used = self._volume.next_sequence()
        cells = [self._cells(node) for node in found.nodes[first:]]
        ends = itertools.accumulate(node.rows for node in found.nodes)
        whole = [(end, node.states) for end, node in zip(ends, found.nodes, strict=True) if end <= found.tokens]
        return Prefix(found.tokens, found.reason, first, tuple(zip(*cells, strict=True)), whole[-1] if whole else (0, ()))

    async def written(self, items: Sequence[tuple[Store, Cell]]) -> None:
        """Commit the blocks of which this was the last layer. Raises `StoreError` or `DiskError`."""
        whole: dict[bytes, tuple[Store, int]] = {}
        for store, cell in items:
            if cell.place is None or (name := cell.place.header.block) == NOBODY:
                continue
            layers = self._unfinished.setdefault(name, {})
            layers[cell.layer] = cell
            if len(layers) == self._records.shape.layers:
                whole[name] = store, cell.index
        for name, (store, index) in sorted(whole.items(), key=lambda item: item[1][1]):
            cells = self._unfinished.pop(name)
            if name in self._volume.index or any(cell.place is None for cell in cells.values()):
                continue  # another sequence was first, or it was let go meanwhile
            await self._commit(store, index, BLOCK, [cells[layer] for layer in sorted(cells)])

    async def ended(self, store: Store, least: int) -> None:
        """Store the last block as far as it goes."""
        tokens = min(store.tokens, len(store.ids))
        index, rows = divmod(tokens, BLOCK)
        if store.private or rows < least or (index and store.digest(index - 1) not in self._volume.index):
            return
        parent, ids = store.digest(index - 1), pack_ids(store.ids[index * BLOCK : tokens])
        name = digest(parent, ids)
        if any(node.ids.startswith(ids) for node in self._volume.index.children(parent)):
            return
        cells = [store.cells(layer, tokens - 1)[0] for layer in range(self._records.shape.layers)]
        if any(cell.slot is None or cell.place is not None for cell in cells):
            return
        await self._records.write([Item(cell, rows, store.number, name) for cell in cells])
        await self._commit(store, index, rows, cells)

    async def passed(self, cells: Sequence[Cell]) -> None:
        """Blocks whose last layer the window has passed keep their ids, so that what follows them is found, and nothing else."""
        for cell in cells:
            name = cell.stored
            node = self._volume.index.get(name) if name is not None else None
            shared = self._live.get(name, ()) if name is not None else ()
            if node is None or not node.places or any(other.owners for other in shared):
                continue
            self._forget_live(node.digest)
            await anyio.to_thread.run_sync(self._volume.commit, [replace(node, places=(), states=())])
            self._records.free((*node.places, *node.states))

    def stored_in(self, file: str) -> list[Place]:
        """The places of nodes in `file`."""
        return [place for node in self._volume.index.nodes() for place in (*node.places, *node.states) if place.extent.file == file]

    async def moved(self, places: Mapping[Place, Place]) -> None:
        """Commit the nodes anew, and sync."""
        nodes = [
            replace(
                node,
                places=tuple(places.get(place, place) for place in node.places),
                states=tuple(places.get(place, place) for place in node.states),
            )
            for node in self._volume.index.nodes()
            if any(place in places for place in (*node.places, *node.states))
        ]
        await anyio.to_thread.run_sync(self._volume.commit, nodes)
        await anyio.to_thread.run_sync(self._volume.sync)

    async def tend(self) -> None:
        """Drop what is over the quota or too old, but nothing that a sequence is made of."""
        for name in [name for name, cells in self._live.items() if not any(cell.owners or cell.slot for cell in cells)]:
            self._forget_live(name)
        seen = len(self._volume.index), self._volume.index.nbytes
        if (self._max_bytes is None and self._max_age_s is None) or seen == self._tended:
            return
        held = {name for name, cells in self._live.items() if any(cell.owners for cell in cells)}
        nodes = await anyio.to_thread.run_sync(excess, self._volume.index, self._max_bytes, self._max_age_s, time.time(), held)
        await self.drop(nodes)
        self._tended = len(self._volume.index), self._volume.index.nbytes

    async def drop(self, nodes: Sequence[Node]) -> None:
        """Have `nodes` not be found any more; their room is free once nobody shares them."""
        nodes = [node for node in nodes if self._volume.index.get(node.digest) is node]
        if not nodes:
            return
        await anyio.to_thread.run_sync(self._volume.drop, nodes)
        for node in nodes:
            held = {cell.place for cell in self._live.get(node.digest, ()) if cell.owners}  # let go with their last owner
            self._forget_live(node.digest)
            self._records.free(place for place in (*node.places, *node.states) if place not in held)

    async def damaged(self, name: bytes) -> None:
        """A block was not what was stored: nobody is to find it again."""
        if (node := self._volume.index.get(name)) is not None:
            await self.drop([node])

    async def _commit(self, store: Store, index: int, rows: int, cells: Sequence[Cell]) -> None:
        parent, ids = store.digest(index - 1), pack_ids(store.ids[index * BLOCK : index * BLOCK + rows])
        name = digest(parent, ids)
        states: list[Place] = []
        if store.states:
            snapshot = store.states.snapshot(index * BLOCK + rows)
            if snapshot is None:
                raise StoreError("not kept: no state at the end of the block")
            states = await self._keep(name, index, rows, snapshot)
        places = tuple(cell.place for cell in cells if cell.place is not None)
        node = Node(name, parent, index, ids, places, tuple(states), self._volume.next_sequence(), time.time())
        shorter = [child for child in self._volume.index.children(parent) if ids.startswith(child.ids) and child.ids != ids]
        await anyio.to_thread.run_sync(self._volume.commit, [node])
        for cell in cells:
            cell.stored = name
        self._live[name] = tuple(cells)
        await self.drop([child for child in shorter if not child.pinned and not self._volume.index.children(child.digest)])

    async def _keep(self, name: bytes, index: int, rows: int, snapshot: Sequence[Tensor]) -> list[Place]:
        records = []
        for layer, state in enumerate(snapshot):
            parts = [raw_bytes(state.contiguous())]
            header = self._records.header(Kind.STATE, name, layer, index, rows, parts)
            records.append((header, parts, payload_sum(parts), 0))
        return await self._records.put(records)

    async def states(self, prefix: Prefix, shapes: Sequence[tuple[int, ...]]) -> tuple[int, list[Tensor]]:
        """The states, float32, after the last block that is matched whole."""
        tokens, places = prefix.states
        found = []
        for place, shape in zip(places, shapes, strict=True):
            record = await self._records.read_bytes(place)
            found.append(torch.frombuffer(record, dtype=torch.float32, offset=PAGE, count=math.prod(shape)).view(shape).clone())
        return tokens, found

    async def sync(self) -> None:
        """Sync the manifest."""
        await anyio.to_thread.run_sync(self._volume.sync)

    def _forget_live(self, name: bytes) -> None:
        """Cells that nobody shares are made anew when they are found again; others are no longer kept for good."""
        for cell in self._live.pop(name, ()):
            cell.stored = None
            if not cell.owners and cell.place is not None:
                self._records.placed.pop((cell.place.extent.file, cell.place.extent.offset), None)
                cell.place = None

    def _cells(self, node: Node) -> tuple[Cell, ...]:
        if (cells := self._live.get(node.digest)) is not None:
            return cells
        cells = tuple(Cell(layer, node.index, place=place, owners=0, stored=node.digest) for layer, place in enumerate(node.places))
        self._live[node.digest] = cells
        for cell in cells:
            assert cell.place is not None
            self._records.placed[cell.place.extent.file, cell.place.extent.offset] = cell
        return cells


def _seen(found: Found, window: int | None) -> tuple[Found, int]:
    """The first block that a query after the prefix sees; with a window, nothing is found unless all that it sees is stored."""
    first = first_seen(found.tokens, window) // BLOCK
    if found.tokens and not all(node.places for node in found.nodes[first:]):
        return Found([], 0, "the end of it that the window needs is not stored"), 0
    return found, first
