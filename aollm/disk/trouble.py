"""The system's errors in our own words: what happened to which file, and what to do.

It refuses to raise anything: callers do.
"""

from __future__ import annotations

import errno

from ..errors import AollmError, DiskError, StoreError


def disk_error(error: OSError, path: str, offset: int | None = None) -> DiskError:
    """A foreign error in our own words."""
    place = path if offset is None else f"{path} at byte {offset}"
    hint = {
        errno.ENOSPC: "; free some space",
        errno.EDQUOT: "; free some space",
        errno.EMFILE: "; raise the limit on open files (ulimit -n)",
        errno.ENFILE: "; raise the system's limit on open files (fs.file-max)",
        errno.ENOENT: "; check the path",
    }
    return DiskError(f"{place}: {error.strerror or error}{hint.get(error.errno or 0, '')}")


def changed(path: str) -> DiskError:
    """The error for a file that is not what it was when it was opened."""
    return DiskError(f"{path} changed while it was in use; close the runtime and open it again on the finished file")


def truncated(path: str, end: int, missing: int) -> DiskError:
    """The error for a file that ends before a read does."""
    return DiskError(f"{path} ends at byte {end}, {missing} bytes short: it is truncated")


def nothing_written(path: str, offset: int) -> DiskError:
    """The error for a write that moved no byte and gave no reason."""
    return DiskError(f"{path} at byte {offset}: the system wrote nothing; free some space and try again")


def folder_error(error: OSError, path: str) -> AollmError:
    """A foreign error in our own words: `DiskError` where the drive or the system is at its end, else `StoreError`."""
    if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
        return disk_error(error, path)
    hint = {
        errno.EACCES: "have its folder belong to you (chmod 700), or choose another",
        errno.EPERM: "have its folder belong to you (chmod 700), or choose another",
        errno.EROFS: "make the filesystem writable, or choose another folder",
        errno.ELOOP: "it is a symbolic link: remove it",
        errno.ENOENT: "it is missing: check the path",
    }.get(error.errno or 0, "remove it, or choose another folder")
    return StoreError(f"{path}: {error.strerror or error}; {hint}")
