"""Blocks that outlive the runtime.

Whole blocks are given to the volume's index once all their layers are written, and found again as the longest stored prefix of
a prompt; what is too much or too old goes. A block is named by the digest of all tokens up to its end.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import monotonic

import anyio.to_thread
import torch
from torch import Tensor

from ..buffers import PAGE
from ..maths.attention import BLOCK, first_seen
from .cell import Cell
from .codec import raw_bytes
from .index import Found
from .lifecycle import Prefix
from .node import Node, digest, pack_ids, root
from .record import DamageError, Kind, Place, payload_sum
from .records import NOBODY, Item, Records
from .retention import excess
from .store import Store
from .volume import Volume


class Persistent:
    """Blocks that outlive the runtime, in `volume`, within `max_bytes` and `max_age_s`."""

    name, persistent = "persistent", True

    def __init__(self, volume: Volume, records: Records, max_bytes: int | None = None, max_age_s: float | None = None) -> None:
        self._volume, self._records = volume, records
        self._max_bytes, self._max_age_s = max_bytes, max_age_s
        self._unfinished: dict[bytes, dict[int, Cell]] = {}
        self._whole: dict[bytes, tuple[Store, int]] = {}  # of these, those with all layers, until they are committed
        self._live: dict[bytes, tuple[Cell, ...]] = {}  # the cells of nodes that sequences share
        self._used: dict[bytes, Node] = {}  # since the last sync
        self.tends_every_s = math.inf if max_age_s is None else min(max_age_s / 4, 60)
        self._tended, self._tended_at = (0, 0), -math.inf

    @property
    def kept(self) -> tuple[int, int]:
        """Of the volume's own blocks, but for those that only their ids are left of."""
        nodes = [node for node in self._volume.index.nodes() if node.places]
        return sum(len(node.places) for node in nodes), sum(node.rows for node in nodes)

    def root(self, salt: str) -> bytes:
        """A digest of the model's identity and the salt."""
        return root(self._volume.identity.digest, salt)

    async def find(self, root: bytes, ids: Sequence[int], window: int | None) -> Prefix:
        """The longest stored prefix, by comparing ids; it counts as used now."""
        found = await anyio.to_thread.run_sync(self._volume.lookup, root, ids)
        while any(map(self._gone, found.nodes)):  # dropped while the lookup came back
            found = await anyio.to_thread.run_sync(self._volume.lookup, root, ids)
        found, first = _seen(found, window)
        if not found.tokens:
            return Prefix(0, found.reason or "nothing is stored")
        for node in found.nodes:
            node.used = self._volume.next_sequence()
            self._used[node.digest] = node
        cells = [self._cells(node) for node in found.nodes[first:]]
        ends = itertools.accumulate(node.rows for node in found.nodes)
        whole = [(end, node.states) for end, node in zip(ends, found.nodes, strict=True) if end <= found.tokens and node.states]
        return Prefix(found.tokens, found.reason, first, tuple(zip(*cells, strict=True)), whole[-1] if whole else (0, ()))

    async def written(self, items: Sequence[tuple[Store, Cell]]) -> None:
        """Commit the blocks of which this was the last layer. Raises `StoreError` or `DiskError`."""
        for store, cell in items:
            if cell.place is None or (name := cell.place.header.block) == NOBODY:
                continue
            layers = self._unfinished.setdefault(name, {})
            layers[cell.layer] = cell
            if len(layers) == self._records.shape.layers:
                self._whole[name] = store, cell.index
        await self._commit_whole()

    async def ended(self, store: Store, least: int) -> None:
        """Store the last block as far as it goes."""
        tokens = min(store.tokens, len(store.ids))
        index, rows = divmod(tokens, BLOCK)
        if store.private or store.states or rows < least or (index and store.digest(index - 1) not in self._volume.index):
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
        seen, now = (len(self._volume.index), self._volume.index.nbytes), monotonic()
        if (self._max_bytes is None and self._max_age_s is None) or (seen == self._tended and now - self._tended_at < self.tends_every_s):
            return
        self._tended_at = now
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

    async def _commit_whole(self) -> None:
        """What fails stays, to be tried again."""
        for name, (store, index) in sorted(self._whole.items(), key=lambda item: item[1][1]):
            cells = self._unfinished[name]
            # Else another sequence was first, it was let go, or it was cut off and may have gone on with other tokens.
            there = name not in self._volume.index and not any(cell.place is None for cell in cells.values())
            if there and len(store.ids) >= (index + 1) * BLOCK and store.digest(index) == name:
                await self._commit(store, index, BLOCK, [cells[layer] for layer in sorted(cells)])
            del self._unfinished[name], self._whole[name]

    async def _commit(self, store: Store, index: int, rows: int, cells: Sequence[Cell]) -> None:
        parent, ids = store.digest(index - 1), pack_ids(store.ids[index * BLOCK : index * BLOCK + rows])
        name = digest(parent, ids)
        passed = self._passed_before(store, index)
        snapshot = store.states.snapshot(index * BLOCK + rows) if store.states else None  # None: others may follow that have theirs
        states: list[Place] = []
        for cell in cells:
            cell.stored = name  # whoever lets go of it from now on leaves its place alone
        try:
            states += await self._keep(name, index, rows, snapshot) if snapshot else []
            places = tuple(cell.place for cell in cells if cell.place is not None)
            node = Node(name, parent, index, ids, places, tuple(states), self._volume.next_sequence(), time.time())
            shorter = [child for child in self._volume.index.children(parent) if ids.startswith(child.ids) and child.ids != ids]
            await anyio.to_thread.run_sync(self._volume.commit, [*passed, node])
        except BaseException:
            self._records.free(states)
            for cell in cells:
                cell.stored = None
                if not cell.owners and not cell.writing:
                    self._records.forget(cell)
            raise
        self._live[name] = tuple(cells)
        await self.drop([child for child in shorter if not child.pinned and not self._volume.index.children(child.digest)])

    def _passed_before(self, store: Store, index: int) -> list[Node]:
        """Blocks before `index` that a window passed before they were written: their ids alone, so that what follows is found."""
        kept = max((cells[0].index for layer in range(self._records.shape.layers) if (cells := store.cells(layer))), default=0)
        missing: list[Node] = []
        for at in range(index - 1, -1, -1):
            if store.digest(at) in self._volume.index:
                break
            if at >= kept:
                return []
            ids = pack_ids(store.ids[at * BLOCK : (at + 1) * BLOCK])
            missing.append(Node(store.digest(at), store.digest(at - 1), at, ids, (), (), self._volume.next_sequence(), time.time()))
        return missing[::-1]

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
        if not places:
            return 0, []
        found = []
        for place, shape in zip(places, shapes, strict=True):
            try:
                record = await self._records.read_bytes(place)
            except DamageError:
                await self.damaged(place.header.block)
                raise
            found.append(torch.frombuffer(record, dtype=torch.float32, offset=PAGE, count=math.prod(shape)).view(shape))
        return tokens, found

    async def sync(self) -> None:
        """Sync the manifest, with all that is written; it keeps which blocks were used last."""
        await self._commit_whole()
        used = [node for node in self._used.values() if self._volume.index.get(node.digest) is node]
        self._used.clear()
        await anyio.to_thread.run_sync(self._volume.mark, used)
        await anyio.to_thread.run_sync(self._volume.sync)

    def _gone(self, node: Node) -> bool:
        """Whether one of the volume's own nodes is not stored any more."""
        own = any(os.path.dirname(place.extent.file) == self._volume.path for place in node.places)
        return own and self._volume.index.get(node.digest) is not node

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
