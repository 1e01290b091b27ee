"""A folder for the caches of one measurement, beside those of the user: gone with it, or swept by the next one if it was killed.

A folder in use is locked; the system frees the lock when its owner dies, however it dies.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path
from shutil import rmtree

from ..errors import StoreError

NAME = re.compile(r"bench-[0-9a-f]{16}")


class Scratch:
    """`with Scratch(root) as path`."""

    def __init__(self, root: Path) -> None:
        """Make it in `root`, which is made too, and sweep what nobody uses. Blocking; raises `StoreError`."""
        self.path = root / f"bench-{secrets.token_hex(8)}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            making = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(making, fcntl.LOCK_EX)  # one that is made and not yet locked is not to be swept
                for name in filter(NAME.fullmatch, os.listdir(root)):
                    _sweep(root / name)
                self.path.mkdir(mode=0o700)
                self._lock = _locked(self.path)
            finally:
                os.close(making)
        except OSError as error:
            raise StoreError(f"{root}: no folder for caches can be made there ({error.strerror}); name another cache_dir") from error

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        rmtree(self.path, ignore_errors=True)  # the next one sweeps what is left
        os.close(self._lock)

    def __repr__(self) -> str:
        return f"<Scratch {self.path}>"


def _locked(path: Path) -> int:
    """A descriptor that holds the folder until it is closed; raises `BlockingIOError` if another does."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _sweep(path: Path) -> None:
    try:
        lock = _locked(path)
    except OSError:
        return  # in use, or not ours to remove
    rmtree(path, ignore_errors=True)
    os.close(lock)
