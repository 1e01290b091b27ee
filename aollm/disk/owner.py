"""Whose a file or a folder is: what this user alone can alter is trusted, all else is refused with a `StoreError`.

It looks at what `fstat` says of an open descriptor, so nothing can change in between; it opens and alters nothing.
"""

from __future__ import annotations

import os
import stat

from ..errors import StoreError


def check_folder(status: os.stat_result, path: str) -> None:
    """Refuse a folder in which others can put files."""
    _check_owner(status, path, "700")


def check_file(status: os.stat_result, path: str) -> None:
    """Refuse a file that is none, or that others can alter."""
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{path} is not a regular file; remove it")
    if status.st_nlink > 1:  # none is a file that was replaced after it was opened
        raise StoreError(f"{path} has a second name (a hard link), so others could alter it; remove one of them")
    _check_owner(status, path, "600")


def _check_owner(status: os.stat_result, path: str, mode: str) -> None:
    if status.st_uid != os.geteuid():
        raise StoreError(f"{path} belongs to another user (number {status.st_uid}); choose a path of your own")
    if status.st_mode & 0o022:
        raise StoreError(f"{path} can be altered by other users; if its content is yours: chmod {mode} {path}")
