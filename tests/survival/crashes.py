"""The process ends at every operation: before it, and in the middle of it where it writes. Then the store is opened again.

That the end comes after an operation is the trial before the next one, for what is known then is the same or more. What a
process leaves behind when it ends is what is in the folder at that moment, so most trials look at a copy made then, with no
process ending; every `real`th is a child that calls `_exit`, and shows that it is so.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from . import nursery
from .checking import check
from .interposer import DIED, WRITES, Crash, Interposer, Operation, half
from .load import Emit, script
from .opening import Kind
from .promises import Promises


class Copies:
    """A plan that copies the folder before operations, and once more with half of what they write; all goes on well."""

    real_syncs = False

    def __init__(self, root: Path, folder: Path, first: int, step: int) -> None:
        self.made: list[tuple[Path, str, int]] = []
        """The copies, what they are of, and how many events had been told of."""
        self.events: list[list[Any]] = []
        self.writes: set[int] = set()
        self.operations = 0
        self._root, self._folder, self._first, self._step = root, folder, first, step

    def before(self, operation: Operation) -> int | None:
        """Copy."""
        self.operations = at = operation.number
        if operation.name in WRITES:
            self.writes.add(at)
        if at < self._first or (at - self._first) % self._step or not self._root.exists():
            return None
        self._copy(at, "before")
        if operation.name in WRITES:
            torn = self._copy(at, "torn") / Path(operation.path).relative_to(self._root)
            with torn.open("r+b") as file:
                file.seek(operation.offset)
                file.write(operation.data[: half(len(operation.data))])
        return None

    def after(self, operation: Operation, done: bool) -> None:
        """Nothing."""

    def _copy(self, at: int, mode: str) -> Path:
        target = self._folder / f"{at}-{mode}"
        shutil.copytree(self._root, target)
        self.made.append((target, f"{mode} operation {at}", len(self.events)))
        return target


def crashes(folder: Path, kind: Kind, *, first: int = 1, step: int = 1, real: int = 1) -> dict[str, object]:
    """Trials at operations `first`, `first + step`, ..., to the end of the script; with children where `real` divides their
    number in the row."""
    root = folder / "lived"
    copies = Copies(root, folder, first, step)
    with Interposer(root, copies):
        anyio.run(script, root, kind, copies.events.append)
    shutil.rmtree(root)
    trials, said = 0, list[str]()
    for place, what, count in copies.made:
        promises = Promises(kind.row.windowed)
        promises.hear(copies.events[:count])
        trials += 1
        said += [f"{kind.preset}, {what}: {text}" for text in anyio.run(check, place, kind, promises)]
        shutil.rmtree(place)
    for at in range(first, copies.operations + 1, step * real):
        for mode in ("before", "torn") if at in copies.writes else ("before",):
            root = folder / f"ended-{at}-{mode}"
            code, events = nursery.start(partial(_end, root, kind, at, mode)).end()
            if code == 0:  # the last operations come in an order of their own
                shutil.rmtree(root)
                continue
            promises = Promises(kind.row.windowed)
            promises.hear(events)
            trials += 1
            found = anyio.run(check, root, kind, promises) if code == DIED else [f"ended with {code}: {events[-1:]}"]
            said += [f"{kind.preset}, {mode} operation {at}: {text}" for text in found]
            shutil.rmtree(root, ignore_errors=True)
    return {"trials": trials, "failures": said}


def _end(root: Path, kind: Kind, at: int, mode: str, emit: Emit) -> None:
    with Interposer(root, Crash(at, mode)):
        anyio.run(script, root, kind, emit)
