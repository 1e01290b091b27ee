"""The blocking calls on small files and folders, in one place, so that a test can count them, fail each, or crash at each.

Thin: every method is one call of the system's, or one until all bytes have moved. It refuses to know what the files are
for, what is tried again, and what an error means: it raises `OSError`. Interrupted calls are repeated by Python itself.
"""

from __future__ import annotations

import fcntl
import os
import sys
from typing import Final

Bytes = bytes | bytearray | memoryview


class Calls:
    """Names are relative to the descriptor `folder` where one is given."""

    def open(self, name: str, flags: int, mode: int = 0o600, folder: int | None = None) -> int:
        """A descriptor that programs started from here do not get."""
        return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=folder)

    def close(self, fd: int) -> None:
        """Give a descriptor back."""
        os.close(fd)

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        """`nbytes` from `offset`, fewer only where the file ends."""
        parts: list[bytes] = []
        while nbytes and (part := os.pread(fd, nbytes, offset)):
            parts.append(part)
            nbytes, offset = nbytes - len(part), offset + len(part)
        return b"".join(parts)

    def pwrite(self, fd: int, data: Bytes, offset: int) -> None:
        """All of `data` at `offset`."""
        rest = memoryview(data).cast("B")
        while rest:
            if (count := os.pwrite(fd, rest, offset)) <= 0:
                raise OSError(0, "the system wrote nothing and gave no reason")
            rest, offset = rest[count:], offset + count

    def fsync(self, fd: int) -> None:
        """Have the bytes of a file or the names of a folder survive a power cut."""
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        """Have the bytes of a file survive a power cut; its times may not."""
        os.fdatasync(fd) if sys.platform == "linux" else os.fsync(fd)

    def ftruncate(self, fd: int, nbytes: int) -> None:
        """Cut or grow a file to `nbytes`."""
        os.ftruncate(fd, nbytes)

    def fstat(self, fd: int) -> os.stat_result:
        """What kind of file it is, whose, and how large."""
        return os.fstat(fd)

    def rename(self, old: str, new: str, folder: int | None = None) -> None:
        """Call a file of a folder `new`, in place of the one that was called so."""
        os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)

    def unlink(self, name: str, folder: int | None = None) -> None:
        """Remove a file."""
        os.unlink(name, dir_fd=folder)

    def mkdir(self, name: str, folder: int | None = None) -> None:
        """Make a folder that only this user can enter."""
        os.mkdir(name, 0o700, dir_fd=folder)

    def rmdir(self, name: str, folder: int | None = None) -> None:
        """Remove an empty folder."""
        os.rmdir(name, dir_fd=folder)

    def listdir(self, fd: int) -> list[str]:
        """The names in a folder."""
        return os.listdir(fd)

    def flock(self, fd: int) -> None:
        """Take a file for this process alone; `BlockingIOError` when another has it."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def funlock(self, fd: int) -> None:
        """Let others take it, even where a forked child still has the descriptor."""
        fcntl.flock(fd, fcntl.LOCK_UN)


SYSTEM: Final = Calls()
"""The system itself. It has no state."""
