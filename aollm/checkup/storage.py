"""Where things are stored: on which kind of filesystem, whose it is, how much room there is, and how fast the drive is.

What is measured is a file without a name, so that nothing is left behind, however a run ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import anyio
import anyio.to_thread

from ..buffers import Ring, size
from ..disk.auto import open_disk
from ..disk.base import Extent
from ..disk.owner import check_folder
from ..errors import DiskError, StoreError
from ..meter import amount, rate
from ..port import Port
from ..probe import CHUNK, drive_speed, existing, nameless, path_of
from .check import Check

Tell = Callable[[str], object]
DRIVE_NBYTES, BLOCK, WRITING_S, READING_S = 256 << 20, 8 << 20, 3.0, 4.0
LEAST_FREE, SLOW = 10 << 30, 300e6
MEMORY = ("tmpfs", "ramfs", "devtmpfs")
NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|afs|9p|ceph|lustre|beegfs|gpfs|glusterfs|fuse\.(sshfs|s3fs|rclone|gcsfuse|glusterfs|ceph\w*|juicefs)"
)


def check_cache_root(folder: Path, mounts: str) -> Check:
    """Whether KV can be stored in `folder`, by this user alone, and on what; `mounts` is /proc/self/mountinfo."""
    there = existing(folder)
    kind = filesystem(there, mounts)
    figures = {"folder": str(folder), "exists": folder == there, "filesystem": kind, "mode": None}
    told = f"{folder} on {kind or 'a filesystem that is not known'}"
    if not os.path.isdir(there):
        return Check("cache folder", "problem", f"{there} is not a folder", "name another with --cache-dir", figures)
    try:
        nameless(there).close()
    except OSError as error:
        why = f"{told}: no file can be made in {there} ({error.strerror})"
        mode = ", or change its mode" if error.errno in (errno.EACCES, errno.EPERM) else ""
        return Check("cache folder", "problem", why, f"name another with --cache-dir{mode}", figures)
    if folder == there:
        status = os.stat(folder)
        figures["mode"] = f"{status.st_mode & 0o7777:04o}"
        try:
            check_folder(status, str(folder))
        except StoreError as error:
            said, _, advice = str(error).partition("; ")
            return Check("cache folder", "problem", said, advice or "name another with --cache-dir", figures)
        if status.st_mode & 0o077:
            return Check(
                "cache folder", "warning", f"{told}, mode {figures['mode']}: others may look into it", f"chmod 700 {folder}", figures
            )
        told += f", mode {figures['mode']}"
    else:
        told += "; it is made when it is needed"
    if kind in MEMORY:
        return Check(
            "cache folder", "warning", told, "that is memory, which runs then lack: name a folder on a drive with --cache-dir", figures
        )
    if kind is not None and NETWORK.fullmatch(kind):
        return Check(
            "cache folder", "warning", told, "a network is slow and may lose locks: name a folder on a drive with --cache-dir", figures
        )
    return Check("cache folder", "ok", told, None, figures)


def check_models_folder(folder: Path, mounts: str) -> Check:
    """On what models are kept, and how much room is left there."""
    there = existing(folder)
    needed = os.X_OK | (os.R_OK if folder == there else os.W_OK)
    if not os.path.isdir(there) or not os.access(there, needed, effective_ids=os.access in os.supports_effective_ids):
        told = f"{there} is not a folder that this user may {'read' if folder == there else 'make folders in'}"
        figures = {"folder": str(folder), "exists": folder == there, "filesystem": filesystem(there, mounts), "free": None}
        return Check("models folder", "problem", told, "name another with --models-dir", figures)
    kind, free = filesystem(there, mounts), shutil.disk_usage(there).free
    figures = {"folder": str(folder), "exists": folder == there, "filesystem": kind, "free": free}
    told = f"{folder} on {kind or 'a filesystem that is not known'}, {amount(free)} free" + (
        "" if folder == there else "; it is made when it is needed"
    )
    if kind in MEMORY:
        return Check("models folder", "warning", told, "that is memory: name a folder on a drive with --models-dir", figures)
    if kind is not None and NETWORK.fullmatch(kind):
        return Check("models folder", "warning", told, "weights are read in every pass: have models on a drive of this machine", figures)
    if free < LEAST_FREE:
        return Check("models folder", "warning", told, "a model of 8 billion parameters has 16 GB: make room, or use --models-dir", figures)
    return Check("models folder", "ok", told, None, figures)


def check_free_disk(folder: Path) -> Check:
    """Room for KV."""
    usage = shutil.disk_usage(existing(folder))
    figures = {"free": usage.free, "total": usage.total}
    told = f"{amount(usage.free)} free of {amount(usage.total)} for {folder}"
    if usage.free < LEAST_FREE:
        return Check("free disk", "warning", told, "a long context takes gigabytes: make room, or limit it (--kv-cache-max-bytes)", figures)
    return Check("free disk", "ok", told, None, figures)


async def check_drive(folder: Path, tell: Tell, nbytes: int = DRIVE_NBYTES) -> list[Check]:
    """Whether the drive of `folder` is read past the page cache, and how fast it is written and read: a file of `nbytes`, or
    what can be written of it in three seconds."""
    there = existing(folder)
    if (free := shutil.disk_usage(there).free) < 4 * nbytes:
        return [Check("drive", "unknown", f"not measured: {size(free)} are free, and {size(4 * nbytes)} are needed", "make room")]
    try:
        with await anyio.to_thread.run_sync(nameless, there) as file:
            name = path_of(file)
            direct = await anyio.to_thread.run_sync(_past_cache, name)
            try:
                wrote, seconds = await _write(file.fileno(), direct, nbytes, tell)
            finally:
                if direct is not None:
                    os.close(direct)
            tell(f"reading {size(wrote)} of the drive")
            read = await _read(there, [Extent(name, 0, wrote)])
    except OSError as error:
        told = f"{there} cannot be written: {error.strerror or error}"
        return [Check("drive", "problem", told, "make room, or name another folder with --cache-dir")]
    except DiskError as error:
        return [Check("drive", "problem", str(error), "look at the system's log: the drive fails")]
    return [_direct(there, direct is not None), _speed(there, wrote, wrote / seconds, read)]


async def check_weights_drive(files: Sequence[tuple[str, int]], tell: Tell) -> Check:
    """How fast weights that are here are read: `files` of models, with their bytes."""
    if not files:
        return Check("weights", "unknown", "not measured: no model is here that is large enough", None)
    tell("reading weights")
    file, nbytes = max(files, key=lambda each: each[1])
    try:
        speed = await _read(Path(file).parent, [Extent(file, 0, min(nbytes, DRIVE_NBYTES))])
    except DiskError as error:
        return Check("weights", "problem", str(error), "look at the system's log: the drive fails")
    told = f"less than {rate(DRIVE_NBYTES / READING_S)}" if speed is None else rate(speed)
    return Check("weights", "ok", f"read at {told}, of {Path(file).name}", None, {"bytes_per_second": speed})


def weights_in(folder: Path) -> list[tuple[str, int]]:
    """Files of weights below where models are kept that are large enough to be measured, with their bytes. Blocking."""
    found = (
        path for pattern in ("*/snapshots/*/*.safetensors", "*/*.safetensors") for path in folder.glob(pattern) if os.path.isfile(path)
    )
    return [(str(path), nbytes) for path in found if (nbytes := path.stat().st_size) >= 2 * CHUNK]


def filesystem(folder: Path, mounts: str) -> str | None:
    """The kind of filesystem that `folder` is on, by the text of /proc/self/mountinfo; None where that does not say."""
    real = os.path.realpath(folder)
    longest, kind = -1, None
    for line in mounts.splitlines():
        before, dash, behind = line.partition(" - ")
        fields = before.split()
        if not dash or len(fields) < 5:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        below = real == point or real.startswith(point.rstrip("/") + "/")
        if below and len(point) >= longest:  # of two at one place, the later lies on top
            longest, kind = len(point), behind.split()[0]
    return kind


def _direct(folder: Path, direct: bool) -> Check:
    if direct:
        return Check("direct reads", "ok", f"{folder} is read and written past the page cache", None, {"direct": True})
    told = f"{folder} has none: pages are dropped after each read"
    return Check("direct reads", "warning", told, "reads cost more of the processor; ext4, xfs and btrfs have them", {"direct": False})


def _speed(folder: Path, wrote: int, written: float, read: float | None) -> Check:
    figures = {"read_bytes_per_second": read, "written_bytes_per_second": written, "nbytes": wrote}
    slowest = wrote / READING_S
    told = f"read at {f'less than {rate(slowest)}' if read is None else rate(read)}, written at {rate(written)}: {size(wrote)} in {folder}"
    if (slowest if read is None else read) < SLOW:
        return Check(
            "drive",
            "warning",
            told,
            "models larger than memory are read at that speed in every pass: an NVMe drive has ten times as much",
            figures,
        )
    return Check("drive", "ok", told, None, figures)


def _past_cache(name: str) -> int | None:
    """A second descriptor for direct writes; None where the filesystem has none."""
    try:
        return os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT) if sys.platform == "linux" else None
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


async def _write(fd: int, direct: int | None, nbytes: int, tell: Tell) -> tuple[int, float]:
    """Bytes written, and the seconds until they were on the drive. Noise, which no filesystem can compress."""
    with mmap.mmap(-1, BLOCK) as block:
        block[:] = await anyio.to_thread.run_sync(os.urandom, BLOCK)
        start, at = perf_counter(), 0
        while at < nbytes and (not at or perf_counter() - start < WRITING_S):
            tell(f"writing {size(at)} of {size(nbytes)} to measure the drive")
            at += await anyio.to_thread.run_sync(os.pwrite, fd if direct is None else direct, block, at)
            if direct is None:  # the page cache would take it all, and then be long in writing it
                await anyio.to_thread.run_sync(os.fsync, fd)
        await anyio.to_thread.run_sync(os.fsync, fd)
        seconds = perf_counter() - start
    if direct is None and sys.platform == "linux":
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return at, seconds


async def _read(folder: Path, extents: Sequence[Extent]) -> float | None:
    """Bytes per second as weights are read; None when it takes too long."""
    async with Port() as port:
        disk, _ = open_disk("auto", port, folder)
        try:
            with anyio.move_on_after(READING_S):
                return await drive_speed(disk, extents, Ring(2 * CHUNK), DRIVE_NBYTES)
            return None
        finally:
            with anyio.CancelScope(shield=True):
                await disk.aclose()
