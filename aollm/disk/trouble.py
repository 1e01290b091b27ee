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


def folder_error(error: OSError, path: str, setting: str = "") -> AollmError:
    """A foreign error in our own words: `DiskError` where the drive or the system is at its end, else `StoreError`.

    `setting` is what names the folder, if anything does.
    """
    if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
        return disk_error(error, path)
    other = f"choose another {setting or 'folder'}"
    hint = {
        errno.EACCES: f"have its folder belong to you (chmod 700), or {other}",
        errno.EPERM: f"have its folder belong to you (chmod 700), or {other}",
        errno.EROFS: f"make the filesystem writable, or {other}",
        errno.ELOOP: "it is a symbolic link: remove it",
        errno.ENOENT: f"it is missing or cannot be made: {other}" if setting else "it is missing: check the path",
    }.get(error.errno or 0, f"remove it, or {other}")
    return StoreError(f"{path}: {error.strerror or error}; {hint}")
