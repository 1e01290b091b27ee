"""The power goes: between any two operations of a script, with what was not flushed there, half there or gone.

Also where a flush failed before. What `flush()` acknowledged has to be there.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from .checking import check
from .drive import FATES, Drive, Fate
from .interposer import SYNCS, Interposer, Operation
from .load import script
from .opening import Kind
from .promises import Promises
from .sequences import Name


class Recorder:
    """Keeps all operations; flush number `broken` fails."""

    real_syncs = False

    def __init__(self, broken: int = 0) -> None:
        self.taken: list[tuple[Operation, bool] | list[Any]] = []
        self.flushes = 0
        self._broken = broken

    def before(self, operation: Operation) -> int | None:
        """Fail the one flush."""
        if operation.name in SYNCS:
            self.flushes += 1
            if self.flushes == self._broken:
                self.taken.append((operation, False))
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return None

    def after(self, operation: Operation, done: bool) -> None:
        """Keep it."""
        self.taken.append((operation, done))


def record(root: Path, kind: Kind, broken: int = 0) -> Recorder:
    """The operations and the promises of a script, in order."""
    recorder = Recorder(broken)
    with Interposer(root, recorder):
        anyio.run(partial(script, root, kind, recorder.taken.append, certain=False))
    shutil.rmtree(root)
    return recorder


def cuts(folder: Path, kind: Kind, first: int = 1, step: int = 1, fates: int = 1) -> dict[str, object]:
    """The power goes before operations `first`, `first + step`, ...: with one of the fates in turn, or `fates` of them."""
    root = folder / f"lived-{first}"
    recorder = record(root, kind)
    drive, promises, trials, said = Drive(root), Promises(kind.row.windowed), 0, list[str]()
    operations = 0
    for entry in [*recorder.taken, None]:
        if isinstance(entry, list):
            promises.hear([entry])
            continue
        operations += 1
        if operations >= first and not (operations - first) % step:
            for turn in range(fates):
                fate = FATES[(operations // step + turn) % len(FATES)]
                trials += 1
                said += [
                    f"{kind.preset}, power at operation {operations}, {fate}: {text}"
                    for text in _lost(drive, root, kind, promises, fate, operations)
                ]
        if entry is not None:
            drive.take(*entry)
    return {"trials": trials, "failures": said}


def broken_flushes(folder: Path, kind: Kind, first: int = 1, step: int = 1) -> dict[str, object]:
    """Each flush of the script fails once, and takes with it what it was to keep; the power goes at the end."""
    trials, said, at = 0, list[str](), first
    while True:
        root = folder / f"broken-{at}"
        recorder = record(root, kind, at)
        if recorder.flushes < at:
            return {"trials": trials, "failures": said}
        failed = later = False
        drive, promises, doubtful = Drive(root), Promises(kind.row.windowed), set[Name]()
        for entry in recorder.taken:
            if isinstance(entry, list):
                promises.hear([entry])
                later = later or (entry[0] == "run" and failed)
                if entry[0] == "kept" and not later:
                    doubtful.discard(tuple(entry[1]))
                continue
            drive.take(*entry)
            failed = failed or (entry[0].name in SYNCS and not entry[1])
            if entry[0].name in SYNCS and not entry[1]:
                # A later process finds in memory what the drive has lost, and has nothing to write: nothing could tell it.
                doubtful = promises.known - promises.kept.keys()
        for name in doubtful:
            promises.kept.pop(name, None)
        trials += 1
        said += [f"{kind.preset}, flush {at} failed: {text}" for text in _lost(drive, root, kind, promises, "none", at)]
        at += step


def _lost(drive: Drive, root: Path, kind: Kind, promises: Promises, fate: Fate, seed: int) -> list[str]:
    """What is wrong with what the drive has now."""
    drive.write_down(root, fate, random.Random(seed))
    try:
        return anyio.run(partial(check, root, kind, promises, missing=True))
    finally:
        shutil.rmtree(root)
