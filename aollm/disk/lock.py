"""A lock between processes: a file that one of them holds. The system frees it when its owner dies, however it dies.

It refuses to know what is protected. Classic record locks are not used: closing any descriptor of the file drops them.
"""

from __future__ import annotations

from .calls import Calls
from .trouble import folder_error


class Lock:
    """A held lock; `Folder.lock` makes it. The file stays when it is released, so that all lock the same one."""

    def __init__(self, path: str, fd: int, calls: Calls) -> None:
        self._path, self._fd, self._calls = path, fd, calls

    def release(self) -> None:
        """Let others have it; a second call changes nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                self._calls.funlock(fd)
            except OSError as error:
                raise folder_error(error, self._path) from error
            finally:
                self._calls.close(fd)

    def __repr__(self) -> str:
        return f"<Lock {self._path}, {'held' if self._fd >= 0 else 'released'}>"
