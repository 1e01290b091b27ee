"""Open files, opened once and kept: how each may be read, and whether it is still the file that was opened.

O_DIRECT where the filesystem has it, else reads that leave nothing in the page cache (RWF_DONTCACHE), else buffered
reads whose pages are dropped afterwards. A file that is written has two descriptors: one for what lines up with the
drive's blocks, and a buffered one for the rest. It refuses to know what is asked of the files.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import DiskError
from .durability import Durability
from .trouble import changed, disk_error

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
    direct: int | None = None
    """A second descriptor, for direct writes, where the filesystem has them."""

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

    def drop_pages(self, offset: int, nbytes: int) -> None:
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
        file.drop_pages(0, 0)  # clean now, and direct reads do not need it

    def forget(self, path: str) -> None:
        """Close what is open of `path`; the next `get` opens it anew. Nothing of it may be in flight."""
        with self._lock:
            found = [self._open.pop((path, writable), None) for writable in (False, True)]
            self._durability.forget(path)
            close_all(file for file in found if file is not None)

    def close(self) -> None:
        """Close all descriptors."""
        with self._lock:
            close_all(self._open.values())
            self._open.clear()

    def _reader(self, path: str) -> OpenFile:
        if (writer := self._open.get((path, True))) is not None and writer.direct is not None:
            return replace(writer, fd=writer.direct, mode="direct")  # one descriptor less
        try:
            fd, mode = open_for_reading(path, self._direct)
        except OSError as error:
            raise disk_error(error, path) from error
        regular(fd, path)
        return OpenFile(path, fd, mode, identity(os.fstat(fd)), writable=writer is not None)

    def _writer(self, path: str) -> OpenFile:
        try:
            fd, created = open_for_writing(path)
            try:
                direct = open_past_cache(path, fd) if self._direct else None
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise disk_error(error, path) from error
        if created:
            self._durability.made(path)
        return OpenFile(path, fd, "buffered", identity(os.fstat(fd)), writable=True, direct=direct)


def close_all(files: Iterable[OpenFile]) -> None:
    """Close what files have open; a reader and a writer may share."""
    for fd in {fd for file in files for fd in (file.fd, file.direct) if fd is not None}:
        os.close(fd)


def regular(fd: int, path: str) -> None:
    """Close a descriptor of a folder, a pipe or a device and raise `DiskError`; have one of a file wait, not refuse."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DiskError(f"{path} is not a regular file")
    os.set_blocking(fd, True)


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


def open_past_cache(path: str, fd: int) -> int | None:
    """A second descriptor of the file that `fd` is of, for direct writes; None where the filesystem has none."""
    if (flag := getattr(os, "O_DIRECT", 0)) == 0:
        return None
    try:
        direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flag)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    if not os.path.samestat(os.fstat(direct), os.fstat(fd)):
        os.close(direct)
        raise changed(path)
    os.set_blocking(direct, True)
    return direct


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a file is replaced or altered: device, inode, size, time of last change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
