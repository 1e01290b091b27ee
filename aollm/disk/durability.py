"""What is durable: which names still have to be flushed with their files, and which files' flushes have failed.

A failed flush is final. The system may mark lost pages clean, so a second try could succeed without the bytes. It
refuses to know how files are opened.
"""

from __future__ import annotations

import os

from ..errors import DiskError
from .calls import SYSTEM, Calls
from .trouble import disk_error


class Durability:
    """Of the files that one owner has open, by path. Safe from any thread."""

    def __init__(self, calls: Calls = SYSTEM) -> None:
        self._calls = calls
        self._named: set[str] = set()
        self._failed: set[str] = set()

    def made(self, path: str) -> None:
        """A new file is there: what has failed before was another one's."""
        self._failed.discard(path)
        self._named.discard(path)

    def forget(self, path: str) -> None:
        """The file is closed; the next one there may have a new name. A failure is kept, for it may be the same file."""
        self._named.discard(path)

    def check(self, path: str) -> None:
        """Raise `DiskError` if a flush of `path` has failed."""
        if path in self._failed:
            raise DiskError(f"{path}: an earlier sync failed, so what was written since is lost; write it again to another file")

    def sync(self, path: str, fd: int, folder: int | None = None) -> None:
        """Flush a file to the drive; the first time its name too, through its folder's descriptor if there is one."""
        if path in self._named:
            self.flush(path, fd, data_only=True)
            return
        self.flush(path, fd)
        above = os.path.dirname(path)
        if folder is not None:
            self.flush(above, folder)
        else:
            self.check(above)
            try:
                sync_folder(above, self._calls)
            except OSError as error:
                self._failed.add(above)
                raise disk_error(error, above) from error
        self._named.add(path)

    def flush(self, path: str, fd: int, data_only: bool = False) -> None:
        """Flush one descriptor to the drive; what fails counts against `path`."""
        self.check(path)
        try:
            (self._calls.fdatasync if data_only else self._calls.fsync)(fd)
        except OSError as error:
            self._failed.add(path)
            raise disk_error(error, path) from error


def sync_folder(path: str, calls: Calls = SYSTEM) -> None:
    """Make the names in a folder durable; raises `OSError`."""
    fd = calls.open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        calls.fsync(fd)
    finally:
        calls.close(fd)
