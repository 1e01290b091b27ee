"""One append-only journal per layer, compacted when half of it is dead: appending costs what it appends.

A layer's journal is a row of files, its generations; only the last one is written. When a file is worn the next
generation begins, and the caller writes what still lives anew. It refuses to know what an entry holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..disk.base import ALIGNMENT, Extent
from ..errors import StoreError

JOURNAL = re.compile(r"layer-(\d{4,}|none)\.(\d{6,})\.journal")


@dataclass(slots=True)
class Journal:
    """One file: its `end`, the entries known to have been written, and the `live` ones."""

    end: int = 0
    entries: int = 0
    nbytes: int = 0
    largest: int = 0
    live: set[Extent] = field(default_factory=set)
    returned: bool = False
    """Whether it is being compacted."""

    def add(self, extent: Extent) -> None:
        """One entry more."""
        self.live.add(extent)
        self.end = max(self.end, extent.end)
        self.entries += 1
        self.nbytes += extent.nbytes
        self.largest = max(self.largest, extent.nbytes)

    def worn(self, threshold: int) -> bool:
        """Whether it has `threshold` entries, half of them dead. Entries that died in an earlier run are holes, counted as
        though all were as large as the largest that is known."""
        entries = self.entries + (self.end - self.nbytes) // self.largest
        return entries >= threshold and 2 * len(self.live) <= entries


class JournalLayout:
    """Files `layer-0003.000000.journal`: of a layer, by generation. `threshold`: the `compaction_entry_threshold`."""

    name = "log-structured-journal"

    def __init__(self, threshold: int = 64) -> None:
        if threshold < 1:
            raise ValueError(f"threshold is {threshold}, not at least 1")
        self.nbytes = 0
        self._threshold = threshold
        self._files: dict[tuple[int, int], Journal] = {}  # by layer and generation; those in which something lives
        self._current: dict[int, int] = {}  # the generation that is written, by layer

    def place(self, store: int, layer: int, index: int, nbytes: int) -> Extent:
        """Room at the end of the layer's journal."""
        if nbytes <= 0 or nbytes % ALIGNMENT:
            raise ValueError(f"a record of {nbytes} bytes is not whole pages of {ALIGNMENT}")
        key = max(layer, -1), self._current.setdefault(max(layer, -1), 0)
        journal = self._files.setdefault(key, Journal())
        extent = Extent(file_name(*key), journal.end, nbytes)
        journal.add(extent)
        self.nbytes += nbytes
        return extent

    def restore(self, extent: Extent) -> None:
        """`extent` is in use since an earlier run; the highest generation of a layer is the one that goes on."""
        key = parsed(extent.file)
        if key is None or extent in self._files.get(key, Journal()).live:
            raise StoreError(f"{extent} is no place in a store of journals, or is named twice; purge this store")
        self._files.setdefault(key, Journal()).add(extent)
        self._current[key[0]] = max(key[1], self._current.get(key[0], 0))
        self.nbytes += extent.nbytes

    def drop(self, extent: Extent) -> list[str]:
        """Returns its file if nothing lives in it; the layer's next generation begins if it was the last."""
        key = parsed(extent.file)
        journal = self._files.get(key) if key is not None else None
        if key is None or journal is None or extent not in journal.live:
            raise ValueError(f"{extent} is not in use")
        journal.live.remove(extent)
        self.nbytes -= extent.nbytes
        if journal.live:
            return []
        del self._files[key]
        self._current[key[0]] = max(key[1] + 1, self._current[key[0]])
        return [extent.file]

    def worn(self) -> str | None:
        """The next file to compact, lowest layer first: one whose compaction an earlier run did not finish, or one that is
        half dead. It is returned once; what is placed from now on goes to the layer's next generation."""
        for key in sorted(self._files):
            journal, current = self._files[key], self._current[key[0]]
            if not journal.returned and (key[1] < current or journal.worn(self._threshold)):
                journal.returned = True
                self._current[key[0]] = max(key[1] + 1, current)
                return file_name(*key)
        return None

    def __repr__(self) -> str:
        return f"<JournalLayout {self.nbytes} bytes in {len(self._files)} journals>"


def file_name(layer: int, generation: int) -> str:
    """The file of a layer's generation; layer -1 is no layer."""
    return f"layer-{layer:04}.{generation:06}.journal" if layer >= 0 else f"layer-none.{generation:06}.journal"


def parsed(file: str) -> tuple[int, int] | None:
    """The layer and generation that a file's name tells, or None."""
    match = JOURNAL.fullmatch(file)
    return match and (-1 if match[1] == "none" else int(match[1]), int(match[2]))
