"""A volume: the folder that one process writes stored blocks to, and its manifest.

It takes a folder whose owner is gone before it makes a new one, and brings it into order. Everything here blocks, on
small files only: call it in a worker thread. Records' own bytes are none of its business.
"""

from __future__ import annotations

import itertools
import os.path
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from ..disk.calls import SYSTEM, Calls
from ..disk.folder import Folder
from ..disk.lock import Lock
from ..errors import AollmError, StoreError
from .identity import JSON_LIMIT, Identity, difference
from .index import Found, Index
from .manifest import Head, parse
from .node import Node
from .shelf import IDENTITY, LOCK, MANIFEST, MANIFEST_LIMIT, Others, neighbours, read_manifest, volume_names, whole

DAMAGED = re.compile(r"manifest\.damaged-(\d{1,9})")
STRIDE = 1 << 32
"""How far sequences jump at each opening: records may have been written that no manifest tells of."""
SPARE = 64
"""Dead records that a manifest may have beyond as many as live ones."""


class Volume:
    """One `folder`, locked. `index` has what is stored in it; `tail_truncated_bytes`, `quarantined` and `lost` count what
    opening had to give up: unfinished bytes, damaged manifests and blocks without their data."""

    def __init__(self, folder: Folder, lock: Lock, head: Head, calls: Calls) -> None:
        self.index = Index(head.block_tokens)
        self.tail_truncated_bytes = 0
        self.quarantined = 0
        self.lost = 0
        self.folder = folder
        self._owned = lock
        self._head = head
        self._others, self._calls = Others(folder.path, head.block_tokens, calls), calls
        self._sequence = itertools.count(1)
        self._nbytes = 0
        """Where the manifest ends; 0 while there is none, or it is not known: then it is written anew first."""
        self._dead = 0
        self._dirty = False
        self._closed = False
        self._busy = threading.Lock()

    @classmethod
    def open(cls, root: Path, identity: Identity, format: str, block_tokens: int, layers: int, calls: Calls = SYSTEM) -> Self:
        """The first volume of `identity` under `root` that nobody has, brought into order, or a new one.

        Raises `StoreError` for one that a newer version wrote, or whose blocks are of another format.
        """
        base = Folder.make(root, calls, "cache_dir")
        shelf = base.child(identity.hex)
        base.close()
        try:
            if shelf.read(IDENTITY, JSON_LIMIT) != identity.json():
                shelf.swap(IDENTITY, identity.json())
            folder, lock = _take(shelf)
        finally:
            shelf.close()
        head = Head(str(folder.path), identity, secrets.randbits(63), format, block_tokens, layers)
        return cls._recovered(cls(folder, lock, head, calls))

    @classmethod
    def reopen(cls, path: Path, calls: Calls = SYSTEM) -> Self | None:
        """The volume at `path` as its manifest describes it; None while a process has it."""
        folder = Folder.open(path, calls)
        if (lock := folder.lock(LOCK)) is None:
            folder.close()
            return None
        try:
            head = read_manifest(folder).head
            if head is None:
                raise StoreError(f"{path} has no manifest that can be read: purge it")
        except AollmError:
            lock.release()
            folder.close()
            raise
        return cls._recovered(cls(folder, lock, head, calls))

    @property
    def path(self) -> str:
        """Its folder."""
        return self._head.folder

    @property
    def identity(self) -> Identity:
        """What all of it was computed with."""
        return self._head.identity

    @property
    def generation(self) -> int:
        """The random epoch that all its records carry."""
        return self._head.generation

    def next_sequence(self) -> int:
        """A number above all that were given or stored before; safe from any thread."""
        return next(self._sequence)

    def commit(self, nodes: Sequence[Node]) -> None:
        """Have `nodes`, whose records are written, be stored: parents before those that follow them."""
        with self._busy:
            self._append(nodes, self._head.commit)
            for node in nodes:
                self._dead += node.digest in self.index
                self.index.add(node)

    def drop(self, nodes: Sequence[Node]) -> None:
        """Have `nodes` not be stored any more; their room may be used again."""
        with self._busy:
            self._append(nodes, lambda node, sequence: self._head.drop(node.digest, sequence))
            for node in nodes:
                self.index.remove(node)
            self._dead += 2 * len(nodes)

    def mark(self, nodes: Sequence[Node]) -> None:
        """Keep when `nodes` were used, and whether they are pinned."""
        with self._busy:
            self._append(nodes, lambda node, sequence: self._head.mark(node.digest, node.used, node.pinned, sequence))
            self._dead += len(nodes)

    def sync(self) -> None:
        """Return when all of it would survive a power cut; writes a shorter manifest once most of it is dead."""
        with self._busy:
            if self._dead > len(self.index) + SPARE or (self._dirty and not self._nbytes):
                self._swap()
            elif self._dirty:
                end, self._nbytes = self._nbytes, 0
                self.folder.sync(MANIFEST)
                self._nbytes, self._dirty = end, False

    def swap(self) -> None:
        """Write a manifest of what lives, and put it in place of the old one."""
        with self._busy:
            self._swap()

    def lookup(self, root: bytes, ids: Sequence[int]) -> Found:
        """The longest prefix of `ids` under `root` that is stored in this volume, or else in another of its identity.

        Where no volume has anything, the reason says what differs from the model that something is stored of.
        """
        found = self.index.lookup(root, ids)
        if found.reason is None:
            return found
        elsewhere = self._others.index()
        if (more := self.index.lookup(root, ids, elsewhere)).tokens > found.tokens:
            return more
        if not len(self.index) and not len(elsewhere):
            words = {difference(self.identity, near) for near in self.neighbours()}
            return replace(found, reason=f"{found.reason}, but for {min(filter(None, words))}") if words else found
        return found

    def others(self) -> list[Node]:
        """What other volumes of the same identity have stored, in other processes or before; to be read only."""
        return self._others.index().nodes()

    @property
    def skipped(self) -> int:
        """How often a volume could not be read by `others`, or only in part."""
        return self._others.skipped

    def neighbours(self) -> list[Identity]:
        """Other identities under the same root that have something stored."""
        return neighbours(self.folder.path, self._calls)

    def close(self) -> None:
        """Let others have it; one without a manifest is removed with all that is in it. Does not sync."""
        with self._busy:
            if self._closed:
                return
            self._closed = True
            try:
                if MANIFEST not in self.folder.names():
                    self.folder.erase()
                elif self._dirty and not self._nbytes:
                    self._swap()  # its flush failed: the drive may lack bytes that the next process would read and build on
            finally:
                self._owned.release()
                self.folder.close()

    def __repr__(self) -> str:
        return f"<Volume {self.path}: {len(self.index)} blocks>"

    def _recovered(self) -> Self:
        try:
            self._recover()
        except AollmError:
            self._owned.release()
            self.folder.close()
            raise
        return self

    def _recover(self) -> None:
        data = self.folder.read(MANIFEST, MANIFEST_LIMIT) or b""
        parsed = parse(data, self.path, self._head.identity.digest)
        if parsed.head is not None:
            self._adopt(parsed.head)
        live = whole(parsed.nodes.values())
        if len(live) < len(parsed.nodes):  # some may follow what another volume has
            live = whole(parsed.nodes.values(), self._others.index())
        for node in live:
            self.index.add(node)
        self.lost = len(parsed.nodes) - len(live)
        self._dead = max(parsed.records - 1 - len(live), 0)
        self._sequence = itertools.count(parsed.sequence + STRIDE)
        if parsed.damage == "middle":
            self.quarantined = 1
            self._quarantine(data)
        elif parsed.damage == "tail":
            self.tail_truncated_bytes = len(data) - parsed.good_nbytes
        if parsed.head is None:
            self.folder.remove(MANIFEST)
        elif self.lost or self.quarantined or self._dead > len(live) + SPARE:
            self._swap()
        else:
            self._nbytes = parsed.good_nbytes
            if self.tail_truncated_bytes:
                self.folder.truncate(MANIFEST, self._nbytes)
                self.folder.sync(MANIFEST)
        self._tidy(live)

    def _adopt(self, found: Head) -> None:
        wanted = self._head
        if (found.format, found.block_tokens, found.layers) != (wanted.format, wanted.block_tokens, wanted.layers):
            kept = f"{found.format} with {found.layers} layers in blocks of {found.block_tokens} tokens"
            asked = f"{wanted.format} with {wanted.layers} layers in blocks of {wanted.block_tokens}"
            raise StoreError(f"{self.path} holds {kept}, not {asked}: purge it, or use another cache_dir")
        self._head = found

    def _quarantine(self, data: bytes) -> None:
        taken = [int(match[1]) for name in self.folder.names() if (match := DAMAGED.fullmatch(name))]
        self.folder.swap(f"{MANIFEST}.damaged-{max(taken, default=0) + 1}", data)

    def _tidy(self, live: Iterable[Node]) -> None:
        """Remove temporaries, and data that nothing tells of."""
        named = {os.path.basename(place.extent.file) for node in live for place in (*node.places, *node.states)}
        for name in self.folder.names():
            if name not in named and name not in (MANIFEST, LOCK) and not DAMAGED.fullmatch(name):
                self.folder.remove(name)

    def _append(self, nodes: Sequence[Node], record: Callable[[Node, int], bytes]) -> None:
        if not nodes:
            return
        if not self._nbytes:
            self._swap()
        data = b"".join(record(node, self.next_sequence()) for node in nodes)
        if self._nbytes + len(data) > MANIFEST_LIMIT:
            raise StoreError(f"{self.path}: its manifest has reached {MANIFEST_LIMIT} bytes; set a smaller max_bytes, or purge the cache")
        end, self._nbytes, self._dirty = self._nbytes, 0, True
        try:
            self.folder.append(MANIFEST, end, data)
        except AollmError:
            self.folder.truncate(MANIFEST, end)  # a part of it, found behind later records, would look like damage
            self._nbytes = end
            raise
        self._nbytes = end + len(data)

    def _swap(self) -> None:
        live = sorted(self.index.nodes(), key=lambda node: node.index)
        records = [self._head.begin(self.next_sequence())]
        records += [self._head.commit(node, self.next_sequence()) for node in live]
        data = b"".join(records)
        self._nbytes = 0
        self.folder.swap(MANIFEST, data)
        self._nbytes, self._dead, self._dirty = len(data), 0, False


def _take(shelf: Folder) -> tuple[Folder, Lock]:
    """The first volume that nobody has, locked, or a new one. What a dead process left without a manifest is removed."""
    for name in volume_names(shelf):
        folder = shelf.child(name)
        if (lock := folder.lock(LOCK)) is None:
            folder.close()
            continue
        if MANIFEST in folder.names():
            return folder, lock
        folder.erase()
        lock.release()
    for _ in range(8):
        folder = shelf.child(secrets.token_hex(8))
        if (lock := folder.lock(LOCK)) is not None:
            return folder, lock
        folder.close()
    raise StoreError(f"{shelf.path}: no folder in it stays where it was made; is another program clearing it?")
