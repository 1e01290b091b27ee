"""A download: the bytes of files of the Hub, resumed where they broke off, checked, and put where huggingface_hub looks for them.

The shelf is laid out and locked as huggingface_hub's cache is, so that either finds what the other has fetched. Its own
downloader drops the unfinished file of a run that was broken off, and here a file may have 50 GB. This module refuses to
know which files a model needs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import ModelError

Progress = Callable[[int, int, str], object]
"""Told bytes that are there, bytes in all, and the name of the file under way; in worker threads, one call at a time."""

CHUNK = 256 << 10
WINDOW = 16 << 30  # of one response: the Hub does not send more than 50 GB of a file at once
PATIENCE = 5  # attempts in a row that bring nothing
BUSY = (408, 425, 429, 500, 502, 503, 504)
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. `digest` is hex: SHA-256, or where it has 40 digits git's SHA-1 of a blob."""

    name: str
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Shelf:
    """The place of one repository: `root/models--org--name`, with `blobs`, `refs` and `snapshots`."""

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        """Where everything of the repository is, but for the locks."""
        return self.root / f"models--{self.name.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        """The folder with the files of one commit."""
        return self.folder / "snapshots" / commit

    def blob(self, file: RemoteFile) -> Path:
        """The bytes of a file that is whole."""
        return self.folder / "blobs" / file.digest

    def partial(self, file: RemoteFile) -> Path:
        """The bytes of a file that is not."""
        return self.folder / "blobs" / f"{file.digest}.incomplete"

    def holds(self, file: RemoteFile, commit: str) -> bool:
        """Whether a file is there, whole: as a blob, or on filesystems without links in the snapshot itself."""
        return any(_nbytes(path) == file.nbytes for path in (self.blob(file), self.snapshot(commit) / file.name))

    def lacks_nbytes(self, file: RemoteFile, commit: str, force: bool) -> int:
        """Bytes that are still to come of a file."""
        return 0 if self.holds(file, commit) and not force else file.nbytes - min(file.nbytes, _nbytes(self.partial(file)) or 0)

    def remember(self, revision: str, commit: str) -> None:
        """Let `revision` mean `commit` when the Hub is not asked."""
        path = self.folder / "refs" / revision
        if _text(path) == commit:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(commit)
        os.replace(temporary, path)

    def recall(self, revision: str) -> str | None:
        """The commit that `revision` meant when it was last downloaded."""
        return revision if self.snapshot(revision).is_dir() else _text(self.folder / "refs" / revision)

    def free_nbytes(self) -> int:
        """Room for more."""
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        return shutil.disk_usage(there).free

    @contextmanager
    def locked(self, file: RemoteFile, stop: threading.Event) -> Iterator[bool]:
        """Hold the file against other processes and threads; False when told to stop while waiting."""
        path = self.root / ".locks" / self.folder.name / f"{file.digest}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as lock:
            yield _wait(lock, stop)


class Tally:
    """What has arrived of `total` bytes, told to `progress`. `add` may be called from any thread."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total = 0, total
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, nbytes: int, name: str) -> None:
        """`nbytes` more of the file `name`; fewer than none when it has to begin again."""
        with self._lock:
            self.done += nbytes
            if self._progress is not None:
                self._progress(self.done, self.total, name)

    def __repr__(self) -> str:
        return f"<Tally {self.done} of {self.total} bytes>"


class Partial:
    """A file that is arriving, and the digest of what is there of it."""

    def __init__(self, out: BinaryIO, file: RemoteFile, tally: Tally, stop: threading.Event) -> None:
        """Go on with what `out` has, if that can be a beginning of `file`; it is read to the end unless `stop` is set."""
        self._out, self._file, self._tally = out, file, tally
        self._begin()
        if out.seek(0, os.SEEK_END) > file.nbytes:
            out.truncate(0)
        out.seek(0)
        while not stop.is_set() and (data := out.read(1 << 20)):
            self._count(data)

    def append(self, data: bytes) -> None:
        """The next bytes. Raises `ModelError` when there are more than there should be."""
        if self.nbytes + len(data) > self._file.nbytes:
            self.restart()
            raise ModelError(f"{self._file.name} is longer than the {self._file.nbytes} bytes that the Hub tells of; try again later")
        self._out.write(data)
        self._count(data)

    def restart(self) -> None:
        """Drop what is there."""
        self._out.seek(0)
        self._out.truncate()
        self._tally.add(-self.nbytes, self._file.name)
        self._begin()

    @property
    def sound(self) -> bool:
        """Whether the file is whole, and what the repository says it is."""
        return self.nbytes == self._file.nbytes and self._sha.hexdigest() == self._file.digest

    def _begin(self) -> None:
        self.nbytes = 0
        git = len(self._file.digest) == 40
        self._sha = hashlib.sha1(b"blob %d\0" % self._file.nbytes, usedforsecurity=False) if git else hashlib.sha256()

    def _count(self, data: bytes) -> None:
        self._sha.update(data)
        self.nbytes += len(data)
        self._tally.add(len(data), self._file.name)

    def __repr__(self) -> str:
        return f"<Partial {self._file.name}, {self.nbytes} of {self._file.nbytes} bytes>"


def download(
    file: RemoteFile, url: str, headers: Mapping[str, str], shelf: Shelf, commit: str, force: bool, stop: threading.Event, tally: Tally
) -> None:  # fmt: skip
    """Have `file` in the snapshot of `commit`, from `url` unless it is there; `force` fetches it in any case.

    Blocks; ends soon after `stop` is set. What has arrived by then, or by an error, is gone on with next time.
    Raises `ModelError` for bytes that are not what was promised, and what httpx2, huggingface_hub and the system raise.
    """
    with shelf.locked(file, stop) as held:
        if not held:
            return
        if shelf.holds(file, commit) and not force:
            tally.add(file.nbytes, file.name)
        elif not _fetch(file, url, headers, shelf, stop, tally):
            return
        _place(shelf.blob(file), shelf.snapshot(commit) / file.name)


def _fetch(file: RemoteFile, url: str, headers: Mapping[str, str], shelf: Shelf, stop: threading.Event, tally: Tally) -> bool:
    """Whether the blob is there now; not if it was told to stop."""
    partial = shelf.partial(file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as out:
        arriving = Partial(out, file, tally, stop)
        resumed = arriving.nbytes > 0
        _receive(arriving, file, url, headers, stop)
        if resumed and arriving.nbytes == file.nbytes and not arriving.sound:  # what was there before was of something else
            arriving.restart()
            _receive(arriving, file, url, headers, stop)
        if arriving.nbytes < file.nbytes:
            return False
        if not arriving.sound:
            arriving.restart()
            raise ModelError(f"{file.name} arrived damaged (its checksum is not {file.digest[:12]}…) and was dropped; download it again")
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, shelf.blob(file))
    return True


def _receive(arriving: Partial, file: RemoteFile, url: str, headers: Mapping[str, str], stop: threading.Event) -> None:
    """Ask for the rest, again when the connection breaks, until it is there or `stop` is set."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    most, failures = arriving.nbytes, 0
    while arriving.nbytes < file.nbytes and not stop.is_set():
        trouble: Exception = httpx2.RemoteProtocolError("the answer ended early")
        try:
            _answer(arriving, file, url, headers, stop)
        except httpx2.TransportError as error:
            trouble = error
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise
            trouble = error
        failures = 0 if arriving.nbytes > most else failures + 1
        most = max(most, arriving.nbytes)
        if failures > PATIENCE:
            raise trouble
        if failures:
            stop.wait(POLL_S * 2**failures)


def _answer(arriving: Partial, file: RemoteFile, url: str, headers: Mapping[str, str], stop: threading.Event) -> None:
    """What one response brings."""
    from huggingface_hub import constants, get_session, hf_raise_for_status

    start, end = arriving.nbytes, min(arriving.nbytes + WINDOW, file.nbytes)
    asked = {**headers, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if start and response.status_code == 200:  # all of it, whatever was asked for
            arriving.restart()
        for data in response.iter_bytes(CHUNK):
            if stop.is_set():
                return
            arriving.append(data)


def _place(blob: Path, path: Path) -> None:
    """Make `path` be `blob`: by a link, or where there are none by moving it."""
    if not blob.exists() or (path.exists() and path.samefile(blob)):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        os.replace(blob, path)
    else:
        os.replace(temporary, path)


def _wait(lock: BinaryIO, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop.wait(POLL_S)
        else:
            return True
    return False


def _nbytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()[:64].strip()
    except (OSError, ValueError):
        return None
