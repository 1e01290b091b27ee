"""Opening an export: its raw files as a checkpoint, once they are known to be what the manifest says.

Sizes and names are checked each time; all bytes, unless the stamp says that they were checked and not touched since. What
is left is a drive that alters bytes by itself afterwards: `aollm export MODEL --verify` reads them all.
"""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Sequence
from pathlib import Path

import anyio.to_thread

from .. import fingerprint
from ..disk.base import Disk, Extent, Priority
from ..errors import CheckpointError, DiskError, ModelError
from ..tensors import AGAIN, Checkpoint, guard
from .checking import Progress, damaged, ignore
from .manifest import FORMAT, LIMIT, NAME, Manifest, parse_manifest
from .stamp import is_stamped, settled, stamp, states

FOLDER = "gds_export"
BEGINS = 64
"""Bytes of a manifest within which its format is named."""
HANDLES, SPARE = 4, 256
"""Descriptors that a disk may have of one file, and what the rest of the process needs."""


async def find_export(folder: Path, disk: Disk) -> Path | None:
    """The export in `folder`, or `folder` itself where it is one; None if there is neither."""
    for place in (folder / FOLDER, folder):
        file = str(place / NAME)
        try:
            start = bytearray(min(await disk.size(file), BEGINS))
            await disk.read_into([Extent(file, 0, len(start))], [memoryview(start)], Priority.NOW)
        except DiskError:
            continue
        if place != folder or FORMAT.encode() in start:  # other programs call files so too
            return place
    return None


async def open_export(
    folder: Path, disk: Disk, published: Sequence[str] = (), progress: Progress = ignore, again: bool = False
) -> Checkpoint:  # fmt: skip
    """The tensors of the export in `folder`, made from the safetensors files `published` if they are there.

    Reads all bytes where that was not done since the files were last touched, or `again` is asked for. Raises
    `CheckpointError` for an export that was cut, altered, or made from other weights, and `DiskError` when the drive fails.
    """
    data = await _read_manifest(folder, disk)
    manifest = await anyio.to_thread.run_sync(parse_manifest, data, folder)
    if published:
        found = await anyio.to_thread.run_sync(fingerprint.weights, published)
        if found != manifest.source:
            raise CheckpointError(
                f"{folder} was made from other weights than those beside it; make it again: aollm export MODEL --force, or remove it"
            )
    await _check(folder, manifest, hashlib.sha256(data).hexdigest(), disk, progress, again)
    tensors = {place.entry.name: place.entry for summed in manifest.files for place in summed.file.places}
    files = tuple(str(folder / summed.file.path) for summed in manifest.files)
    nbytes = sum(entry.extent.nbytes for entry in tensors.values())
    return Checkpoint(folder, tensors, files, nbytes, hashlib.sha256(data).hexdigest())


async def _read_manifest(folder: Path, disk: Disk) -> bytes:
    file = str(folder / NAME)
    await anyio.to_thread.run_sync(_guard_manifest, folder)
    try:
        nbytes = await disk.size(file)
    except DiskError as error:
        raise ModelError(f"{folder} is not an export ({error}); make one: aollm export MODEL") from error
    if nbytes > LIMIT:
        raise CheckpointError(f"{file} has {nbytes} bytes, more than the {LIMIT} that are read of a manifest; {AGAIN}")
    buffer = bytearray(nbytes)
    await disk.read_into([Extent(file, 0, nbytes)], [memoryview(buffer)], Priority.NOW)
    return bytes(buffer)


def _guard_manifest(folder: Path) -> None:
    """An export within a model's folder must not be a link out of it."""
    guard(folder, NAME)
    if folder.name == FOLDER:
        guard(folder.parent, f"{FOLDER}/{NAME}")


async def _check(folder: Path, manifest: Manifest, checksum: str, disk: Disk, progress: Progress, again: bool) -> None:
    """Raise `CheckpointError` unless all files are there and whole."""
    paths = [summed.file.path for summed in manifest.files]
    found = await settled(folder, paths)
    await anyio.to_thread.run_sync(allow_files, len(paths))
    for summed in manifest.files:
        path, nbytes = summed.file.path, summed.file.nbytes
        try:
            size = found[path][1] if path in found else await disk.size(str(folder / path))
        except DiskError as error:
            raise CheckpointError(f"{folder}: its file {path} is missing ({error}); make the export again, or copy it whole") from error
        if size != nbytes:
            fault = "is truncated" if size < nbytes else "has trailing bytes"
            raise CheckpointError(f"{folder / path} {fault}: it has {size} bytes of {nbytes}; make the export again, or copy it whole")
    on_files = len(found) == len(paths)  # a disk need not be the computer's filesystem
    if on_files and not again and await anyio.to_thread.run_sync(is_stamped, folder, checksum, found):
        return
    if wrong := await damaged(folder, manifest.files, disk, progress):
        path, complaint = next(iter(wrong.items()))
        more = f", and {len(wrong) - 1} more files are damaged" if len(wrong) > 1 else ""
        raise CheckpointError(f"{folder / path}: {complaint}{more}; make the export again: aollm export MODEL --force")
    if on_files and await anyio.to_thread.run_sync(states, folder, paths) == found:  # nobody wrote meanwhile
        await anyio.to_thread.run_sync(stamp, folder, checksum, found)


def allow_files(count: int) -> None:
    """Let this process have `count` files open at a time, as far as the system does; `DiskError` if that is not enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = HANDLES * count + SPARE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    if max(soft, most) < count + SPARE:
        raise DiskError(f"an export of {count} files needs as many open, and the system allows {hard}: raise the limit (ulimit -Hn)")
