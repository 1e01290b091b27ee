"""The stamp of an export: which files, as the system knows them, were found whole, so that they need not be read again.

A file that was altered, copied or put in another's place has another inode or another time of change, which the system
sets and no program can choose. Where a stamp does not fit, or cannot be kept, all is read. It refuses to know checksums.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread

from ..errors import CheckpointError
from ..tensors import guard, parse_json

NAME, LIMIT = "verified.json", 64 << 20
State = tuple[int, int, int, int]
"""Inode, size, and times of the last change of content and of anything, in nanoseconds."""
TICK_S = 0.05
"""More than the step of the clock that files' times are taken from: what was written before it is told from what comes after."""


async def settled(folder: Path, paths: Sequence[str]) -> dict[str, State]:
    """The files' `states`, none younger than a tick, so that whoever writes from now on changes them."""
    found = await anyio.to_thread.run_sync(states, folder, paths)
    if found and time.time_ns() - max(changed for *_, changed in found.values()) < TICK_S * 1e9:
        await anyio.sleep(TICK_S)
        found = await anyio.to_thread.run_sync(states, folder, paths)
    return found


def states(folder: Path, paths: Sequence[str]) -> dict[str, State]:
    """What the system says of each file; one that is not there is left out. Raises `CheckpointError` for a link out of the folder."""
    found: dict[str, State] = {}
    for path in paths:
        guard(folder, path)
        with suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(folder / path)
            found[path] = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return found


def is_stamped(folder: Path, manifest: str, found: Mapping[str, State]) -> bool:
    """Whether the files were found whole, under the manifest with this checksum, in the state that they are in."""
    try:
        guard(folder, NAME)
        with (folder / NAME).open("rb") as file:
            told = parse_json(file.read(LIMIT))
    except (OSError, ValueError, CheckpointError):
        return False
    return told == {"manifest": manifest, "files": {path: list(state) for path, state in found.items()}}


def stamp(folder: Path, manifest: str, found: Mapping[str, State]) -> None:
    """Note that the files were found whole; nothing where the folder cannot be written, for then they are read each time."""
    temporary = folder / f".{NAME}.{secrets.token_hex(8)}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(fd, "w") as file:
            json.dump({"manifest": manifest, "files": found}, file)
        os.replace(temporary, folder / NAME)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
