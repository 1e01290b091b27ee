"""A folder keeps its files to itself, and a swapped file is the old one or the new one, whichever call fails."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aollm.disk.calls import Calls
from aollm.disk.folder import Folder
from aollm.errors import AollmError, DiskError, StoreError


class Failing(Calls):
    """Call number `at` (and all later ones, if `sticky`) raises `number` instead of doing its work, or after it."""

    def __init__(self, number: int = errno.EIO, at: int = 0, after: bool = False, sticky: bool = False, only: str = "") -> None:
        self.number, self.at, self.after, self.sticky, self.only = number, at, after, sticky, only
        self.made: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or name == "close" or not callable(found):  # what fails to close is closed all the same
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            if self.only not in ("", name):
                return found(*arguments, **named)
            self.made.append(name)
            count = len(self.made)
            if not (count == self.at or (self.sticky and self.at and count > self.at)):
                return found(*arguments, **named)
            if self.after:
                result = found(*arguments, **named)
                if name == "open":
                    os.close(result)
            raise OSError(self.number, os.strerror(self.number))

        return call


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder.make(tmp_path / "cache")
    yield folder
    folder.close()


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")} <= before


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- the folder itself


def test_missing_folders_are_made_for_this_user_alone(tmp_path: Path) -> None:
    before = mode(tmp_path)
    folder = Folder.make(str(tmp_path / "a" / "b" / "c") + "/")
    assert folder.path == tmp_path / "a" / "b" / "c" and repr(folder) == f"<Folder {folder.path}>"
    assert [mode(path) for path in (folder.path, folder.path.parent, tmp_path / "a")] == [0o700] * 3 and mode(tmp_path) == before
    folder.close()
    Folder.make(tmp_path / "a").close()
    Folder.open(tmp_path / "a").close()


def test_a_child_is_a_folder_too(folder: Folder) -> None:
    for _ in range(2):
        child = folder.child("layer.0")
        child.swap("x", b"1")
        assert child.path == folder.path / "layer.0" and mode(child.path) == 0o700
        child.close()
    (folder.path / "link").symlink_to(child.path)
    with pytest.raises(StoreError, match="symbolic link"):
        folder.child("link")
    child.path.chmod(0o770)
    with pytest.raises(StoreError, match="chmod 700"):
        folder.child("layer.0")


@pytest.mark.parametrize("open_it", [Folder.make, Folder.open])
def test_a_folder_that_is_not_private_is_refused(open_it: Callable[[Path], Folder], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(StoreError, match=f"{name} is a symbolic link or not a folder; name a real folder"):
            open_it(tmp_path / name)
    for bits in (0o720, 0o702, 0o777):
        (tmp_path / "real").chmod(bits)
        with pytest.raises(StoreError, match=r"can be altered by other users.*chmod 700"):
            open_it(tmp_path / "real")
    (tmp_path / "real").chmod(0o755)
    open_it(tmp_path / "real").close()


def test_a_missing_folder_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere.*check the path"):
        Folder.open(tmp_path / "nowhere")


@pytest.mark.needs_root
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(0o700)
    os.chown(tmp_path / "theirs", 12345, -1)
    with pytest.raises(StoreError, match="another user"):
        Folder.make(tmp_path / "theirs")
    os.chown(tmp_path / "theirs", 0, -1)
    folder = Folder.open(tmp_path / "theirs")
    folder.swap("a", b"1")
    os.chown(tmp_path / "theirs" / "a", 12345, -1)
    with pytest.raises(StoreError, match="another user"):
        folder.read("a", 10)
    folder.close()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_cannot_be_written(number: int, folder: Folder) -> None:
    folder.swap("a", b"1")
    readonly = Folder.make(folder.path, Refusing(number), "cache_dir")
    assert readonly.read("a", 10) == b"1" and readonly.names() == ["a"]
    attempts: list[Callable[[], object]] = [
        lambda: readonly.append("a", 1, b"2"),
        lambda: readonly.append("b", 0, b"2"),
        lambda: readonly.swap("a", b"2"),
        lambda: readonly.lock("LOCK"),
        lambda: readonly.child("inner"),
        lambda: Folder.make(folder.path / "inner", Refusing(number), "cache_dir"),
    ]
    for attempt in attempts:
        with pytest.raises(StoreError, match=r"or choose another cache_dir$"):
            attempt()
    readonly.close()


class Refusing(Calls):
    """A folder without the right to write."""

    def __init__(self, number: int) -> None:
        self.number = number

    def open(self, name: str, flags: int, mode: int = 0o600, folder: int | None = None) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(self.number, os.strerror(self.number))
        return super().open(name, flags, mode, folder)

    def mkdir(self, name: str, folder: int | None = None) -> None:
        if folder is None and os.path.exists(name):
            raise FileExistsError(name)
        raise OSError(self.number, os.strerror(self.number))


def test_a_closed_folder_refuses(folder: Folder) -> None:
    folder.append("a", 0, b"1")
    folder.close()
    folder.close()
    with pytest.raises(StoreError, match="closed"):
        folder.read("a", 10)
    assert "closed" in repr(folder)


# ---- its files


def test_files_are_read_appended_cut_and_removed(folder: Folder) -> None:
    assert folder.read("log", 10) is None and folder.names() == []
    folder.append("log", 0, b"0123")
    folder.append("log", 4, memoryview(bytearray(b"456")))
    folder.sync("log")
    folder.append("log", 7, b"x")
    folder.sync("log")
    assert folder.read("log", 8) == b"0123456x" and mode(folder.path / "log") == 0o600
    with pytest.raises(StoreError, match="log has 8 bytes, more than the 7"):
        folder.read("log", 7)
    folder.truncate("log", 3)
    assert folder.read("log", 8) == b"012" and folder.names() == ["log"]
    folder.remove("log")
    folder.remove("log")
    assert folder.names() == []
    folder.append("log", 0, b"")
    assert folder.read("log", 8) == b""  # made anew, not the one that was removed
    folder.sync_names()


def test_a_missing_file_is_neither_cut_nor_synced(folder: Folder) -> None:
    for attempt in (lambda: folder.truncate("a", 0), lambda: folder.sync("a")):
        with pytest.raises(StoreError, match="missing"):
            attempt()
    assert folder.names() == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/etc", "a b", "ä", "a\n", "a\0", "x" * 201])
def test_other_names_are_refused(name: str, folder: Folder) -> None:
    for attempt in (folder.child, folder.remove, folder.lock, folder.sync):
        with pytest.raises(StoreError, match="cannot be a file"):
            attempt(name)
    assert folder.names() == []


def test_what_is_not_an_own_file_is_refused(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    (folder.path / "link").symlink_to(tmp_path / "outside")
    os.link(tmp_path / "outside", folder.path / "second")
    os.mkfifo(folder.path / "pipe", 0o600)
    (folder.path / "sub").mkdir()
    (folder.path / "open").touch()
    (folder.path / "open").chmod(0o620)
    for name in ("link", "second", "pipe", "sub", "open"):
        for attempt in (lambda: folder.read(name, 10), lambda: folder.append(name, 0, b"x"), lambda: folder.lock(name)):  # noqa: B023
            with pytest.raises(StoreError, match=name):
                attempt()
    assert (tmp_path / "outside").read_bytes() == b"secret"
    folder.swap("link", b"mine")  # the link goes, not what it points to
    folder.swap("second", b"mine")
    assert folder.read("link", 10) == folder.read("second", 10) == b"mine"
    assert (tmp_path / "outside").read_bytes() == b"secret"


def test_clear_keeps_what_it_is_told_to(folder: Folder) -> None:
    for name in ("a", "b", ".c.12"):
        folder.append(name, 0, b"x")
    folder.clear(keep=("b",))
    assert folder.names() == ["b"]
    folder.clear()
    assert folder.names() == []


def test_erase_removes_the_folder(folder: Folder) -> None:
    child = folder.child("volume")
    lock = child.lock("LOCK")
    child.append("a", 0, b"x")
    late = Folder.open(child.path)
    child.erase()
    child.close()
    assert lock is not None and folder.names() == []
    assert late.lock("LOCK") is None  # whoever comes late does not get a folder that is gone
    late.close()
    lock.release()


def test_erase_leaves_other_folders_alone(folder: Folder) -> None:
    folder.child("sub").close()
    with pytest.raises(StoreError, match=str(folder.path)):
        folder.erase()
    assert folder.path.is_dir()


def test_many_threads(folder: Folder) -> None:
    def work(number: int) -> None:
        for i in range(20):
            folder.append("log", 100 * number + i, bytes([number]))
            folder.swap("manifest", bytes([number]) * 1000)
            assert len(set(folder.read("manifest", 1000) or b"")) == 1
            assert "log" in folder.names()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = folder.read("log", 1000)
    assert log is not None and [log[100 * i : 100 * i + 20] for i in range(1, 5)] == [bytes([i]) * 20 for i in range(1, 5)]
    assert folder.names() == ["log", "manifest"]


# ---- when calls fail


SWAP_CALLS = ["open", "fstat", "pwrite", "fsync", "rename", "fsync"]


def test_the_order_of_a_swap(folder: Folder) -> None:
    folder.swap("manifest", b"old")
    calls = Failing()
    other = Folder.open(folder.path, calls)
    calls.made.clear()
    other.swap("manifest", b"new")
    other.close()
    assert calls.made == SWAP_CALLS


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, len(SWAP_CALLS) + 1))
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_swap_that_fails_leaves_the_old_file_or_the_new_one(number: int, at: int, after: bool, folder: Folder) -> None:
    calls = Failing(number)
    other = Folder.open(folder.path, calls)
    other.swap("manifest", b"old" * 1000)
    other.append("manifest", 3000, b"!")
    calls.at, calls.after = len(calls.made) + at, after
    with pytest.raises(AollmError) as raised:
        other.swap("manifest", b"new" * 1000)
    assert isinstance(raised.value, DiskError) == (number != errno.EACCES or SWAP_CALLS[at - 1] == "fsync")
    renamed = at == 6 or (at == 5 and after)
    assert other.read("manifest", 4000) == (b"new" * 1000 if renamed else b"old" * 1000 + b"!")
    assert folder.names() == ["manifest"]
    other.append("manifest", 3000, b"?")  # goes to the file that is there now
    assert (other.read("manifest", 4000) or b"")[3000:] == b"?"
    other.close()


def test_a_folder_whose_names_were_not_flushed_is_not_swapped_in_again(folder: Folder) -> None:
    calls = Failing(only="fsync", at=2)
    other = Folder.open(folder.path, calls)
    with pytest.raises(DiskError, match="Input/output error"):
        other.swap("manifest", b"new")
    for attempt in (lambda: other.swap("manifest", b"newer"), other.sync_names):
        with pytest.raises(DiskError, match="an earlier sync failed"):
            attempt()
    assert other.read("manifest", 10) == b"new" and other.names() == ["manifest"]
    other.close()


def test_a_failed_sync_is_final_for_its_file(folder: Folder) -> None:
    calls = Failing(only="fsync")
    other = Folder.open(folder.path, calls)
    other.append("a", 0, b"1")
    other.append("b", 0, b"1")
    calls.at = 1
    with pytest.raises(DiskError, match="a: Input/output error"):
        other.sync("a")
    count = len(calls.made)
    with pytest.raises(DiskError, match="a: an earlier sync failed"):
        other.sync("a")
    assert len(calls.made) == count
    other.sync("b")
    other.swap("a", b"2")  # another file
    other.sync("a")
    other.close()


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_every_call_may_fail(sticky: bool, after: bool, tmp_path: Path) -> None:
    """Never another error than ours, and never a descriptor left (see `nothing_stays_open`)."""

    def script(calls: Calls, path: Path) -> None:
        folder = Folder.make(path, calls)
        try:
            child = folder.child("v")
            try:
                lock = child.lock("LOCK")
                try:
                    child.append("log", 0, b"123")
                    child.sync("log")
                    child.sync("log")
                    child.truncate("log", 1)
                    child.swap("manifest", b"1")
                    child.read("manifest", 10)
                    child.names()
                    child.remove("manifest")
                    child.clear(keep=("LOCK",))
                    child.sync_names()
                    child.erase()
                finally:
                    if lock is not None:
                        lock.release()
            finally:
                child.close()
        finally:
            folder.close()

    calls = Failing()
    script(calls, tmp_path / "a" / "b")
    failed = 0
    for at in range(1, len(calls.made) + 1):
        try:
            script(Failing(at=at, after=after, sticky=sticky), tmp_path / str(at) / "b")
        except AollmError:
            failed += 1
    assert failed >= len(calls.made) - 2 * after > 40  # two find nothing there and fail by themselves, as they should


# ---- between processes


def test_a_lock_is_held_by_one(folder: Folder) -> None:
    lock = folder.lock("LOCK")
    assert lock is not None and folder.lock("LOCK") is None and "held" in repr(lock)
    lock.release()
    lock.release()
    assert "released" in repr(lock) and folder.names() == ["LOCK"]
    again = folder.lock("LOCK")
    assert again is not None and mode(folder.path / "LOCK") == 0o600
    again.release()


HOLDER = """
import sys
from aollm.disk.folder import Folder
lock = Folder.make(sys.argv[1]).lock("LOCK")
print(lock is not None, flush=True)
sys.stdin.read()
"""


def test_a_killed_process_gives_its_lock_back(folder: Folder) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"True\n"
        assert folder.lock("LOCK") is None
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    lock = folder.lock("LOCK")
    assert lock is not None
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.communicate()[0] == b"False\n"
    lock.release()
