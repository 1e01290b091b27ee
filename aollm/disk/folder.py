"""A private folder: small files that one user owns, read and written whole, appended to, or swapped in one step.

It is opened once and all its files by their names in it, so nobody can put another folder or a link in its place.
Blocking, safe from any thread. It refuses to know what the files mean and what to do about an error.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from ..errors import StoreError
from .calls import SYSTEM, Bytes, Calls
from .durability import Durability, sync_folder
from .lock import Lock
from .owner import check_file, check_folder
from .trouble import folder_error

NAME = re.compile(r"[\w.\-]{1,200}", re.ASCII)
SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK
"""No links, and no waiting for whoever is at the other end of a pipe."""


class Folder:
    """`Folder.make` or `Folder.open` makes one. Errors of the drive are `DiskError`, all others `StoreError`.

    folder = Folder.make("/var/cache/aollm/demo")
    folder.swap("manifest", b"...")
    """

    def __init__(self, path: Path, fd: int, calls: Calls, setting: str = "") -> None:
        self.path, self._setting = path, setting
        self._fd, self._calls = fd, calls
        self._durability = Durability(calls)
        self._written: dict[str, int] = {}
        """Descriptors, kept open: the system tells of lost bytes only whoever had the file open."""
        self._locked: set[str] = set()
        self._one_at_a_time = threading.Lock()

    @classmethod
    def make(cls, path: str | Path, calls: Calls = SYSTEM, setting: str = "") -> Self:
        """The folder at `path`; it and its parents are made, for this user alone, where they are missing.

        `setting` is what names it, which errors then advise to change.
        """
        path = Path(os.path.abspath(path))
        with _in_our_words(str(path), setting):
            _make(str(path), calls)
        return cls.open(path, calls, setting)

    @classmethod
    def open(cls, path: str | Path, calls: Calls = SYSTEM, setting: str = "") -> Self:
        """The folder at `path`, which must be there and be this user's own."""
        path = Path(os.path.abspath(path))
        with _in_our_words(str(path), setting):
            return cls(path, _open_own(str(path), None, str(path), calls), calls, setting)

    def child(self, name: str) -> Folder:
        """A folder in this one, made where it is missing."""
        with self._using(name) as path:
            while True:
                try:
                    self._calls.mkdir(name, self._fd)
                except FileExistsError:
                    pass
                else:
                    try:
                        self._durability.flush(str(self.path), self._fd)
                    except BaseException:
                        with suppress(OSError):
                            self._calls.rmdir(name, self._fd)  # found there later, its name would be taken for durable
                        raise
                try:
                    return Folder(Path(path), _open_own(name, self._fd, path, self._calls), self._calls, self._setting)
                except FileNotFoundError:
                    continue  # somebody has removed it meanwhile

    def names(self) -> list[str]:
        """What is in the folder, in order."""
        with self._using():
            return sorted(self._calls.listdir(self._fd))

    def read(self, name: str, most: int) -> bytes | None:
        """The whole file, None if there is none; `StoreError` if it is larger than `most` bytes."""
        with self._using(name) as path:
            try:
                fd = self._file(name, path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            try:
                if (nbytes := self._calls.fstat(fd).st_size) > most:
                    raise StoreError(f"{path} has {nbytes} bytes, more than the {most} that it may have; remove it")
                return self._calls.pread(fd, nbytes, 0)
            finally:
                self._calls.close(fd)

    def append(self, name: str, offset: int, data: Bytes) -> None:
        """Write `data` at `offset`, where the file is known to end; it is made if there is none. Durable only after `sync`."""
        with self._using(name) as path:
            self._calls.pwrite(self._writer(name, path, os.O_CREAT), data, offset)

    def truncate(self, name: str, nbytes: int) -> None:
        """Cut the file down to `nbytes`."""
        with self._using(name) as path:
            self._calls.ftruncate(self._writer(name, path), nbytes)

    def sync(self, name: str) -> None:
        """Return when the file would survive a power cut. A failure is final: so does every later call."""
        with self._using(name) as path:
            self._durability.check(path)
            self._durability.sync(path, self._writer(name, path), self._fd)

    def sync_names(self) -> None:
        """Return when the names in the folder would survive a power cut."""
        with self._using() as path:
            self._durability.flush(path, self._fd)

    def swap(self, name: str, data: Bytes) -> None:
        """Put `data` in the file's place, durably: whenever the power goes, the old file is there or the new one."""
        with self._using(name) as path:
            self._durability.check(str(self.path))
            temporary = f".{name}.{secrets.token_hex(8)}"
            try:
                self._write_new(temporary, data)
                self._calls.rename(temporary, name, self._fd)
            except BaseException:
                with suppress(OSError):
                    self._calls.unlink(temporary, self._fd)
                raise
            finally:
                self._close(name)  # what is open may be the old file
            self._durability.made(path)
            self._durability.flush(str(self.path), self._fd)

    def remove(self, name: str) -> None:
        """Remove the file, if there is one."""
        with self._using(name):
            self._remove(name)

    def lock(self, name: str) -> Lock | None:
        """Hold the file `name` until `release` or the end of this process; None if somebody else does."""
        with self._using(name) as path:
            try:
                fd = self._file(name, path, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:
                return None  # somebody had it, and removed the folder
            try:
                self._calls.flock(fd)
                held = self._calls.fstat(fd).st_nlink == 1
            except BlockingIOError:
                held = False
            except BaseException:
                self._calls.close(fd)
                raise
            if not held:
                self._calls.close(fd)
                return None
            self._locked.add(name)
            return Lock(path, fd, self._calls)

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove all files but those in `keep`."""
        with self._using():
            for name in sorted(self._calls.listdir(self._fd)):
                if name not in keep:
                    self._remove(name)

    def erase(self) -> None:
        """Remove the folder with its files, those that are locked here last, and close it."""
        with self._using() as path:
            for name in sorted(self._calls.listdir(self._fd), key=lambda name: (name in self._locked, name)):
                self._remove(name)
            try:
                self._calls.rmdir(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):  # taken over, or gone
                    raise
        self.close()

    def close(self) -> None:
        """Give descriptors back; locks stay held. A second call changes nothing."""
        with self._one_at_a_time:
            for name in list(self._written):
                self._close(name)
            if self._fd >= 0:
                self._calls.close(self._fd)
                self._fd = -1

    def __repr__(self) -> str:
        return f"<Folder {self.path}{', closed' if self._fd < 0 else ''}>"

    @contextmanager
    def _using(self, name: str | None = None) -> Iterator[str]:
        """The path of the file `name`, while nobody else uses the folder."""
        if name is not None and (NAME.fullmatch(name) is None or name in (".", "..")):
            raise StoreError(f"{name!r} cannot be a file in {self.path}; names are 1 to 200 letters, digits, dots, hyphens, underscores")
        path = str(self.path) if name is None else os.path.join(self.path, name)
        with self._one_at_a_time, _in_our_words(path, self._setting):
            if self._fd < 0:
                raise StoreError(f"{self.path} is closed; open it again")
            yield path

    def _file(self, name: str, path: str, flags: int) -> int:
        """A descriptor of a file that nobody else could have put there; raises `OSError` if there is none."""
        fd = self._calls.open(name, flags | SAFELY, 0o600, self._fd)
        try:
            check_file(self._calls.fstat(fd), path)
        except BaseException:
            self._calls.close(fd)
            raise
        return fd

    def _writer(self, name: str, path: str, flags: int = 0) -> int:
        if name not in self._written:
            try:
                self._written[name] = self._file(name, path, os.O_RDWR)
            except FileNotFoundError:
                if not flags:
                    raise
                self._written[name] = self._file(name, path, os.O_RDWR | os.O_EXCL | flags)
                self._durability.made(path)
        return self._written[name]

    def _write_new(self, name: str, data: Bytes) -> None:
        path = os.path.join(self.path, name)
        fd = self._file(name, path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self._calls.pwrite(fd, data, 0)
            self._durability.flush(path, fd)
        finally:
            self._calls.close(fd)

    def _remove(self, name: str) -> None:
        self._close(name)
        self._durability.forget(os.path.join(self.path, name))
        try:
            self._calls.unlink(name, self._fd)
        except FileNotFoundError:
            pass

    def _close(self, name: str) -> None:
        if (fd := self._written.pop(name, None)) is not None:
            self._calls.close(fd)


def _make(path: str, calls: Calls, has_parent: bool = False) -> None:
    try:
        calls.mkdir(path)
    except FileExistsError:
        return
    except FileNotFoundError:
        if has_parent:  # some filesystems, such as /proc, say so of all that cannot be made
            raise
        _make(os.path.dirname(path), calls)
        _make(path, calls, has_parent=True)
        return
    try:
        sync_folder(os.path.dirname(path), calls)
    except OSError:
        with suppress(OSError):
            calls.rmdir(path)  # found there later, its name would be taken for durable
        raise


def _open_own(name: str, folder: int | None, path: str, calls: Calls) -> int:
    try:
        fd = calls.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, folder=folder)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise StoreError(f"{path} is a symbolic link or not a folder; name a real folder, or remove what is there") from error
        raise
    try:
        check_folder(calls.fstat(fd), path)
    except BaseException:
        calls.close(fd)
        raise
    return fd


@contextmanager
def _in_our_words(path: str, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise folder_error(error, path, setting) from error
