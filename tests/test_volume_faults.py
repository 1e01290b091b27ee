"""A volume whose calls fail, or end, one after the other: what was acknowledged is there afterwards, and it goes on."""

import errno
import os
from pathlib import Path

import pytest
from test_volume import make_chain, manifest, open_volume

from aollm.disk.calls import Calls
from aollm.errors import AollmError


class Failing(Calls):
    """Fails at call `at`; with `crash`, nothing happens any more from then on."""

    def __init__(self, at: int, crash: bool) -> None:
        self.at, self.crash, self.count, self.fds = at, crash, 0, set[int]()

    def _step(self) -> None:
        self.count += 1
        if self.crash and self.count > self.at:
            raise Crash
        if self.count == self.at:
            raise Crash if self.crash else OSError(errno.ENOSPC, "no space")

    def open(self, name: str, flags: int, mode: int = 0o600, folder: int | None = None) -> int:
        self._step()
        self.fds.add(fd := super().open(name, flags, mode, folder))
        return fd

    def close(self, fd: int) -> None:
        self.fds.discard(fd)
        super().close(fd)

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        try:
            self._step()
        except (OSError, Crash):
            super().pwrite(fd, bytes(data)[: len(data) * 2 // 3], offset)  # a part of it arrives
            raise
        super().pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self._step()

    def fdatasync(self, fd: int) -> None:
        self._step()

    def ftruncate(self, fd: int, nbytes: int) -> None:
        self._step()
        super().ftruncate(fd, nbytes)

    def rename(self, old: str, new: str, folder: int | None = None) -> None:
        self._step()
        super().rename(old, new, folder)

    def unlink(self, name: str, folder: int | None = None) -> None:
        self._step()
        super().unlink(name, folder)


class Crash(BaseException):
    pass


@pytest.mark.parametrize("crash", [False, True])
def test_a_failure_at_every_call_loses_only_what_was_not_acknowledged(tmp_path: Path, crash: bool) -> None:
    at, ended = 0, False
    while not ended:
        at += 1
        path = tmp_path / str(at)
        prepared = open_volume(path)
        old = make_chain(prepared, 2)
        prepared.commit(old)
        prepared.close()
        with manifest(prepared).open("ab") as file:
            file.write(b"torn")
        calls = Failing(at, crash)
        known, gone = {node.digest for node in old}, set[bytes]()
        try:
            ended = script(path, calls, known, gone)
        except Crash:
            pass
        for fd in calls.fds:
            os.close(fd)
        again = open_volume(path)
        found = {node.digest for node in again.index.nodes()}
        assert known - gone <= found, at
        assert again.quarantined == 0 and again.lost == 0, at
        again.commit(make_chain(again, 1, seed=9))
        again.close()
        final = open_volume(path)
        assert len(final.index) == len(found) + 1, at
        assert set(os.listdir(final.path)) == {"LOCK", "manifest", "layer-0000.000000.journal", "layer-0001.000000.journal"}
        final.close()
    assert at > 20


def script(path: Path, calls: Calls, known: set[bytes], gone: set[bytes]) -> bool:
    """Work on a volume, going on after errors; adds to `known` what was acknowledged. Whether nothing failed."""
    fine = True
    try:
        volume = open_volume(path, calls)
    except AollmError:
        return False
    nodes = make_chain(volume, 3, seed=4)
    extra = make_chain(volume, 2, seed=6)
    for step in range(6):
        try:
            if step == 0:
                volume.commit(nodes)
                known |= {node.digest for node in nodes}
            elif step == 1:
                gone.add(nodes[2].digest)
                volume.drop(nodes[2:])
            elif step == 2:
                volume.sync()
            elif step == 3:
                for _ in range(70):
                    volume.mark(nodes[:1])
            elif step == 4:
                volume.sync()  # by a swap
            else:
                volume.commit(extra)
                known |= {node.digest for node in extra}
                volume.sync()
        except AollmError:
            fine = False
    try:
        volume.close()
    except AollmError:
        fine = False
    return fine
