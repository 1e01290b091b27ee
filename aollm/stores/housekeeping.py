"""Housekeeping: what the command line does with stored caches, when no runtime is open.

A volume that a process has is looked at, and otherwise left alone. It refuses to know how results are printed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ..disk.calls import SYSTEM, Calls
from ..disk.folder import Folder
from ..errors import AollmError
from .node import Node
from .shelf import LOCK, read_identity, read_manifest, shelves, volumes, whole
from .volume import Volume


def ls(root: Path, calls: Calls = SYSTEM) -> list[dict[str, object]]:
    """What is stored under `root`, one entry a volume: `path`, `identity` (hex), `parts`, `format`, `blocks`, `tokens`,
    `bytes` (of records), `disk_bytes` (of files), `pinned` (blocks), `in_use`, and `error`, None or why it cannot be read."""
    return [_entry(path, calls) for path in _volumes(root, "", calls)]


def purge(root: Path, prefix: str = "", calls: Calls = SYSTEM) -> dict[str, Literal["removed", "in use"]]:
    """Remove the volumes whose identity or own name begins with `prefix`; says of each what became of it."""
    done: dict[str, Literal["removed", "in use"]] = {}
    for path in _volumes(root, prefix, calls):
        folder = Folder.open(path, calls)
        if (lock := folder.lock(LOCK)) is None:
            folder.close()
            done[str(path)] = "in use"
            continue
        try:
            folder.erase()
        finally:
            lock.release()
            folder.close()
        done[str(path)] = "removed"
    return done


def pin(root: Path, prefix: str, on: bool, calls: Calls = SYSTEM) -> dict[str, Literal["pinned", "unpinned", "in use"]]:
    """Have the blocks of volumes that begin with `prefix` never be dropped for room or age, or take that back."""
    done: dict[str, Literal["pinned", "unpinned", "in use"]] = {}
    for path in _volumes(root, prefix, calls):
        if (volume := Volume.reopen(path, calls)) is None:
            done[str(path)] = "in use"
            continue
        try:
            nodes = volume.index.nodes()
            for node in nodes:
                node.pinned = on
            volume.mark(nodes)
            volume.sync()
        finally:
            volume.close()
        done[str(path)] = "pinned" if on else "unpinned"
    return done


def _volumes(root: Path, prefix: str, calls: Calls) -> list[Path]:
    paths = [path / name for path in shelves(root, calls) for name in volumes(path, calls)]
    return [path for path in paths if path.name.startswith(prefix) or path.parent.name.startswith(prefix)]


def _entry(path: Path, calls: Calls) -> dict[str, object]:
    identity = read_identity(path.parent, calls)
    nodes: list[Node] = []
    format, error = "", None
    in_use, disk_bytes = False, 0
    try:
        folder = Folder.open(path, calls)
        try:
            disk_bytes = sum(os.lstat(path / name).st_blocks * 512 for name in folder.names())
            if (lock := folder.lock(LOCK)) is None:
                in_use = True
            else:
                lock.release()
            parsed = read_manifest(folder)
        finally:
            folder.close()
        nodes = whole(parsed.nodes.values())
        format = "" if parsed.head is None else parsed.head.format
    except (AollmError, OSError) as problem:
        error = str(problem)
    return {
        "path": str(path),
        "identity": path.parent.name,
        "parts": {} if identity is None else dict(identity.parts),
        "format": format,
        "blocks": len(nodes),
        "tokens": sum(node.rows for node in nodes),
        "bytes": sum(node.nbytes for node in nodes),
        "disk_bytes": disk_bytes,
        "pinned": sum(node.pinned for node in nodes),
        "in_use": in_use,
        "error": error,
    }
