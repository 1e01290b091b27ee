"""A volume that is gone with its runtime: a private folder with a lock, and nothing that tells what is in it.

Folders that a killed process left are removed when the next one opens; those in use by others are left alone.
"""

from __future__ import annotations

import itertools
import secrets
from pathlib import Path

from ..disk.calls import SYSTEM, Calls
from ..disk.folder import Folder
from .identity import Identity

PREFIX = "scratch-"


class Scratch:
    """A folder for one runtime's records."""

    def __init__(self, folder: Folder, parent: Folder) -> None:
        self.folder = folder
        self.path = str(folder.path)
        self.identity = Identity({})
        self.generation = secrets.randbits(63)
        self._parent = parent
        self._lock = folder.lock("LOCK")
        self._sequence = itertools.count(1)

    @classmethod
    def open(cls, root: Path, calls: Calls = SYSTEM) -> Scratch:
        """A new folder under `root`, which is made with mode 0700. Blocking; raises `StoreError` where that is not possible."""
        parent = Folder.make(root, calls, "cache_dir")
        for name in parent.names():
            if name.startswith(PREFIX):
                left = parent.child(name)
                if (lock := left.lock("LOCK")) is not None:
                    left.erase()
                    lock.release()
                left.close()
        return cls(parent.child(f"{PREFIX}{secrets.token_hex(8)}"), parent)

    def next_sequence(self) -> int:
        """A number that no other record has."""
        return next(self._sequence)

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        self.folder.erase()
        if self._lock is not None:
            self._lock.release()
        self.folder.close()
        self._parent.close()
