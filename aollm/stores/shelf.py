"""A shelf: the volumes of one identity side by side, read without owning them.

What a stranger's volume says may be out of date by the time it is used: its records are verified when they are read.
It refuses to write, and to take locks.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Container, Iterable
from pathlib import Path

from ..disk.calls import Calls
from ..disk.folder import Folder
from ..errors import AollmError
from .identity import JSON_LIMIT, Identity
from .index import Index
from .manifest import Parsed, parse
from .node import Node

MANIFEST, LOCK, IDENTITY = "manifest", "LOCK", "identity.json"
MANIFEST_LIMIT = 1 << 30
VOLUME_NAME = re.compile(r"[0-9a-f]{16}")
IDENTITY_NAME = re.compile(r"[0-9a-f]{32}")


class Others:
    """Blocks in the volumes beside the one in `folder`, safe from any thread. `skipped` counts those that could not be
    read, or only in part."""

    def __init__(self, folder: Path, block_tokens: int, calls: Calls) -> None:
        self.skipped = 0
        self._folder, self._block, self._calls = folder, block_tokens, calls
        self._seen: dict[str, tuple[tuple[int, int, int], list[Node]]] = {}
        self._index = Index(block_tokens)
        self._one_at_a_time = threading.Lock()

    def index(self) -> Index:
        """What they have stored; manifests that did not change since the last call are not read again."""
        with self._one_at_a_time:
            try:
                names = volumes(self._folder.parent, self._calls)
            except AollmError:
                self.skipped += 1
                return self._index
            seen, self._seen = self._seen, {}
            for name in names:
                if name == self._folder.name:
                    continue
                try:
                    status = os.stat(self._folder.parent / name / MANIFEST)
                except OSError:
                    continue  # nothing is stored in it, or it is gone
                state = (status.st_ino, status.st_size, status.st_mtime_ns)
                known = seen.get(name)
                self._seen[name] = known if known is not None and known[0] == state else (state, self._read(name))
            if self._seen != seen:
                self._index = Index(self._block)
                for _, nodes in self._seen.values():
                    for node in nodes:
                        self._index.add(node)
            return self._index

    def _read(self, name: str) -> list[Node]:
        try:
            folder = Folder.open(self._folder.parent / name, self._calls)
            try:
                parsed = read_manifest(folder, bytes.fromhex(self._folder.parent.name))
            finally:
                folder.close()
        except AollmError:
            self.skipped += 1
            return []
        self.skipped += parsed.damage is not None
        return whole(parsed.nodes.values(), None)


def read_manifest(folder: Folder, identity: bytes | None = None) -> Parsed:
    """What the manifest of the volume in `folder` says, whoever has it."""
    return parse(folder.read(MANIFEST, MANIFEST_LIMIT) or b"", str(folder.path), identity)


def whole(nodes: Iterable[Node], elsewhere: Container[bytes] | None = ()) -> list[Node]:
    """Of `nodes`, those whose files are long enough and whose parents are there or `elsewhere` (None: wherever); parents come first."""
    sizes: dict[str, int] = {}
    kept: dict[bytes, Node] = {}
    for node in sorted(nodes, key=lambda node: node.index):
        extents = [place.extent for place in (*node.places, *node.states)]
        for file in {extent.file for extent in extents} - sizes.keys():
            try:
                sizes[file] = os.lstat(file).st_size
            except OSError:
                sizes[file] = -1
        there = not node.index or node.parent in kept or elsewhere is None or node.parent in elsewhere
        if there and all(extent.end <= sizes[extent.file] for extent in extents):
            kept[node.digest] = node
    return list(kept.values())


def volume_names(shelf: Folder) -> list[str]:
    """The volumes of one identity."""
    return [name for name in shelf.names() if VOLUME_NAME.fullmatch(name)]


def volumes(path: Path, calls: Calls) -> list[str]:
    """The names of the volumes in the folder of one identity."""
    shelf = Folder.open(path, calls)
    try:
        return volume_names(shelf)
    finally:
        shelf.close()


def shelves(root: Path, calls: Calls) -> list[Path]:
    """The folders of all identities under `root`, none if there is no such folder."""
    if not os.path.lexists(root):
        return []
    base = Folder.open(root, calls)
    try:
        return [base.path / name for name in base.names() if IDENTITY_NAME.fullmatch(name)]
    finally:
        base.close()


def read_identity(path: Path, calls: Calls) -> Identity | None:
    """The identity whose volumes are in the folder at `path`; None if the folder does not say, or lies."""
    try:
        folder = Folder.open(path, calls)
        try:
            data = folder.read(IDENTITY, JSON_LIMIT)
        finally:
            folder.close()
        found = None if data is None else Identity.parse(data)
    except AollmError:
        return None
    return found if found is not None and found.hex == path.name else None


def neighbours(folder: Path, calls: Calls) -> list[Identity]:
    """The other identities under the same root that have something stored, to say in what they differ. `folder` is a volume."""
    try:
        found = shelves(folder.parent.parent, calls)
    except AollmError:
        return []
    others = [path for path in found if path != folder.parent and any(path.glob(f"*/{MANIFEST}"))]
    return [identity for path in others if (identity := read_identity(path, calls)) is not None]
