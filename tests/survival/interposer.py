"""Between this process and the system: every operation on files below a folder is counted, told of, and may end badly.

It replaces functions of `os`, so it sees what really happens, whoever asks; for a child that nobody else uses. A plan says
what becomes of each operation. It refuses to know what the files mean.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

DIED = 9
WRITES = ("pwrite", "pwritev")
READS = ("pread", "preadv")
SYNCS = ("fsync", "fdatasync")


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of the system's: its number from 1, its name, the path it is about (and the new one of a rename)."""

    number: int
    name: str
    path: str
    target: str = ""
    offset: int = 0
    data: bytes = b""
    makes: bool = False
    """Whether it may make a file."""


class Plan(Protocol):
    """What becomes of operations. Calls come one at a time."""

    real_syncs: bool

    def before(self, operation: Operation) -> int | None:
        """Raise `OSError`, end the process, or say how many bytes are moved at most."""
        ...

    def after(self, operation: Operation, done: bool) -> None:
        """It is over; `done` unless it failed."""
        ...


class Interposer:
    """`with Interposer(folder, plan):` operations below `folder` go by `plan`; `count` is how many there were."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.count = 0
        self._root, self._plan = str(root), plan
        self._paths: dict[int, str] = {}
        self._lock = threading.Lock()
        self._real: list[tuple[Any, str, Callable[..., Any]]] = []

    def __enter__(self) -> Interposer:
        for name in ("open", "close", "mkdir", "rmdir", "unlink", "rename", "listdir", "ftruncate", *READS, *WRITES, *SYNCS):
            self._replace(os, name)
        self._replace(fcntl, "flock")
        return self

    def __exit__(self, *raised: object) -> None:
        for module, name, real in self._real:
            setattr(module, name, real)

    def _replace(self, module: Any, name: str) -> None:
        real = getattr(module, name)
        self._real.append((module, name, real))
        own = getattr(self, f"_{name}", None)
        setattr(module, name, (lambda *args, **more: own(real, *args, **more)) if own else self._on_descriptor(name, real))

    def _on_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: Any, *args: Any, **more: Any) -> Any:
            path = self._paths.get(fd) if isinstance(fd, int) else None
            if path is None:
                return real(fd, *args, **more)
            if name in SYNCS and not self._plan.real_syncs:
                return self._step(name, path, lambda most: None)
            if name == "ftruncate":
                return self._step(name, path, lambda most: real(fd, *args), offset=args[0])
            if name == "pread":
                return self._step(name, path, lambda most: real(fd, args[0] if most is None else min(most, args[0]), args[1]))
            if name == "preadv":
                return self._step(name, path, lambda most: real(fd, cut(args[0], most), *args[1:]))
            if name == "pwrite":
                data = bytes(args[0])
                return self._step(name, path, lambda most: real(fd, data[:most], args[1]), offset=args[1], data=data)
            if name == "pwritev":
                data = b"".join(args[0])
                return self._step(name, path, lambda most: real(fd, cut(args[0], most), *args[1:]), offset=args[1], data=data)
            return self._step(name, path, lambda most: real(fd, *args, **more))

        return call

    def _step(self, name: str, path: str, act: Callable[[int | None], Any], **more: Any) -> Any:
        with self._lock:
            self.count += 1
            operation = Operation(self.count, name, path, **more)
            most = self._plan.before(operation)
            done = False
            try:
                result = act(most)
                done = True
                return result
            finally:
                self._plan.after(operation, done)

    def _at(self, name: Any, folder: int | None) -> str | None:
        path = os.path.join(self._paths.get(folder, "?"), name) if folder is not None else os.path.abspath(name)
        return path if path.startswith(self._root) else None

    def _open(self, real: Any, name: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not isinstance(name, str) or (path := self._at(name, dir_fd)) is None:
            return int(real(name, flags, mode, dir_fd=dir_fd))

        def act(most: int | None) -> int:
            fd = int(real(name, flags, mode, dir_fd=dir_fd))
            self._paths[fd] = path
            return fd

        new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        return int(self._step("open", path, act, makes=new))

    def _close(self, real: Any, fd: int) -> None:
        self._paths.pop(fd, None)
        real(fd)

    def _mkdir(self, real: Any, name: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._named("mkdir", name, dir_fd, lambda: real(name, mode, dir_fd=dir_fd))

    def _rmdir(self, real: Any, name: Any, *, dir_fd: int | None = None) -> None:
        self._named("rmdir", name, dir_fd, lambda: real(name, dir_fd=dir_fd))

    def _unlink(self, real: Any, name: Any, *, dir_fd: int | None = None) -> None:
        self._named("unlink", name, dir_fd, lambda: real(name, dir_fd=dir_fd))

    def _rename(self, real: Any, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        path, target = self._at(old, src_dir_fd), self._at(new, dst_dir_fd)
        assert path is not None and target is not None
        self._step("rename", path, lambda most: real(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd), target=target)

    def _named(self, name: str, file: Any, folder: int | None, real: Callable[[], Any]) -> None:
        if (path := self._at(file, folder)) is None:
            real()
        else:
            self._step(name, path, lambda most: real())


def cut(parts: Sequence[Any], most: int | None) -> list[memoryview]:
    """The first `most` bytes of several buffers."""
    views = [memoryview(part).cast("B") for part in parts]
    if most is None:
        return views
    kept: list[memoryview] = []
    for view in views:
        if most > 0:
            kept.append(view[:most])
        most -= view.nbytes
    return kept


class Crash:
    """The process ends at operation `at`: before it, after it, or with half of what it writes."""

    real_syncs = False

    def __init__(self, at: int, mode: str) -> None:
        self._at, self._mode = at, mode

    def before(self, operation: Operation) -> int | None:
        """End, or let half of it through."""
        if operation.number == self._at:
            if self._mode == "before":
                os._exit(DIED)
            if self._mode == "torn":
                return half(len(operation.data)) if operation.name in WRITES else None
        return None

    def after(self, operation: Operation, done: bool) -> None:
        """End."""
        if operation.number == self._at:
            os._exit(DIED)


class Fail:
    """Operation `at`, and with `sticky` all later ones of the kinds that meet such an error, fail with `number`."""

    real_syncs = False

    def __init__(self, at: int, number: int, sticky: bool) -> None:
        self.failed = 0
        self._at, self._errno, self._sticky = at, number, sticky
        self._kind = ""

    def before(self, operation: Operation) -> int | None:
        """Fail."""
        if operation.number >= self._at and plausible(operation, self._errno) and (self._sticky or not self.failed):
            self.failed += 1
            raise OSError(self._errno, os.strerror(self._errno))
        return None

    def after(self, operation: Operation, done: bool) -> None:
        """Nothing."""


class Short:
    """Every read and write moves half of what it could, down to single bytes' worth of a sector."""

    real_syncs = False

    def __init__(self) -> None:
        self.shortened = 0

    def before(self, operation: Operation) -> int | None:
        """Half of it."""
        if operation.name in WRITES:
            self.shortened += 1
            return half(len(operation.data))
        if operation.name in READS:
            self.shortened += 1
            return 4096
        return None

    def after(self, operation: Operation, done: bool) -> None:
        """Nothing."""


class Nothing:
    """All goes well."""

    real_syncs = False

    def before(self, operation: Operation) -> int | None:
        """All of it."""
        return None

    def after(self, operation: Operation, done: bool) -> None:
        """Nothing."""


def half(nbytes: int) -> int:
    """A little more than half, at least a byte; in sectors where there are some."""
    return max(1, nbytes // 2 // 512 * 512 or nbytes // 2)


def plausible(operation: Operation, number: int) -> bool:
    """Whether the system may answer so."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return operation.name in (*WRITES, *SYNCS, "mkdir", "rename") or operation.makes
    if number == errno.EMFILE:
        return operation.name == "open"
    return operation.name != "flock"
