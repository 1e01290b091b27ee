"""One contract for all disks, on both event loops; then what only some of them promise."""

import asyncio
import errno
import fcntl
import mmap
import os
import random
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aollm.disk import auto
from aollm.disk.auto import DISKS, open_disk
from aollm.disk.base import ALIGNMENT, BOUNCE, PIECE, Disk, Extent, Priority, Span, address, pieces
from aollm.disk.memory import MemoryDisk
from aollm.disk.portable import PortableDisk
from aollm.disk.ring import Ring
from aollm.disk.strip import PARTS, after, strips
from aollm.disk.threads import ThreadsDisk
from aollm.disk.uring import UringDisk, probe
from aollm.errors import ConfigError, DiskError
from aollm.port import Port
from aollm.settings import RuntimeConfig

pytestmark = pytest.mark.anyio

URING = pytest.mark.skipif(probe() is not None, reason=f"io_uring cannot be used here: {probe()}")
MAKE: dict[str, Callable[[Port], Disk]] = {
    "threads": ThreadsDisk,
    "threads-buffered": lambda port: ThreadsDisk(port, direct=False),
    "uring": UringDisk,
    "uring-buffered": lambda port: UringDisk(port, direct=False),
    "portable": lambda port: PortableDisk(),
    "memory": lambda port: MemoryDisk(),
    "threads-one": lambda port: ThreadsDisk(port, threads=1),
    "uring-one": lambda port: UringDisk(port, depth=1),
}


def kinds(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", [pytest.param(name, marks=[URING] if name.startswith("uring") else []) for name in names])


on_files = kinds("threads", "threads-buffered", "uring", "uring-buffered", "portable")
on_all = kinds("threads", "threads-buffered", "uring", "uring-buffered", "portable", "memory")

SIZE = 2 * PIECE + 3 * BOUNCE + 1234
GUARD = 0xA5


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(7).randbytes(SIZE)


@asynccontextmanager
async def opened(kind: str) -> AsyncIterator[Disk]:
    async with Port() as port:
        disk = MAKE[kind](port)
        try:
            yield disk
        finally:
            with anyio.CancelScope(shield=True):
                await disk.aclose()


def place(disk: Disk, path: Path, data: bytes) -> str:
    if isinstance(disk, MemoryDisk):
        disk.files[str(path)] = bytearray(data)
    else:
        path.write_bytes(data)
    return str(path)


def arena(nbytes: int) -> memoryview:
    """Page-aligned memory, all guard bytes."""
    memory = memoryview(mmap.mmap(-1, nbytes))
    memory[:] = bytes([GUARD]) * nbytes
    return memory


def targets(memory: memoryview, extents: list[Extent], congruent: bool) -> list[memoryview]:
    """A buffer for each extent, with guards between, at addresses that agree with the file's offsets modulo a page or do not."""
    at, found = ALIGNMENT, []
    for extent in extents:
        at += -at % ALIGNMENT + extent.offset % ALIGNMENT + (0 if congruent else 1 + extent.offset % 999)
        found.append(memory[at : at + extent.nbytes])
        at += extent.nbytes + 17
    return found


def some_extents(file: str, seed: int) -> list[Extent]:
    chance = random.Random(seed)
    cut = [(0, 0), (5, 0), (SIZE, 0), (0, 1), (SIZE - 1, 1), (4095, 2), (4096, 4096), (4095, 4098), (8192, 3 * 4096), (1, 4095)]
    cut += [(SIZE - 5000, 5000), (0, SIZE), (3, SIZE - 3), (PIECE - 1, PIECE + 2), (100, BOUNCE), (4000, 2 * BOUNCE + 300)]
    for _ in range(12):
        offset = chance.randrange(SIZE)
        cut.append((offset, min(SIZE - offset, chance.choice([7, 4096, 9000, 70_000, BOUNCE + 5, 900_000]))))
    chance.shuffle(cut)
    return [Extent(file, offset, nbytes) for offset, nbytes in cut]


# ---- reading


@on_all
@pytest.mark.parametrize("congruent", [True, False])
async def test_reads_exactly_what_was_asked_for(kind: str, congruent: bool, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        extents = some_extents(place(disk, tmp_path / "a", content), seed=1)
        memory = arena(sum(extent.nbytes + 3 * ALIGNMENT for extent in extents))
        buffers = targets(memory, extents, congruent)
        before = time.perf_counter()
        span = await disk.read_into(extents, buffers)
        assert before <= span.start <= span.end <= time.perf_counter()
        expected = bytearray([GUARD]) * len(memory)
        for extent, buffer in zip(extents, buffers):
            at = address(buffer) - address(memory) if extent.nbytes else 0
            expected[at : at + extent.nbytes] = content[extent.offset : extent.end]
        assert memory == expected


@on_all
async def test_reads_of_several_callers_overlap(kind: str, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        files = [place(disk, tmp_path / name, content[i:]) for i, name in enumerate("abc")]
        memories = [arena(SIZE) for _ in range(6)]

        async def read(i: int) -> None:
            extents = [Extent(files[i % 3], 4096 * j, 300_000) for j in range(10)]
            await disk.read_into(extents, targets(memories[i], extents, congruent=i % 2 == 0), Priority(i % 2))
            for extent, buffer in zip(extents, targets(memories[i], extents, congruent=i % 2 == 0)):
                assert buffer == content[extent.offset + i % 3 : extent.end + i % 3]

        async with anyio.create_task_group() as group:
            for i in range(6):
                group.start_soon(read, i)


@on_all
async def test_reading_nothing(kind: str) -> None:
    async with opened(kind) as disk:
        span = await disk.read_into([], [])
        assert span.start <= span.end


@on_all
async def test_buffers_must_match(kind: str, tmp_path: Path) -> None:
    async with opened(kind) as disk:
        file = place(disk, tmp_path / "a", b"0123456789")
        for buffers in ([], [arena(9)], [arena(10), arena(10)], [arena(40).cast("i")]):
            with pytest.raises(ValueError):
                await disk.read_into([Extent(file, 0, 10)], buffers)


async def until_reads_wait(disk: Disk) -> None:
    while ", 0 waiting" in repr(disk):  # noqa: ASYNC110  nothing tells
        await anyio.sleep(0.001)


@kinds("threads-one", "uring-one")
async def test_urgent_reads_pass_those_that_wait(kind: str, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        file = place(disk, tmp_path / "a", content)
        await disk.size(file)  # opened
        memory, finished, spans = arena(SIZE + 1), list[Priority](), dict[Priority, Span]()

        async def read(extents: list[Extent], buffers: list[memoryview], priority: Priority) -> None:
            spans[priority] = await disk.read_into(extents, buffers, priority)
            finished.append(priority)

        async with anyio.create_task_group() as group:
            group.start_soon(read, [Extent(file, 0, SIZE)] * 16, [memory[1:]] * 16, Priority.SOON)
            await until_reads_wait(disk)
            group.start_soon(read, [Extent(file, 8192, 4096)], [arena(4096)], Priority.NOW)
        assert finished == [Priority.NOW, Priority.SOON]
        assert spans[Priority.NOW].end < spans[Priority.SOON].end


@kinds("threads", "uring")
async def test_short_reads_are_continued(kind: str, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, reap, cut = os.preadv, Ring.reap, list[int]()

    def shorter(count: int) -> int:
        cut.append(count)
        return min(count, 50_001)

    monkeypatch.setattr(os, "preadv", lambda *arguments: shorter(preadv(*arguments)))
    monkeypatch.setattr(Ring, "reap", lambda ring: [(key, shorter(result)) for key, result in reap(ring)])
    async with opened(kind) as disk:
        extents = [Extent(place(disk, tmp_path / "a", content), 7000, 600_000), Extent(str(tmp_path / "a"), SIZE - 99, 99)]
        for congruent in (True, False):
            buffers = targets(arena(1 << 20), extents, congruent)
            await disk.read_into(extents, buffers)
            assert [bytes(buffer) for buffer in buffers] == [content[extent.offset : extent.end] for extent in extents]
    assert len(cut) > 2 * 600_000 // 50_001


@kinds("uring")
async def test_interrupted_operations_are_repeated(kind: str, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    reap, results = Ring.reap, [-errno.EINTR, -errno.EAGAIN]
    monkeypatch.setattr(Ring, "reap", lambda ring: [(key, results.pop() if results else result) for key, result in reap(ring)])
    async with opened(kind) as disk:
        buffer = arena(SIZE)
        await disk.read_into([Extent(place(disk, tmp_path / "a", content), 0, SIZE)], [buffer])
        assert buffer == content and not results


@kinds("uring")
async def test_a_full_ring_is_tried_again(kind: str, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, refused = Ring.submit, [True, True, True]
    monkeypatch.setattr(Ring, "submit", lambda ring: not refused.pop() if refused else submit(ring))
    async with opened(kind) as disk:
        buffer = arena(SIZE)
        await disk.read_into([Extent(place(disk, tmp_path / "a", content), 0, SIZE)], [buffer])
        assert buffer == content and not refused


@kinds("threads", "threads-buffered", "uring", "uring-buffered")
async def test_nothing_holds_the_buffer_afterwards(kind: str, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        memory = mmap.mmap(-1, SIZE)
        with memoryview(memory) as view, view[5:] as part:
            await disk.read_into([Extent(place(disk, tmp_path / "a", content), 0, SIZE - 5)], [part])
        memory.close()  # BufferError if anybody still looks into it


# ---- writing


@on_all
async def test_what_was_written_is_read(kind: str, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        file, payload = str(tmp_path / "new"), memoryview(content)
        await disk.write([Extent(file, 10, 5000), Extent(file, 9000, PIECE + 3)], [payload[:5000], payload[: PIECE + 3]])
        await disk.sync(file)
        assert await disk.size(file) == 9000 + PIECE + 3
        await disk.write([Extent(file, 4000, 100)], [payload[7:107]])  # again, after it was read
        await disk.write([Extent(file, 9000 + PIECE + 3, 4096)], [payload[:4096]])
        expected = bytearray(9000) + content[: PIECE + 3] + content[:4096]
        expected[10:5010], expected[4000:4100] = content[:5000], content[7:107]
        buffer = arena(len(expected))
        await disk.read_into([Extent(file, 0, len(expected))], [buffer])
        assert buffer == expected
        await disk.sync(file)
    if kind != "memory":
        assert (tmp_path / "new").read_bytes() == expected
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


@on_all
async def test_a_file_that_was_read_may_be_written(kind: str, tmp_path: Path) -> None:
    async with opened(kind) as disk:
        file, buffer = place(disk, tmp_path / "a", b"0123456789"), arena(10)
        assert await disk.size(file) == 10
        await disk.read_into([Extent(file, 0, 10)], [buffer])
        await disk.write([Extent(file, 8, 4)], [memoryview(b"abcd")])
        assert await disk.size(file) == 12
        await disk.read_into([Extent(file, 2, 10)], [buffer])
        assert bytes(buffer) == b"234567abcd"


@on_files
async def test_a_failed_sync_is_final(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(kind) as disk:
        file = str(tmp_path / "a")
        await disk.write([Extent(file, 0, 3)], [memoryview(b"abc")])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails_with(errno.EIO))
            with pytest.raises(DiskError, match=r"a: Input/output error"):
                await disk.sync(file)
        with pytest.raises(DiskError, match="an earlier sync failed"):
            await disk.sync(file)


@on_all
@pytest.mark.parametrize("congruent", [True, False])
async def test_exactly_what_was_given_is_written(kind: str, congruent: bool, tmp_path: Path, content: bytes) -> None:
    """Whole pages and parts of them, one behind the other and apart, in one call."""
    async with opened(kind) as disk:
        file, end = place(disk, tmp_path / "a", bytes([GUARD]) * 100_000), 8 << 20
        cut = [(0, 4096), (4096, PIECE + 8192), (PIECE + 12_288, 5), (PIECE + 12_293, 4091), (PIECE + 16_384, 4096), (end - PIECE, PIECE)]
        cut += [(end, 4096), (end + 8192, 100), (end + 3 * PIECE + 1, PIECE + 4096), (end + 20_480, 0), (end + 16_384, 12_288)]
        extents = [Extent(file, offset, nbytes) for offset, nbytes in cut]
        expected = bytearray([GUARD]) * 100_000
        expected.extend(bytes(extents[-3].end - len(expected)))
        memory = arena(end + 8 * PIECE)
        buffers = targets(memory, extents, congruent)
        for i, (extent, buffer) in enumerate(zip(extents, buffers)):
            buffer[:] = content[i : i + extent.nbytes]
            expected[extent.offset : extent.end] = buffer
        await disk.write(extents, buffers)
        assert await disk.size(file) == len(expected)
        found = arena(len(expected))
        await disk.read_into([Extent(file, 0, len(expected))], [found])
        assert found == expected
        await disk.write(extents[::-1], [memoryview(content)[i : i + extent.nbytes] for i, extent in enumerate(extents)][::-1])  # read-only
        await disk.read_into([Extent(file, 0, len(expected))], [found])
        assert found == expected
        await disk.write([], [])
    if kind != "memory":
        assert (tmp_path / "a").read_bytes() == expected


Spied = list[tuple[bool, list[int], int]]


def spy_on_writes(monkeypatch: pytest.MonkeyPatch, result: Callable[[int, list[memoryview], int], int] = os.pwritev) -> Spied:
    """Whether each write is direct, the sizes of its parts, and its offset; `result` carries it out."""
    seen: Spied = []

    def pwritev(fd: int, parts: list[memoryview], offset: int) -> int:
        seen.append((bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT), [part.nbytes for part in parts], offset))
        return result(fd, parts, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    return seen


def needs_direct(folder: Path) -> None:
    (folder / "tried").touch()
    if not auto.reads_directly(folder):
        pytest.skip("this filesystem has no direct reads and writes")


@kinds("threads-one", "uring-one")
async def test_a_record_is_one_direct_write(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_direct(tmp_path)
    seen = spy_on_writes(monkeypatch)
    async with opened(kind) as disk:
        file, memory, page = str(tmp_path / "a"), arena(PIECE), memoryview(bytes(4096))
        extents = [Extent(file, 8192, 4096), Extent(file, 12_288, 65_536)]
        await disk.write(extents, [memory[65_536:][:4096], memory[:65_536]])
        await disk.write(extents, [page, memory[:65_536]])
        await disk.write([Extent(file, 0, 4096), Extent(file, 4096, PIECE)], [memory[:4096], memory])
    first, *second = seen[:3]
    assert first == (True, [4096, 65_536], 8192)
    assert sorted(second) == [(False, [4096], 8192), (True, [65_536], 12_288)]
    assert sorted(seen[3:]) == [(True, [4096], PIECE), (True, [4096, PIECE - 4096], 0)]


@kinds("threads", "threads-buffered")
@pytest.mark.parametrize("most", [1, 4096, 5000, 70_000])
async def test_short_writes_are_continued(kind: str, most: int, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev, nbytes = os.pwritev, 4096 * (1 if most == 1 else 60)
    seen = spy_on_writes(monkeypatch, lambda fd, parts, at: pwritev(fd, [part[:most] for part in parts[:1]], at))
    async with opened(kind) as disk:
        memory = arena(2 * nbytes)
        memory[:] = content[: 2 * nbytes]
        extents = [Extent(str(tmp_path / "a"), 0, nbytes), Extent(str(tmp_path / "a"), nbytes, nbytes)]
        await disk.write(extents, [memory[:nbytes], memory[nbytes:]])
        assert (tmp_path / "a").read_bytes() == content[: 2 * nbytes]
    assert len(seen) >= 2 * nbytes // most
    assert all(at % ALIGNMENT == 0 for direct, _, at in seen if direct)


@kinds("threads", "uring")
async def test_a_drive_that_refuses_direct_writes_gets_buffered_ones(
    kind: str, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_direct(tmp_path)
    pwritev, real_open = os.pwritev, os.open

    def refuse(fd: int, parts: list[memoryview], at: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwritev(fd, parts, at)

    def open_buffered(path: str, flags: int, *arguments: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, *arguments)

    async with opened(kind) as disk:
        memory = arena(2 * PIECE)
        memory[:] = content[: 2 * PIECE]
        with monkeypatch.context() as patch:
            seen = spy_on_writes(patch, refuse)
            await disk.write([Extent(str(tmp_path / "a"), 0, 2 * PIECE)], [memory])
            assert sorted(direct for direct, _, _ in seen) == [False, False, True, True]
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", open_buffered)
            seen = spy_on_writes(patch)
            await disk.write([Extent(str(tmp_path / "b"), 0, 2 * PIECE)], [memory])
            assert [direct for direct, _, _ in seen] == [False, False]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == content[: 2 * PIECE]


@kinds("threads", "uring", "threads-buffered")
async def test_a_write_that_fails(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(kind) as disk:
        file, memory = str(tmp_path / "a"), arena(8192)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", lambda *arguments: 0)
            with pytest.raises(DiskError, match="a at byte 4096: the system wrote nothing"):
                await disk.write([Extent(file, 4096, 8192)], [memory])
            patch.setattr(os, "pwritev", fails_with(errno.ENOSPC))
            with pytest.raises(DiskError, match="a at byte 4096: No space left on device; free some space"):
                await disk.write([Extent(file, 4096, 8192)], [memory])
        await disk.write([Extent(file, 4096, 8192)], [memory])  # the disk goes on
    assert (tmp_path / "a").read_bytes() == bytes(4096) + memory


@on_files
async def test_only_the_first_sync_flushes_the_name(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync, fdatasync = list[str](), os.fsync, os.fdatasync

    def noted(kind: str, call: Callable[[int], None]) -> Callable[[int], None]:
        return lambda fd: (synced.append(f"{kind} {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))}"), call(fd))[1]

    monkeypatch.setattr(os, "fsync", noted("all", fsync))
    monkeypatch.setattr(os, "fdatasync", noted("data", fdatasync))
    async with opened(kind) as disk:
        for _ in range(2):
            await disk.write([Extent(str(tmp_path / "a"), 0, 3)], [memoryview(b"abc")])
            await disk.sync(str(tmp_path / "a"))
    assert synced == ["all a", f"all {tmp_path.name}", "data a"]


@on_all
async def test_a_forgotten_file_is_opened_anew(kind: str, tmp_path: Path) -> None:
    async with opened(kind) as disk:
        file, buffer = place(disk, tmp_path / "a", b"0123456789"), arena(4)
        await disk.forget(file)  # nothing is open yet
        place(disk, tmp_path / "a", b"0123456789")
        await disk.write([Extent(file, 0, 2)], [memoryview(b"xy")])
        await disk.read_into([Extent(file, 0, 4)], [buffer])
        assert bytes(buffer) == b"xy23"
        await disk.forget(file)
        if isinstance(disk, MemoryDisk):
            assert disk.files == {} and disk.forgotten == [file, file]
        else:
            assert file not in descriptors()
            (tmp_path / "a").unlink()
        with pytest.raises(DiskError, match=r"no such file|No such file"):
            await disk.read_into([Extent(file, 0, 4)], [buffer])
        await disk.forget(file)
        place(disk, tmp_path / "a", b"another one")
        await disk.read_into([Extent(file, 0, 4)], [buffer])
        assert bytes(buffer) == b"anot"
        await disk.write([Extent(file, 9, 1)], [memoryview(b"n")])
        await disk.sync(file)
        assert await disk.size(file) == 11


@on_files
async def test_a_new_file_may_be_synced_where_another_one_failed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(kind) as disk:
        file = str(tmp_path / "a")
        await disk.write([Extent(file, 0, 3)], [memoryview(b"abc")])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails_with(errno.EIO))
            with pytest.raises(DiskError):
                await disk.sync(file)
        await disk.forget(file)
        with pytest.raises(DiskError, match="an earlier sync failed"):
            await disk.sync(file)  # it may still be the same
        await disk.forget(file)
        os.unlink(file)
        await disk.write([Extent(file, 0, 3)], [memoryview(b"abc")])
        await disk.sync(file)


def descriptors() -> list[str]:
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}"))


def fails_with(number: int) -> Callable[..., Any]:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# ---- errors


@on_all
async def test_a_missing_file(kind: str, tmp_path: Path) -> None:
    async with opened(kind) as disk:
        for nbytes in (0, 10):
            with pytest.raises(DiskError, match="nowhere"):
                await disk.read_into([Extent(str(tmp_path / "nowhere"), 0, nbytes)], [arena(10)[:nbytes]])
        with pytest.raises(DiskError, match="nowhere"):
            await disk.size(str(tmp_path / "nowhere"))


@on_all
async def test_a_read_past_the_end(kind: str, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        file = place(disk, tmp_path / "short", content)
        for offset, nbytes in ((SIZE - 10, 11), (SIZE, 1), (SIZE + 9000, 9000), (0, SIZE + 8192), (SIZE - SIZE % 4096, 8192)):
            for shift in (0, 1):
                with pytest.raises(DiskError, match=r"short.*truncated"):
                    await disk.read_into([Extent(file, offset, nbytes)], [arena(nbytes + shift)[shift:]])
        buffer = arena(100)
        await disk.read_into([Extent(file, 0, 100)], [buffer])  # the disk goes on
        assert buffer == content[:100]


@on_files
async def test_what_is_not_a_file(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    async with opened(kind) as disk:
        for name in ("pipe", "folder", "link"):
            extent = Extent(str(tmp_path / name), 0, 10)
            with pytest.raises(DiskError, match=name):
                await disk.read_into([extent], [arena(10)])
            with pytest.raises(DiskError, match=name):
                await disk.write([extent], [memoryview(bytes(10))])
    assert not (tmp_path / "elsewhere").exists()


@on_files
@pytest.mark.parametrize("how", ["overwritten", "truncated", "grown"])
async def test_a_file_that_changes_while_in_use(kind: str, how: str, tmp_path: Path) -> None:
    async with opened(kind) as disk:
        path = tmp_path / "a"
        file, buffer = place(disk, path, bytes(20_000)), arena(5000)
        await disk.read_into([Extent(file, 0, 5000)], [buffer])
        with path.open("r+b") as other:
            if how == "overwritten":
                other.write(b"x")
            else:
                other.truncate(10_000 if how == "truncated" else 30_000)
        with pytest.raises(DiskError, match="changed while it was in use"):
            await disk.read_into([Extent(file, 0, 5000)], [buffer])


@on_all
async def test_one_error_does_not_hurt_other_readers(kind: str, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        file, buffer, failed = place(disk, tmp_path / "a", content), arena(SIZE), list[DiskError]()

        async def read_too_far() -> None:
            try:
                await disk.read_into(
                    [Extent(file, SIZE - 4096 * i, 4096 * i + 1) for i in range(30)], [arena(4096 * i + 1) for i in range(30)]
                )
            except DiskError as error:
                failed.append(error)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(read_too_far)
            await disk.read_into([Extent(file, 0, SIZE)], [buffer])
        assert buffer == content and len(failed) == 3


@on_all
async def test_a_closed_disk_refuses(kind: str, tmp_path: Path) -> None:
    async with opened(kind) as disk:
        file = place(disk, tmp_path / "a", bytes(10))
        await disk.read_into([Extent(file, 0, 10)], [arena(10)])
        await disk.aclose()
        await disk.aclose()
        for call in (
            lambda: disk.read_into([Extent(file, 0, 10)], [arena(10)]),
            lambda: disk.write([Extent(file, 0, 10)], [memoryview(bytes(10))]),
            lambda: disk.sync(file),
            lambda: disk.forget(file),
            lambda: disk.size(file),
        ):
            with pytest.raises(DiskError, match="closed"):
                await call()


# ---- cancellation, and what stays behind


@on_files
async def test_a_cancelled_read_leaves_the_buffer_alone(kind: str, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        file, memory, cancelled = place(disk, tmp_path / "a", content), arena(4 * SIZE + ALIGNMENT), 0
        await disk.size(file)
        for congruent in (True, False):
            extents = [Extent(file, 0, SIZE)] * 4
            for delay_s in (0, 0.0005, 0.001, 0.002, 0.004):
                before = time.perf_counter()
                with anyio.move_on_after(delay_s) as scope:
                    await disk.read_into(extents, [memory[i * SIZE + (not congruent) :][:SIZE] for i in range(4)])
                assert time.perf_counter() - before < 20
                cancelled += scope.cancelled_caught
                memory[:] = bytes([GUARD]) * len(memory)
                await anyio.sleep(0.02)
                assert memory == bytes([GUARD]) * len(memory)
        assert cancelled >= 2
        buffer = arena(SIZE)
        await disk.read_into([Extent(file, 0, SIZE)], [buffer])  # the disk goes on
        assert buffer == content


@kinds("threads-one", "uring-one")
async def test_a_cancelled_read_does_not_wait_for_others(kind: str, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        file, order, memory = place(disk, tmp_path / "a", content), list[str](), arena(SIZE + 1)
        await disk.size(file)

        async def read_long() -> None:
            await disk.read_into([Extent(file, 0, SIZE)] * 16, [memory[1:]] * 16)
            order.append("long")

        async with anyio.create_task_group() as group:
            group.start_soon(read_long)
            await until_reads_wait(disk)
            with anyio.move_on_after(0.001):
                await disk.read_into([Extent(file, 0, SIZE)], [arena(SIZE)])
            order.append("cancelled")
        assert order == ["cancelled", "long"]


@on_files
async def test_all_cancelled_at_once(kind: str, tmp_path: Path, content: bytes) -> None:
    """Readers that are cancelled together with whoever opened the port have to wait for the drive all the same."""
    with anyio.CancelScope() as scope:
        async with Port() as port:
            disk = MAKE[kind](port)
            try:
                file = place(disk, tmp_path / "a", content)
                async with anyio.create_task_group() as group:
                    for _ in range(3):
                        group.start_soon(disk.read_into, [Extent(file, 0, SIZE)] * 2, [arena(SIZE)] * 2)
                    await anyio.sleep(0.001)
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()  # the host is cancelled even where the drive was faster
            finally:
                with anyio.CancelScope(shield=True):
                    await disk.aclose()
    assert scope.cancelled_caught


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@on_files
async def test_asyncio_cancel_waits_too(anyio_backend: str, kind: str, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        file, memory = place(disk, tmp_path / "a", content), arena(SIZE)
        await disk.size(file)
        for delay_s in (0, 0.0005, 0.001):
            task = asyncio.ensure_future(disk.read_into([Extent(file, 0, SIZE)] * 4, [memory] * 4))
            await asyncio.sleep(delay_s)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            while not task.done():  # noqa: ASYNC110  the task is what is tried
                await asyncio.sleep(0)
            memory[:] = bytes([GUARD]) * len(memory)
            await asyncio.sleep(0.02)
            assert memory == bytes([GUARD]) * len(memory)
            assert task.cancelled() or isinstance(task.result(), Span)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncio_cancel_waits_for_a_slow_drive(anyio_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, preadv = threading.Event(), os.preadv

    def slowly(*arguments: Any) -> int:
        began.set()
        time.sleep(0.1)
        return preadv(*arguments)

    async with opened("threads") as disk:
        file, memory = place(disk, tmp_path / "a", bytes(4096)), arena(4096)
        await disk.size(file)
        monkeypatch.setattr(os, "preadv", slowly)
        task = asyncio.ensure_future(disk.read_into([Extent(file, 0, 4096)], [memory]))
        while not began.is_set():  # noqa: ASYNC110  set by a thread
            await asyncio.sleep(0)
        for _ in range(5):
            task.cancel()
            await asyncio.sleep(0.005)
            assert not task.done()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert memory == bytes(4096)  # the drive was waited for


@on_files
async def test_nothing_stays_behind(kind: str, tmp_path: Path, content: bytes) -> None:
    def held() -> tuple[list[str], list[str]]:
        return descriptors(), sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("aollm"))

    before = held()
    async with opened(kind) as disk:
        file, memory = place(disk, tmp_path / "a", content), arena(SIZE)
        await disk.read_into([Extent(file, 0, SIZE)], [memory])
        await disk.write([Extent(str(tmp_path / "b"), 0, SIZE)], [memory])
        await disk.sync(str(tmp_path / "b"))
        for bad in ("c", "."):
            with pytest.raises(DiskError):
                await disk.read_into([Extent(str(tmp_path / bad), 0, SIZE)], [memory])
        with anyio.move_on_after(0.001):
            await disk.read_into([Extent(file, 0, SIZE)] * 3, [memory] * 3)
        assert len(held()[0]) > len(before[0])
    assert held() == before


@on_files
async def test_closing_waits_for_what_is_queued(kind: str, tmp_path: Path, content: bytes) -> None:
    async with opened(kind) as disk:
        file, memory = place(disk, tmp_path / "a", content), arena(SIZE)

        async def close() -> None:
            await anyio.sleep(0.002)
            await disk.aclose()

        await disk.size(file)
        async with anyio.create_task_group() as group:
            group.start_soon(close)
            await disk.read_into([Extent(file, 0, SIZE)], [memory])
        assert memory == content


# ---- cutting


@settings(deadline=None, max_examples=300)
@given(
    offset=st.integers(0, 3 * PIECE),
    nbytes=st.one_of(st.integers(0, 3 * ALIGNMENT), st.integers(0, 3 * PIECE)),
    shift=st.one_of(st.none(), st.integers(0, ALIGNMENT - 1)),
    direct=st.booleans(),
)
def test_pieces_cover_an_extent_once(offset: int, nbytes: int, shift: int | None, direct: bool) -> None:
    extent = Extent("a", offset, nbytes)
    target = 0x7F0000000000 + (offset % ALIGNMENT if shift is None else shift)
    cut, at = list(pieces(extent, target, direct)), 0
    for piece in cut:
        assert piece.start == at and piece.length > 0
        assert piece.offset + piece.skip == offset + at
        assert piece.skip + piece.length <= piece.nbytes <= (BOUNCE if piece.bounced else PIECE)
        assert piece.bounced or (piece.skip == 0 and piece.length == piece.nbytes)
        assert not (direct and (piece.offset % ALIGNMENT or piece.nbytes % ALIGNMENT))
        assert not (direct and not piece.bounced and (target + piece.start) % ALIGNMENT)
        at += piece.length
    assert at == nbytes
    if shift is None or not direct:
        assert sum(piece.length for piece in cut if piece.bounced) < 2 * ALIGNMENT


@settings(deadline=None, max_examples=200)
@given(
    cut=st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.sampled_from([0, 0, 0, 4096, 77]),
            st.one_of(st.sampled_from([0, 5, 4096, 8192, PIECE, PIECE + 4096, 2 * PIECE + 1]), st.integers(0, 3 * ALIGNMENT)),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_strips_cover_all_extents_once(cut: list[tuple[str, int, int, bool]]) -> None:
    memory, readonly = arena(3 * PIECE), memoryview(bytes(3 * PIECE))
    extents, buffers, ends = list[Extent](), list[memoryview](), {"a": 0, "b": 0}
    for file, gap, nbytes, writable in cut:
        extents.append(Extent(file, ends[file] + gap, nbytes))
        buffers.append((memory if writable else readonly)[:nbytes])
        ends[file] = extents[-1].end
    covered = list[tuple[str, int]]()
    for strip in strips(extents, buffers):
        sizes = [part.nbytes for part in strip.parts]
        assert all(sizes) and sum(sizes) <= PIECE
        covered.append((strip.file, strip.offset))
        if strip.aligned:
            assert not any(number % ALIGNMENT for number in (strip.offset, *sizes, *(address(part) for part in strip.parts)))
            assert not any(part.readonly for part in strip.parts)
        covered.append((strip.file, strip.offset + sum(sizes)))
    assert touching(covered) == touching([(extent.file, at) for extent in extents if extent.nbytes for at in (extent.offset, extent.end)])


def touching(edges: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Starts and ends, without those where one ends and the next begins."""
    found: list[tuple[str, int]] = []
    for i in range(0, len(edges), 2):
        if found and found[-1] == edges[i]:
            found[-1] = edges[i + 1]
        else:
            found += edges[i : i + 2]
    return found


def test_a_strip_has_no_more_parts_than_the_system_takes() -> None:
    buffer = memoryview(b"x")
    cut = list(strips([Extent("a", i, 1) for i in range(2 * PARTS + 1)], [buffer] * (2 * PARTS + 1)))
    assert [len(strip.parts) for strip in cut] == [PARTS, PARTS, 1]


@given(sizes=st.lists(st.integers(1, 9), max_size=5), count=st.integers(0, 50))
def test_what_is_left_after_a_short_write(sizes: list[int], count: int) -> None:
    whole = bytes(range(sum(sizes)))
    parts, at = list[memoryview](), 0
    for size in sizes:
        parts.append(memoryview(whole)[at : at + size])
        at += size
    left = after(parts, min(count, len(whole)))
    assert b"".join(left) == whole[count:] and all(part.nbytes for part in left)


# ---- the memory disk


async def test_the_memory_disk_notes_what_was_asked() -> None:
    disk, extent = MemoryDisk({"a": b"0123456789"}), Extent("a", 2, 3)
    await disk.read_into([extent], [arena(3)])
    await disk.write([Extent("b", 1, 2)], [memoryview(b"xy")])
    await disk.sync("b")
    assert (disk.reads, disk.writes, disk.synced) == ([extent], [Extent("b", 1, 2)], ["b"])
    assert bytes(disk.files["b"]) == b"\0xy"


async def test_the_memory_disk_fails_by_rule() -> None:
    def fail(extent: Extent) -> Exception | None:
        return DiskError(f"{extent.file} is gone") if extent.offset == 5 else None

    disk, buffer = MemoryDisk({"a": b"0123456789"}, fail=fail, fail_write=fail), arena(2)
    await disk.read_into([Extent("a", 4, 2)], [buffer])
    with pytest.raises(DiskError, match="a is gone"):
        await disk.read_into([Extent("a", 5, 2)], [buffer])
    with pytest.raises(DiskError, match="a is gone"):
        await disk.write([Extent("a", 5, 2)], [buffer])
    assert bytes(buffer) == b"45" and disk.files["a"] == b"0123456789"


async def test_the_memory_disk_comes_back_short() -> None:
    disk, buffer = MemoryDisk({"a": b"0123456789"}, short=True), arena(4)
    with pytest.raises(DiskError, match="a ends at byte 4, 2 bytes short"):
        await disk.read_into([Extent("a", 2, 4)], [buffer])
    assert bytes(buffer) == b"23" + bytes([GUARD] * 2)


async def test_the_memory_disk_delays() -> None:
    disk, order = MemoryDisk({"a": b"0123456789"}, delay_s=lambda extent: extent.offset / 50), list[int]()

    async def read(offset: int) -> None:
        await disk.read_into([Extent("a", offset, 1)], [arena(1)])
        order.append(offset)

    async with anyio.create_task_group() as group:
        for offset in (3, 0, 2):
            group.start_soon(read, offset)
    assert order == [0, 2, 3]
    disk, buffer = MemoryDisk({"a": b"0123456789"}, delay_s=0.01), arena(1)
    with anyio.move_on_after(0.001):
        await disk.read_into([Extent("a", 0, 1)], [buffer])
    await anyio.sleep(0.02)
    assert buffer[0] == GUARD


async def test_the_memory_disk_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to("blob")
    (tmp_path / "config.json").write_bytes(b"{}")
    disk = MemoryDisk.of(tmp_path)
    assert set(disk.files) == {str(tmp_path / "model.safetensors"), os.path.realpath(tmp_path / "blob")}
    assert await disk.size(str(tmp_path / "model.safetensors")) == 7


# ---- choosing


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    async with Port() as port:
        yield port


@pytest.mark.parametrize("name", [name for name in DISKS if name != "gds"])
async def test_every_name_opens_a_disk_that_reads(name: str, port: Port, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"0123456789")
    disk, reason = open_disk(name, port, tmp_path)
    buffer = arena(3)
    await disk.read_into([Extent(str(tmp_path / "a.safetensors"), 4, 3)], [buffer])
    await disk.aclose()
    assert bytes(buffer) == b"456"
    assert disk.name == {"auto": "threads", "uring": "uring" if probe() is None else "threads"}.get(name, name)
    assert disk.name in reason and "\n" not in reason


async def test_uring_falls_back_and_says_why(port: Port, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "probe", lambda: "EPERM: Operation not permitted")
    disk, reason = open_disk("uring", port, tmp_path)
    await disk.aclose()
    assert (disk.name, reason) == ("threads", "uring is not available here (EPERM: Operation not permitted): threads")


async def test_uring_is_not_used_where_reads_are_not_direct(port: Port, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "probe", lambda: None)
    monkeypatch.setattr(auto, "reads_directly", lambda folder: False)
    disk, reason = open_disk("uring", port, tmp_path)
    await disk.aclose()
    assert disk.name == "threads" and "without direct reads" in reason


def test_a_refused_ring_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "__init__", fails_with(errno.EPERM))
    assert probe() in ("EPERM: Operation not permitted", None) or "needs 64-bit x86 Linux" in str(probe())
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "aarch64" in str(probe())


async def test_an_unknown_name_is_refused(port: Port, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"disk_backend='floppy'.*auto, threads, uring, gds, portable, memory"):
        open_disk("floppy", port, tmp_path)


async def test_gds_is_not_promised(port: Port, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not in this build yet; use one of: ") as refused:
        open_disk("gds", port, tmp_path)
    named = str(refused.value).rpartition(": ")[2].split(", ")
    assert [RuntimeConfig.of("demo", {"disk_backend": name}).disk_backend for name in named] == ["auto", "threads", "uring", "portable"]
