"""Mistakes that are put in on purpose, one at a time: a suite that does not notice them would notice nothing.

Each is a change to the library in a child process, and the programme that has to find it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aollm.disk.threads
import aollm.stores.manifest
import aollm.stores.record
import aollm.stores.records
import aollm.stores.writer
from aollm.disk.calls import Calls
from aollm.disk.durability import Durability
from aollm.disk.files import Files
from aollm.disk.folder import Folder
from aollm.stores.persistent import Persistent
from aollm.stores.record import Header, unpack
from aollm.stores.records import Records
from aollm.stores.volume import Volume

from . import nursery
from .crashes import crashes
from .damage import log_flips, record_flips
from .failures import failures, shorts
from .kills import kills, together
from .opening import Kind
from .power import broken_flushes, cuts

Programme = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mistake, how it is made, and what has to notice it."""

    name: str
    make: Callable[[], None]
    programme: Programme


def change(owner: Any, name: str, new: Any) -> Callable[[], None]:
    """Replace an attribute."""
    return partial(setattr, owner, name, new)


async def _nothing(*args: Any) -> None:
    return None


def _rename_first(folder: Folder, name: str, data: bytes) -> None:
    with folder._using(name):
        fd = folder._file(f".{name}.new", "", os.O_RDWR | os.O_CREAT)
        folder._calls.rename(f".{name}.new", name, folder._fd)
        folder._calls.pwrite(fd, data, 0)
        folder._calls.fsync(fd)
        folder._calls.close(fd)
        folder._close(name)
        folder._durability.flush(str(folder.path), folder._fd)


def _unchecked(places: Any, buffer: memoryview) -> list[Header]:
    found, at = [], 0
    for place in places:
        found.append(unpack(buffer[at:])[0])
        at += place.extent.nbytes
    return found


def _sums_only(page: Any, payload: Any, wanted: Header) -> Header:
    found, check = unpack(page)
    if aollm.stores.record.payload_sum(payload) != check:
        raise aollm.stores.record.DamageError("checksum")
    return found


async def _compact_in_place(records: Records, lifecycle: Any) -> bool:
    name = records.layout.worn()
    if name is None:
        return False
    file = os.path.join(records.volume.path, name)
    await records._disk.forget(file)
    records.volume.folder.remove(name)  # before what lives in it is written anew
    return False


async def _commit_early(self: Persistent, store: Any, index: int, rows: int, cells: Any) -> None:
    await _commit(self, store, index, rows, cells)
    for cell in cells:
        self._records.free([cell.place])  # its room is taken again, and it is still found


def _flush_again(self: Durability, path: str, fd: int, data_only: bool = False) -> None:
    self._failed.clear()
    _flush(self, path, fd, data_only)


def _only_files(self: Durability, path: str, fd: int, data_only: bool = False) -> None:
    if not os.path.isdir(path):
        _flush(self, path, fd, data_only)


def _one_write(self: Calls, fd: int, data: Any, offset: int) -> None:
    os.pwrite(fd, data, offset)


def _untyped(error: OSError, path: str, offset: int | None = None) -> OSError:
    return error


def _leaky(self: Files, path: str) -> None:
    for writable in (False, True):
        self._open.pop((path, writable), None)


def _untidy(self: Volume, live: Any) -> None:
    return None


_commit, _flush = Persistent._commit, Durability.flush
CHUNKED, PAGED, JOURNAL = Kind("chunked"), Kind("paged"), Kind("log-structured-journal")


def _manifest_sums_off() -> None:
    aollm.stores.manifest.payload_sum = lambda parts: _Anything()  # type: ignore[assignment,attr-defined]


class _Anything(int):
    def __ne__(self, other: object) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return True


ENDED_CHUNKED = partial(crashes, kind=CHUNKED, first=3, step=16, real=99)
ENDED_JOURNAL = partial(crashes, kind=JOURNAL, first=3, step=16, real=99)
ENDED_PAGED = partial(crashes, kind=PAGED, step=2, real=99)
TORN = partial(crashes, kind=CHUNKED, step=5, real=99)
KILLED = partial(kills, kind=JOURNAL, count=160, seed=5)  # ends with the first that is noticed
SHARED = partial(together, kind=CHUNKED, count=16, seed=3)
CUT = partial(cuts, kind=CHUNKED, first=2, step=9, fates=4)
UNFLUSHED = partial(broken_flushes, kind=CHUNKED)
FLIPPED = partial(record_flips, kind=CHUNKED, seed=1, payload=4)
LOG_FLIPPED = partial(log_flips, kind=CHUNKED, seed=1)
FAILED = partial(failures, kind=CHUNKED, everything=True, first=3, step=32)
SHORT = partial(shorts, kind=CHUNKED)

MUTANTS: tuple[Mutant, ...] = (
    Mutant("stored blocks are not flushed", change(Records, "sync", _nothing), CUT),
    Mutant("the manifest is not flushed", change(Folder, "sync", lambda self, name: None), CUT),
    Mutant("names are not flushed", change(Durability, "flush", _only_files), CUT),
    Mutant("renamed first, written afterwards", change(Folder, "swap", _rename_first), CUT),
    Mutant("a failed flush is tried again", change(Durability, "flush", _flush_again), UNFLUSHED),
    Mutant("payloads are not checked", change(aollm.stores.records, "_verified", _unchecked), FLIPPED),
    Mutant("headers are not compared", change(aollm.stores.records, "verify", _sums_only), FLIPPED),
    Mutant("the manifest's sums are not checked", _manifest_sums_off, LOG_FLIPPED),
    Mutant("room is free before it is let go", change(Persistent, "_commit", _commit_early), ENDED_CHUNKED),
    Mutant("compaction removes before it copies", change(aollm.stores.writer, "compact", _compact_in_place), KILLED),
    Mutant("a short write is taken for a whole one", change(Calls, "pwrite", _one_write), SHORT),
    Mutant("locks are not taken", change(Calls, "flock", lambda self, fd: None), SHARED),
    Mutant("the system's errors come through", change(aollm.disk.threads, "disk_error", _untyped), FAILED),
    Mutant("a forgotten file stays open", change(Files, "forget", _leaky), ENDED_JOURNAL),
    Mutant("rubbish is left", change(Volume, "_tidy", _untidy), ENDED_PAGED),
    Mutant("a torn tail is not cut off", change(Folder, "truncate", lambda self, name, nbytes: None), TORN),
)


def caught(folder: Path, mutant: Mutant) -> dict[str, Any]:
    """One mistake, and what noticed it."""

    def work() -> dict[str, Any]:
        mutant.make()
        return mutant.programme(folder)

    try:
        result = nursery.ask(work)
    except RuntimeError as error:  # noticed by everything at once
        result = {"failures": [str(error)[-400:]]}
    said = [] if result["failures"] else [f"nothing noticed that {mutant.name}"]
    return {"trials": 1, "failures": said, "noticed": {mutant.name: result["failures"][:1]}}
