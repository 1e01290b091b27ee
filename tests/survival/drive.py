"""A drive that loses power: from the operations of a run, what could be on it afterwards.

Bytes are there for certain once their file was flushed, names once their folder was. All else may be there or not: file
by file in any order and torn at sectors, names of a folder in the order in which they changed. A flush that fails has
lost what it was to keep, as Linux does it. It refuses to know what the files mean.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .interposer import SYNCS, WRITES, Operation

SECTOR = 512
Fate = Literal["none", "names", "bytes", "some"]
"""What becomes of what is not certain: nothing is there, all names are and no bytes, all bytes and no names, or some of each."""
FATES: tuple[Fate, ...] = ("none", "names", "bytes", "some")


@dataclass(slots=True, eq=False)
class File:
    """The bytes that are certain, and the changes that are not: an offset and bytes, or a size."""

    certain: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def now(self) -> bytearray:
        """All of it."""
        data = bytearray(self.certain)
        for offset, part in self.pending:
            put(data, offset, part)
        return data


@dataclass(slots=True, eq=False)
class Names:
    """A folder: the names that are certain, all names, and the changes between them."""

    certain: dict[str, File | Names] = field(default_factory=dict)
    now: dict[str, File | Names] = field(default_factory=dict)
    pending: list[dict[str, File | Names | None]] = field(default_factory=list)

    def change(self, names: dict[str, File | Names | None]) -> None:
        """Set and remove names in one step."""
        self.pending.append(names)
        apply(self.now, names)


class Drive:
    """What operations on files below `root` leave on a drive."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._top = Names()

    def take(self, operation: Operation, done: bool) -> None:
        """One operation, carried out or failed."""
        folder, name = self._folder(operation.path), os.path.basename(operation.path)
        if operation.name in SYNCS:
            self._flush(self._find(operation.path), done)
        elif not done:
            return
        elif operation.name == "open" and operation.makes:
            folder.change({name: File()})
        elif operation.name == "mkdir":
            folder.change({name: Names()})
        elif operation.name in ("unlink", "rmdir"):
            folder.change({name: None})
        elif operation.name == "rename":
            folder.change({os.path.basename(operation.target): folder.now[name], name: None})
        elif operation.name in (*WRITES, "ftruncate"):
            file = self._find(operation.path)
            assert isinstance(file, File)
            file.pending.append((operation.offset, operation.data if operation.name in WRITES else b""))
            if operation.name == "ftruncate":
                file.pending[-1] = (-1 - operation.offset, b"")

    def write_down(self, root: Path, fate: Fate, draw: random.Random) -> None:
        """Make `root` what could be there if the power went now."""
        self._write_down(self._top, root, fate, draw)

    def _write_down(self, names: Names, path: Path, fate: Fate, draw: random.Random) -> None:
        path.mkdir(mode=0o700)
        there = dict(names.certain)
        kept = {"none": 0, "bytes": 0, "names": len(names.pending), "some": draw.randint(0, len(names.pending))}[fate]
        for change in names.pending[:kept]:
            apply(there, change)
        for name, entry in there.items():
            if isinstance(entry, Names):
                self._write_down(entry, path / name, fate, draw)
                continue
            data = bytearray(entry.certain)
            for offset, part in entry.pending if fate in ("bytes", "some") else ():
                if fate == "bytes" or draw.random() < 0.5:
                    put(data, offset, part)
                elif offset >= 0 and draw.random() < 0.5:
                    put(data, offset, part[: draw.randrange(len(part)) // SECTOR * SECTOR])
            target = os.open(path / name, os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(target, data)
            os.close(target)

    def _flush(self, entry: File | Names, done: bool) -> None:
        if isinstance(entry, File):
            if done:
                entry.certain = entry.now()
            entry.pending.clear()
        elif done:
            entry.certain = dict(entry.now)
            entry.pending.clear()

    def _folder(self, path: str) -> Names:
        found = self._find(os.path.dirname(path)) if path != self._root else None
        return found if isinstance(found, Names) else Names()  # the root's own name is certain, and what was removed is nowhere

    def _find(self, path: str) -> File | Names:
        at: File | Names = self._top
        for part in Path(path).relative_to(self._root).parts:
            at = at.now.get(part, File()) if isinstance(at, Names) else File()  # removed, and still open
        return at


def put(data: bytearray, offset: int, part: bytes) -> None:
    """Bytes at an offset, or (-1 - size) a file's new size."""
    if offset < 0:
        size = -1 - offset
        del data[size:]
        data.extend(bytes(size - len(data)))
        return
    data.extend(bytes(max(offset - len(data), 0)))
    data[offset : offset + len(part)] = part


def apply(names: dict[str, File | Names], change: dict[str, File | Names | None]) -> None:
    """Set and remove names."""
    for name, entry in change.items():
        if entry is None:
            names.pop(name, None)
        else:
            names[name] = entry
