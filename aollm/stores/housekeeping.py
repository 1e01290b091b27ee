"""Housekeeping: what the command line does with stored caches, when no runtime is open.

A volume that a process has is looked at, and otherwise left alone. It refuses to know how results are printed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ..buffers import PAGE
from ..disk.calls import SYSTEM, Calls
from ..disk.folder import Folder
from ..disk.owner import check_file
from ..disk.trouble import folder_error
from ..errors import AollmError
from .node import Node
from .record import DamageError, Place
from .record import verify as verify_record
from .scratch import PREFIX
from .shelf import LOCK, read_identity, read_manifest, shelves, volumes, whole
from .volume import Volume


def ls(root: Path, calls: Calls = SYSTEM) -> list[dict[str, object]]:
    """What is stored under `root`, one entry a volume: `path`, `identity` (hex), `parts`, `format`, `blocks`, `tokens`,
    `bytes` (of records), `disk_bytes` (of files), `pinned` (blocks), `in_use`, and `error`, None or why it cannot be read.

    What a runtime-scoped cache has, or left when it was killed, is an entry without identity and blocks.
    """
    return [_entry(path, calls) for path in (*_volumes(root, "", calls), *_scratches(root, "", calls))]


def purge(root: Path, prefix: str = "", calls: Calls = SYSTEM) -> dict[str, Literal["removed", "in use"]]:
    """Remove the volumes whose identity or own name begins with `prefix`; says of each what became of it."""
    done: dict[str, Literal["removed", "in use"]] = {}
    for path in (*_volumes(root, prefix, calls), *_scratches(root, prefix, calls)):
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


def verify(
    root: Path, prefix: str = "", drop: bool = False, progress: Callable[[int], object] = lambda nbytes: None, calls: Calls = SYSTEM
) -> list[dict[str, object]]:  # fmt: skip
    """Read every record of the volumes that begin with `prefix` and compare it with what was stored; blocking, as fast as the drive.

    One entry a volume: `path`, `blocks`, `good`, `damaged`, `lost` (the manifest tells of them, the files do not have
    them), `bytes` (read), `dropped`, `in_use`, and `error`, None or the first thing that was wrong. With `drop`, damaged
    blocks and those that follow them will not be found any more. `progress` is called with the bytes of each record.
    """
    return [_checked(path, drop, progress, calls) for path in _volumes(root, prefix, calls)]


def _checked(path: Path, drop: bool, progress: Callable[[int], object], calls: Calls) -> dict[str, object]:
    found: dict[str, object] = {"path": str(path), **dict.fromkeys(("blocks", "good", "damaged", "lost", "bytes", "dropped"), 0)}
    found |= {"in_use": False, "error": None}
    try:
        folder = Folder.open(path, calls)
        try:
            if (lock := folder.lock(LOCK)) is None:
                return {**found, "in_use": True}
            try:
                parsed = read_manifest(folder)
                nodes = whole(parsed.nodes.values())
                wrong = _damaged(nodes, progress, calls)
            finally:
                lock.release()
        finally:
            folder.close()
        lost = len(parsed.nodes) - len(nodes)
        found |= {"blocks": len(parsed.nodes), "good": len(nodes) - len(wrong), "damaged": len(wrong), "lost": lost}
        found["bytes"] = sum(node.nbytes for node in nodes)
        found["error"] = next(iter(wrong.values()), None) or (f"the manifest is damaged ({parsed.damage})" if parsed.damage else None)
        if drop and (lost or wrong or parsed.damage):
            found["dropped"] = _drop(path, wrong, calls)
    except AollmError as problem:
        found["error"] = str(problem)
    return found


def _damaged(nodes: list[Node], progress: Callable[[int], object], calls: Calls) -> dict[bytes, str]:
    """What is wrong with which of `nodes`, by digest."""
    wrong: dict[bytes, str] = {}
    for node in nodes:
        for place in (*node.places, *node.states):
            try:
                _check(place, calls)
            except AollmError as problem:
                wrong.setdefault(node.digest, f"{place.extent.file} at byte {place.extent.offset}: {problem}")
            progress(place.extent.nbytes)
    return wrong


def _check(place: Place, calls: Calls) -> None:
    """Raises `AollmError` unless the record is what was stored there."""
    path = place.extent.file
    try:
        fd = calls.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            check_file(calls.fstat(fd), path)
            if sys.platform == "linux":  # what memory remembers of the file proves nothing
                os.posix_fadvise(fd, place.extent.offset, place.extent.nbytes, os.POSIX_FADV_DONTNEED)
            data = memoryview(calls.pread(fd, place.extent.nbytes, place.extent.offset))
        finally:
            calls.close(fd)
    except OSError as error:
        raise folder_error(error, path) from error
    if len(data) < place.extent.nbytes:
        raise DamageError("checksum: a record is cut short")
    verify_record(data[:PAGE], [data[PAGE : PAGE + place.header.nbytes]], place.header)


def _drop(path: Path, wrong: dict[bytes, str], calls: Calls) -> int:
    """Drop blocks, and what follows them and could not be found without them; how many that were."""
    if (volume := Volume.reopen(path, calls)) is None:
        return 0
    try:
        going: dict[bytes, Node] = {}
        for node in sorted(volume.index.nodes(), key=lambda node: node.index):
            if node.digest in wrong or node.parent in going:
                going[node.digest] = node
        volume.drop(list(going.values()))
        volume.sync()
        return len(going) + volume.lost
    finally:
        volume.close()


def _scratches(root: Path, prefix: str, calls: Calls) -> list[Path]:
    if not os.path.lexists(root):
        return []
    base = Folder.open(root, calls)
    try:
        return [base.path / name for name in base.names() if name.startswith(PREFIX) and name.startswith(prefix)]
    finally:
        base.close()


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
        "identity": "" if path.name.startswith(PREFIX) else path.parent.name,
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
