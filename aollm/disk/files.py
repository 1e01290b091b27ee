"""Open files, opened once and kept: how each may be read, and whether it is still the file that was opened.

O_DIRECT where the filesystem has it, else reads that leave nothing in the page cache (RWF_DONTCACHE), else buffered
reads whose pages are dropped afterwards.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import DiskError

Mode = Literal["direct", "dontcache", "buffered"]
RWF_DONTCACHE = 0x80


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A descriptor, how it is read, and the file's identity when it was opened."""

    path: str
    fd: int
    mode: Mode
    identity: tuple[int, int, int, int]
    writable: bool = False

    def check(self) -> None:
        """Raise `DiskError` if the file was altered since it was opened (its own writer may alter it)."""
        try:
            now = identity(os.fstat(self.fd))
        except OSError as error:
            raise disk_error(error, self.path) from error
        if not self.writable and now != self.identity:
            raise changed(self.path)

    @property
    def flags(self) -> int:
        """Flags for `os.preadv`."""
        return RWF_DONTCACHE if self.mode == "dontcache" else 0

    def forget(self, offset: int, nbytes: int) -> None:
        """Drop what a buffered read has left in the page cache."""
        if self.mode == "buffered":
            os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


class Files:
    """Descriptors by path and purpose. Safe from any thread."""

    def __init__(self, direct: bool = True) -> None:
        self._direct = direct
        self._open: dict[tuple[str, bool], OpenFile] = {}
        self._durability = Durability()
        self._lock = threading.Lock()

    def has(self, path: str, writable: bool = False) -> bool:
        """Whether `get` would return at once; if not, it opens the file, which may wait for the drive."""
        return (path, writable) in self._open

    def get(self, path: str, writable: bool = False) -> OpenFile:
        """The open file; opens it on first use. A writable one is created with mode 0600."""
        if (found := self._open.get((path, writable))) is not None:
            return found
        with self._lock:
            if (path, writable) not in self._open:
                self._open[path, writable] = self._writer(path) if writable else self._reader(path)
            if writable and (reader := self._open.get((path, False))) is not None:  # from now on it may change
                self._open[path, False] = replace(reader, writable=True)
            return self._open[path, writable]

    def sync(self, path: str) -> None:
        """Make `path` durable, with its name if it is new."""
        file = self.get(path, writable=True)
        self._durability.sync(path, file.fd)
        file.forget(0, 0)  # clean now, and direct reads do not need it

    def close(self) -> None:
        """Close all descriptors."""
        with self._lock:
            for file in self._open.values():
                os.close(file.fd)
            self._open.clear()

    def _reader(self, path: str) -> OpenFile:
        try:
            fd, mode = open_for_reading(path, self._direct)
        except OSError as error:
            raise disk_error(error, path) from error
        regular(fd, path)
        return OpenFile(path, fd, mode, identity(os.fstat(fd)), writable=(path, True) in self._open)

    def _writer(self, path: str) -> OpenFile:
        try:
            fd, created = open_for_writing(path)
        except OSError as error:
            raise disk_error(error, path) from error
        if created:
            self._durability.created.add(path)
        return OpenFile(path, fd, "buffered", identity(os.fstat(fd)), writable=True)


class Durability:
    """Which files are new, so that their names must be made durable too, and which have failed."""

    def __init__(self) -> None:
        self.created: set[str] = set()
        self._failed: set[str] = set()

    def sync(self, path: str, fd: int) -> None:
        """Flush a file to the drive. A failure is final: a second try could succeed without the bytes that were lost."""
        if path in self._failed:
            raise DiskError(f"{path}: an earlier sync failed, so what was written since is lost; write it again to another file")
        try:
            os.fsync(fd)
            if path in self.created:
                sync_folder(os.path.dirname(path))
                self.created.discard(path)
        except OSError as error:
            self._failed.add(path)
            raise disk_error(error, path) from error


def regular(fd: int, path: str) -> None:
    """Close a descriptor of a folder, a pipe or a device and raise `DiskError`; have one of a file wait, not refuse."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DiskError(f"{path} is not a regular file")
    os.set_blocking(fd, True)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable; raises `OSError`."""
    fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_for_reading(path: str, direct: bool = True) -> tuple[int, Mode]:
    """A descriptor and the best way to read it without filling the page cache."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO in place of a file must not block the opener
    if direct:
        try:
            return os.open(path, flags | getattr(os, "O_DIRECT", 0)), "direct"
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    fd = os.open(path, flags)
    try:
        os.preadv(fd, [bytearray(1)], 0, RWF_DONTCACHE)
    except OSError:
        return fd, "buffered"
    return fd, "dontcache"


def open_for_writing(path: str) -> tuple[int, bool]:
    """A buffered descriptor of a regular file, and whether this made the file, with mode 0600. A symbolic link is refused."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd, created = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
    except FileExistsError:
        fd, created = os.open(path, flags), False
    regular(fd, path)
    return fd, created


def disk_error(error: OSError, path: str, offset: int | None = None) -> DiskError:
    """A foreign error in our own words."""
    place = path if offset is None else f"{path} at byte {offset}"
    hint = {
        errno.ENOSPC: "; free some space",
        errno.EMFILE: "; raise the limit on open files (ulimit -n)",
        errno.ENOENT: "; check the path",
    }
    return DiskError(f"{place}: {error.strerror or error}{hint.get(error.errno or 0, '')}")


def changed(path: str) -> DiskError:
    """The error for a file that is not what it was when it was opened."""
    return DiskError(f"{path} changed while it was in use; close the runtime and open it again on the finished file")


def truncated(path: str, end: int, missing: int) -> DiskError:
    """The error for a file that ends before a read does."""
    return DiskError(f"{path} ends at byte {end}, {missing} bytes short: it is truncated")


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a file is replaced or altered: device, inode, size, time of last change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
